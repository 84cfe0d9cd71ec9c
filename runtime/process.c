/* A world of processes, one per rank, on one node: they find each other by what their launcher says,
 * meet at rank 0 over TCP, and map each other's arenas by file descriptors. */
#define _GNU_SOURCE 1 /* struct ucred */
#include "internal.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* What a launcher tells a process. X(launcher, rank, ranks, names the job) */
#define LAUNCHERS(X) \
    X("torchrun", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID") \
    X("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE") \
    X("PMI", "PMI_RANK", "PMI_SIZE", "PMI_JOBID") \
    X("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID")

enum {
    RETRY_MS = 20,
    FIRST_PORT = 20000, /* of those that a job's name chooses from */
    PORTS = 10000,
    HELLO_VERSION = 1,
};
static const char magic[8] = "moert-w";

struct hello {
    char magic[8];
    uint32_t version;
    int32_t rank, ranks, answer; /* rank 0's: 0, or the rank that it cannot take */
    uint64_t job;                /* rank 0's: names the job's sockets */
};

struct rt_link {
    char host[256], port[24];
    uint64_t job;
    int timeout_ms;
    int socket[MOE_MAX_RANKS]; /* rank 0: to every other; else to rank 0, in [0] */
    int fd[MOE_MAX_RANKS];     /* peers' arenas */
    void *mapped[MOE_MAX_RANKS];
};

/* ---- the launcher's environment ---- */

static moert_result number_of(const char *name, int low, int high, int *out) {
    const char *text = getenv(name);
    char *end;
    long n = text ? strtol(text, &end, 10) : 0;
    if (!text || end == text || *end || n < low || n > high)
        return rt_fail(MOERT_INVALID, "%s is \"%s\", expected %d to %d", name,
                       text ? text : "(not set)", low, high);
    *out = (int)n;
    return MOERT_OK;
}

static moert_result from_launcher(moert_world_config *cfg, const char **job) {
    static const struct {
        const char *launcher, *rank, *ranks, *job;
    } known[] = {
#define X(launcher, rank, ranks, job) {launcher, rank, ranks, job},
        LAUNCHERS(X)
#undef X
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!getenv(known[i].rank) || !getenv(known[i].ranks))
            continue;
        *job = getenv(known[i].job);
        RT_TRY(number_of(known[i].ranks, 1, MOE_MAX_RANKS, &cfg->ranks));
        return number_of(known[i].rank, 0, cfg->ranks - 1, &cfg->rank);
    }
    return rt_fail(MOERT_INVALID,
                   "moert_world_config gives no ranks, and no launcher (torchrun, "
                   "mpirun, srun) has set RANK and WORLD_SIZE or their like");
}

static moert_result split_address(const char *address, int add, struct rt_link *k) {
    const char *colon = strrchr(address, ':');
    char *end = NULL;
    long port = colon ? strtol(colon + 1, &end, 10) : 0;
    size_t n = colon ? (size_t)(colon - address) : 0;
    if (!n || n >= sizeof k->host || end == colon + 1 || *end || port < 1 || port + add > 65535)
        return rt_fail(MOERT_INVALID, "\"%s\" is no address HOST:PORT", address);
    bool brackets = n > 2 && *address == '[' && address[n - 1] == ']';
    snprintf(k->host, sizeof k->host, "%.*s", (int)n - 2 * brackets, address + brackets);
    snprintf(k->port, sizeof k->port, "%ld", port + add);
    return MOERT_OK;
}

/* Where rank 0 waits: as configured; else beside the port at which the launcher or NCCL meets; else
 * on this node at a port that follows from the job's name. */
static moert_result find_address(const moert_world_config *cfg, const char *job,
                                 struct rt_link *k) {
    const char *address = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT");
    char text[300];
    unsigned hash = 2166136261u;
    if (cfg->address)
        return split_address(cfg->address, 0, k);
    if (getenv("NCCL_COMM_ID"))
        return split_address(getenv("NCCL_COMM_ID"), 1, k);
    if (address && port) {
        snprintf(text, sizeof text, "%s:%s", address, port);
        return split_address(text, 1, k);
    }
    if (!job)
        return rt_fail(MOERT_INVALID, "where the ranks meet is not known: set MASTER_ADDR and "
                                      "MASTER_PORT, or moert_world_config's address");
    for (const char *c = job; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 16777619u;
    snprintf(text, sizeof text, "127.0.0.1:%u", FIRST_PORT + hash % PORTS);
    return split_address(text, 0, k);
}

/* ---- sockets ---- */

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* A name that nothing knows is not worth waiting for. */
static moert_result check_host(const struct rt_link *k) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    int code = getaddrinfo(k->host, k->port, &hints, &list);
    if (code && code != EAI_AGAIN)
        return rt_fail(MOERT_INVALID, "rank 0's address %s:%s: %s", k->host, k->port,
                       gai_strerror(code));
    if (!code)
        freeaddrinfo(list);
    return MOERT_OK;
}

static void set_timeout(int s, int ms) {
    struct timeval t = {ms / 1000, ms % 1000 * 1000};
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
}

static bool send_all(int s, const void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = send(s, (const char *)data + done, bytes - done, MSG_NOSIGNAL);
        if (n <= 0 && !(n < 0 && errno == EINTR))
            return false;
        done += n > 0 ? (size_t)n : 0;
    }
    return true;
}

static bool receive_all(int s, void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = recv(s, (char *)data + done, bytes - done, 0);
        if (n <= 0 && !(n < 0 && errno == EINTR))
            return false;
        done += n > 0 ? (size_t)n : 0;
    }
    return true;
}

/* A port where nobody listens yet may be this socket's own. Closed without a trace: it is rank 0's. */
static bool is_self(int s) {
    struct sockaddr_storage here = {0}, there = {0};
    socklen_t n = sizeof here, m = sizeof there;
    const struct linger none = {1, 0};
    if (getsockname(s, (struct sockaddr *)&here, &n) ||
        getpeername(s, (struct sockaddr *)&there, &m) || n != m ||
        memcmp(&here, &there, n) != 0)
        return false;
    setsockopt(s, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    errno = ECONNREFUSED;
    return true;
}

/* A socket that listens at the address (rank 0), or is connected to it; -1 and errno. */
static int try_address(const struct rt_link *k, bool listens) {
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *list;
    int s = -1, one = 1, fault = EHOSTUNREACH;
    if (getaddrinfo(k->host, k->port, &hints, &list)) {
        errno = fault;
        return -1;
    }
    for (struct addrinfo *i = list; i && s < 0; i = i->ai_next) {
        s = socket(i->ai_family, i->ai_socktype | SOCK_CLOEXEC, i->ai_protocol);
        if (s >= 0 && listens)
            setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        else if (s >= 0)
            set_timeout(s, k->timeout_ms); /* of connect too */
        if (s >= 0 && (listens ? bind(s, i->ai_addr, i->ai_addrlen) || listen(s, MOE_MAX_RANKS)
                               : connect(s, i->ai_addr, i->ai_addrlen) || is_self(s))) {
            fault = errno;
            close(s);
            s = -1;
        }
    }
    freeaddrinfo(list);
    errno = fault;
    return s;
}

/* ---- meeting ---- */

static moert_result say_missing(const moert_world *w, int64_t waited_ms) {
    char list[5 * MOE_MAX_RANKS] = "";
    int n = 0;
    for (int r = 1; r < w->ranks; r++)
        if (w->link->socket[r] < 0)
            n += snprintf(list + n, sizeof list - (size_t)n, "%s%d", n ? ", " : "", r);
    return rt_fail(MOERT_PEER, "after %lld ms these ranks have not come to %s:%s: %s",
                   (long long)waited_ms, w->link->host, w->link->port, list);
}

/* One caller at rank 0's door: a rank of this job takes its place, others are sent away. */
static void take_caller(moert_world *w, int s) {
    struct rt_link *k = w->link;
    struct hello h = {{0}};
    set_timeout(s, k->timeout_ms < 1000 ? k->timeout_ms : 1000);
    if (!receive_all(s, &h, sizeof h) || memcmp(h.magic, magic, sizeof magic) != 0) {
        close(s);
        return;
    }
    bool fits = h.version == HELLO_VERSION && h.ranks == w->ranks && h.rank > 0 &&
                h.rank < w->ranks && k->socket[h.rank] < 0;
    h.answer = fits ? 0 : h.rank ? h.rank : -1;
    h.ranks = w->ranks;
    h.job = k->job;
    set_timeout(s, k->timeout_ms);
    if (!send_all(s, &h, sizeof h) || !fits)
        close(s);
    else
        k->socket[h.rank] = s;
}

static moert_result wait_for_all(moert_world *w) {
    struct rt_link *k = w->link;
    int64_t start = now_ms(), left;
    int door = try_address(k, true), there = 1;
    if (door < 0)
        return rt_fail(MOERT_SYSTEM, "rank 0 cannot listen at %s:%s: %s", k->host, k->port,
                       strerror(errno));
    if (getrandom(&k->job, sizeof k->job, 0) != sizeof k->job)
        k->job = (uint64_t)now_ms() << 20 ^ (uint64_t)getpid();
    while (there < w->ranks && (left = start + k->timeout_ms - now_ms()) > 0) {
        struct pollfd p = {door, POLLIN, 0};
        int s = poll(&p, 1, (int)left) > 0 ? accept4(door, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (s >= 0)
            take_caller(w, s);
        for (there = 1; there < w->ranks && k->socket[there] >= 0;)
            there++;
    }
    close(door);
    return there < w->ranks ? say_missing(w, now_ms() - start) : MOERT_OK;
}

static moert_result call_first(moert_world *w) {
    struct rt_link *k = w->link;
    struct hello h = {.version = HELLO_VERSION, .rank = w->own, .ranks = w->ranks};
    int64_t start = now_ms();
    const struct timespec pause = {0, RETRY_MS * 1000000};
    int s;
    memcpy(h.magic, magic, sizeof magic);
    while ((s = try_address(k, false)) < 0 && now_ms() - start < k->timeout_ms)
        nanosleep(&pause, NULL);
    if (s < 0)
        return rt_fail(MOERT_PEER, "rank %d cannot reach rank 0 at %s:%s: %s", w->own, k->host,
                       k->port, strerror(errno));
    k->socket[0] = s;
    set_timeout(s, k->timeout_ms);
    if (!send_all(s, &h, sizeof h) || !receive_all(s, &h, sizeof h) ||
        memcmp(h.magic, magic, sizeof magic) != 0)
        return rt_fail(MOERT_PEER, "rank 0 at %s:%s does not answer rank %d", k->host, k->port,
                       w->own);
    if (h.answer)
        return rt_fail(
            MOERT_INVALID,
            "rank 0 does not take rank %d of %d: it is there already, or they are %d", w->own,
            w->ranks, h.ranks);
    k->job = h.job;
    return MOERT_OK;
}

/* Every rank's `bytes` at all + rank * bytes, once all have given theirs. */
static moert_result gather(moert_world *w, void *all, size_t bytes) {
    struct rt_link *k = w->link;
    char *at = all;
    bool ok = true;
    if (w->own) {
        if (!send_all(k->socket[0], at + (size_t)w->own * bytes, bytes) ||
            !receive_all(k->socket[0], all, (size_t)w->ranks * bytes))
            return rt_fail(MOERT_PEER, "rank %d hears nothing more of rank 0 at %s:%s", w->own,
                           k->host, k->port);
        return MOERT_OK;
    }
    for (int r = 1; r < w->ranks; r++)
        if (!receive_all(k->socket[r], at + (size_t)r * bytes, bytes))
            return rt_fail(MOERT_PEER, "rank 0 hears nothing more of rank %d", r);
    for (int r = 1; r < w->ranks; r++)
        ok = send_all(k->socket[r], all, (size_t)w->ranks * bytes) && ok;
    return ok ? MOERT_OK : rt_fail(MOERT_PEER, "rank 0 cannot answer the others");
}

/* ---- arenas by file descriptor ---- */

static socklen_t socket_name(const struct rt_link *k, int rank, struct sockaddr_un *out) {
    *out = (struct sockaddr_un){.sun_family = AF_UNIX};
    int n = snprintf(out->sun_path + 1, sizeof out->sun_path - 1, "moert.%016llx.%d",
                     (unsigned long long)k->job, rank);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

union control {
    struct cmsghdr head;
    char bytes[CMSG_SPACE(sizeof(int))];
};

static bool same_user(int s) {
    struct ucred who = {0};
    socklen_t bytes = sizeof who;
    return !getsockopt(s, SOL_SOCKET, SO_PEERCRED, &who, &bytes) && who.uid == geteuid();
}

/* The next process of this user at the door, others are sent away; -1: none came. */
static int next_caller(int door, int timeout_ms) {
    int64_t end = now_ms() + timeout_ms, left;
    while ((left = end - now_ms()) > 0) {
        struct pollfd p = {door, POLLIN, 0};
        int s = poll(&p, 1, (int)left) > 0 ? accept4(door, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (s >= 0 && same_user(s))
            return s;
        if (s >= 0)
            close(s);
    }
    return -1;
}

/* To processes of this user alone. */
static bool give_fd(int door, int timeout_ms, int fd) {
    int s = next_caller(door, timeout_ms);
    char byte = 0;
    union control c = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)),
                                .cmsg_level = SOL_SOCKET,
                                .cmsg_type = SCM_RIGHTS}};
    struct iovec v = {&byte, 1};
    struct msghdr m = {.msg_iov = &v,
                       .msg_iovlen = 1,
                       .msg_control = c.bytes,
                       .msg_controllen = sizeof c.bytes};
    memcpy(CMSG_DATA(&c.head), &fd, sizeof fd);
    bool ok = s >= 0 && sendmsg(s, &m, MSG_NOSIGNAL) == 1;
    if (s >= 0)
        close(s);
    return ok;
}

static int take_fd(int s) {
    char byte;
    int fd = -1;
    union control c = {{0}};
    struct iovec v = {&byte, 1};
    struct msghdr m = {.msg_iov = &v,
                       .msg_iovlen = 1,
                       .msg_control = c.bytes,
                       .msg_controllen = sizeof c.bytes};
    ssize_t n;
    do
        n = recvmsg(s, &m, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n == 1 && CMSG_FIRSTHDR(&m) && CMSG_FIRSTHDR(&m)->cmsg_level == SOL_SOCKET &&
        CMSG_FIRSTHDR(&m)->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}

/* All call each other before any answers: the callers wait in the queues of the doors. */
static moert_result trade_fds(moert_world *w, int door) {
    struct rt_link *k = w->link;
    struct sockaddr_un name;
    int call[MOE_MAX_RANKS];
    char ready[MOE_MAX_RANKS] = {0};
    moert_result result = gather(w, ready, 1); /* every door is there */
    for (int r = 0; r < w->ranks; r++) {
        call[r] = -1;
        if (r == w->own || result != MOERT_OK)
            continue;
        call[r] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        set_timeout(call[r], k->timeout_ms);
        socklen_t bytes = socket_name(k, r, &name);
        if (connect(call[r], (struct sockaddr *)&name, bytes))
            result = rt_fail(MOERT_PEER, "rank %d cannot reach rank %d on this node: %s",
                             w->own, r, strerror(errno));
        else if (!same_user(call[r]))
            result =
                rt_fail(MOERT_PEER, "rank %d on this node is a process of another user", r);
    }
    for (int r = 0; r + 1 < w->ranks && result == MOERT_OK; r++)
        if (!give_fd(door, k->timeout_ms, w->member[w->own].context->arena_fd))
            result = rt_fail(MOERT_PEER, "rank %d cannot give its arena to all", w->own);
    for (int r = 0; r < w->ranks; r++) {
        if (r != w->own && result == MOERT_OK && (k->fd[r] = take_fd(call[r])) < 0)
            result = rt_fail(MOERT_PEER, "rank %d does not give rank %d its arena", r, w->own);
        if (call[r] >= 0)
            close(call[r]);
    }
    return result;
}

static moert_result exchange_fds(moert_world *w) {
    struct sockaddr_un name;
    int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t bytes = socket_name(w->link, w->own, &name);
    if (door < 0 || bind(door, (struct sockaddr *)&name, bytes) ||
        listen(door, MOE_MAX_RANKS)) {
        int fault = errno;
        if (door >= 0)
            close(door);
        return rt_fail(MOERT_SYSTEM, "a local socket: %s", strerror(fault));
    }
    moert_result r = trade_fds(w, door);
    close(door);
    return r;
}

/* ---- the world's functions ---- */

static void forget_arenas(moert_world *w) {
    struct rt_link *k = w->link;
    const moert_context *c = w->member[w->own].context;
    for (int r = 0; r < w->ranks; r++) {
        if (k->mapped[r] && c)
            c->ops->unmap_shared(c->device, k->mapped[r], w->member[w->own].word.arena_bytes);
        if (k->fd[r] >= 0)
            close(k->fd[r]);
        k->mapped[r] = NULL;
        k->fd[r] = -1;
    }
}

static moert_result process_gather(moert_world *w, struct rt_word *all) {
    const struct rt_member *m = &w->member[w->own];
    if (!m->context)
        return rt_fail(MOERT_INVALID, "rank %d has no context yet", w->own);
    forget_arenas(w);
    all[w->own] = m->word;
    all[w->own].nccl = w->nccl && !w->nccl_made;
    RT_TRY(gather(w, all, sizeof *all));
    for (int r = 0; r < w->ranks; r++)
        all[r].plan[sizeof all[r].plan - 1] = all[r].node[sizeof all[r].node - 1] = 0;
    for (int r = 1; r < w->ranks; r++)
        if (all[r].nccl != all[0].nccl)
            return rt_fail(MOERT_INVALID, "of ranks 0 and %d one alone has an ncclComm_t", r);
    w->far = w->nccl;
    for (int r = 1; r < w->ranks; r++)
        w->far = w->far || strcmp(all[r].node, all[0].node) != 0;
    const moert_bundle *b = m->context->bundle;
    for (uint32_t i = 0; w->far && i < b->count[MOE_SECTION_BUCKET]; i++)
        if (b->buckets[i].exchange == MOE_EXCHANGE_ONESIDED)
            return rt_fail(
                MOERT_UNSUPPORTED,
                "ranks are on several nodes or exchange by NCCL, but the plan exchanges "
                "up to %d tokens by onesided, which needs each other's memory",
                b->buckets[i].max_tokens);
    return MOERT_OK;
}

static moert_result process_reach(moert_world *w, int rank, int peer, void **out) {
    const moert_context *c = w->member[rank].context;
    struct rt_link *k = w->link;
    *out = NULL;
    if (w->far && peer != rank)
        return MOERT_OK;
    if (peer != rank && !k->mapped[peer])
        RT_TRY(c->ops->map_shared(c->device, k->fd[peer], w->member[rank].word.arena_bytes,
                                  &k->mapped[peer]));
    *out = peer == rank ? c->arena : k->mapped[peer];
    return MOERT_OK;
}

static moert_result process_trade(moert_world *w) {
    return w->far ? rt_nccl_join(w, gather) : exchange_fds(w);
}

static void process_leave(moert_world *w) {
    rt_nccl_leave(w);
    forget_arenas(w);
}

static void process_close(moert_world *w) {
    struct rt_link *k = w->link;
    for (int r = 0; k && r < w->ranks; r++) {
        if (k->socket[r] >= 0)
            close(k->socket[r]);
        if (k->fd[r] >= 0)
            close(k->fd[r]);
    }
    free(k);
}

const struct rt_world_ops rt_process_ops = {.gather = process_gather,
                                            .trade = process_trade,
                                            .reach = process_reach,
                                            .leave = process_leave,
                                            .close = process_close};

moert_result rt_world_meet(moert_world *w, moert_world_config *cfg) {
    const char *job = NULL;
    struct rt_link *k = w->link = calloc(1, sizeof *k);
    if (!k)
        return rt_no_memory(sizeof *k);
    for (int r = 0; r < MOE_MAX_RANKS; r++)
        k->socket[r] = k->fd[r] = -1;
    if (!cfg->ranks)
        RT_TRY(from_launcher(cfg, &job));
    if (cfg->rank < 0 || cfg->rank >= cfg->ranks)
        return rt_fail(MOERT_INVALID, "moert_world_config: rank %d of %d", cfg->rank,
                       cfg->ranks);
    w->ranks = cfg->ranks;
    w->own = cfg->rank;
    w->nccl = cfg->nccl;
    k->timeout_ms = (int)(w->timeout_ns / 1000000);
    if (w->ranks == 1)
        return MOERT_OK;
    RT_TRY(find_address(cfg, job, k));
    RT_TRY(check_host(k));
    return w->own ? call_first(w) : wait_for_all(w);
}
