/* NCCL, opened when first needed and declared here: moves the blocks of collectives between ranks that
 * do not reach each other's memory. */
#include "internal.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

struct unique_id { /* ncclUniqueId, passed by value */
    char bytes[128];
};
enum { BYTES = 1 }; /* ncclUint8 */

/* As nccl.h declares them: results are 0 for success. X(name, arguments) */
#define NCCL_CALLS(X) \
    X(GetUniqueId, (struct unique_id * out)) \
    X(CommInitRank, (void **comm, int ranks, struct unique_id id, int rank)) \
    X(CommDestroy, (void *comm)) \
    X(GroupStart, (void)) \
    X(GroupEnd, (void)) \
    X(Send, (const void *from, size_t count, int type, int peer, void *comm, void *stream)) \
    X(Recv, (void *to, size_t count, int type, int peer, void *comm, void *stream))

static struct {
    const char *missing; /* NULL: all there */
    const char *(*GetErrorString)(int code);
#define X(name, args) int(*name) args;
    NCCL_CALLS(X)
#undef X
} nccl;

static void open_nccl(void) {
    void *library =
        dlopen(NULL, RTLD_NOW); /* a borrowed communicator is of the process's own */
    if (!library || !dlsym(library, "ncclSend"))
        library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    nccl.missing = library ? NULL : "libnccl.so.2";
    if (!library)
        return;
    *(void **)&nccl.GetErrorString = dlsym(library, "ncclGetErrorString");
    if (!nccl.GetErrorString)
        nccl.missing = "ncclGetErrorString in libnccl.so.2";
#define X(name, args) \
    *(void **)&nccl.name = dlsym(library, "nccl" #name); \
    if (!nccl.name) \
        nccl.missing = "nccl" #name " in libnccl.so.2";
    NCCL_CALLS(X)
#undef X
}

static moert_result check(int code, const char *call) {
    return code ? rt_fail(MOERT_CUDA, "%s: %s", call, nccl.GetErrorString(code)) : MOERT_OK;
}
#define NCCL(name, ...) RT_TRY(check(nccl.name(__VA_ARGS__), "nccl" #name))

static moert_result open_library(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_nccl);
    return nccl.missing
               ? rt_fail(
                     MOERT_UNSUPPORTED,
                     "ranks that do not share memory exchange by NCCL, which is not here: %s",
                     nccl.missing)
               : MOERT_OK;
}

/* Rank 0's id goes to all through the world's own connection. */
moert_result rt_nccl_join(moert_world *w,
                          moert_result (*gather)(moert_world *w, void *all, size_t bytes)) {
    struct unique_id id[MOE_MAX_RANKS] = {{{0}}};
    moert_result here = open_library();
    if (w->nccl)
        return here;
    if (here == MOERT_OK && !w->own)
        here = check(nccl.GetUniqueId(&id[0]), "ncclGetUniqueId");
    char ready[MOE_MAX_RANKS] = {0};
    ready[w->own] = here == MOERT_OK;
    RT_TRY(gather(w, id, sizeof *id));
    RT_TRY(gather(w, ready, 1)); /* whoever fails does not leave the others waiting */
    RT_TRY(here);
    for (int r = 0; r < w->ranks; r++)
        if (!ready[r])
            return rt_fail(MOERT_PEER, "rank %d has no NCCL that works", r);
    const moert_context *c = w->member[w->own].context;
    RT_TRY(c->ops->enter(c->device));
    moert_result r =
        check(nccl.CommInitRank(&w->nccl, w->ranks, id[0], w->own), "ncclCommInitRank");
    c->ops->leave(c->device);
    w->nccl_made = r == MOERT_OK;
    return r;
}

void rt_nccl_leave(moert_world *w) {
    if (w->nccl_made)
        nccl.CommDestroy(w->nccl);
    if (w->nccl_made)
        w->nccl = NULL;
    w->nccl_made = false;
}

moert_result rt_nccl_begin(void) {
    NCCL(GroupStart);
    return MOERT_OK;
}
moert_result rt_nccl_end(void) {
    NCCL(GroupEnd);
    return MOERT_OK;
}
/* After an error, whose text stays: the thread's group is closed in any case. */
void rt_nccl_cancel(void) {
    nccl.GroupEnd();
}

moert_result rt_nccl_move(moert_world *w, const void *from, size_t step, void *to, size_t bytes,
                          moert_stream s) {
    for (int p = 0; p < w->ranks; p++) {
        NCCL(Send, (const char *)from + (size_t)p * step, bytes, BYTES, p, w->nccl, s);
        NCCL(Recv, (char *)to + (size_t)p * bytes, bytes, BYTES, p, w->nccl, s);
    }
    return MOERT_OK;
}
