/* Policies from the outside: a child process for every call, what it sends back read as if it came
 * from an enemy, and every value checked against the model and the cluster. */
#define _GNU_SOURCE
#include "policy.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define X(name, ...) #name,
const char *const hook_names[NUM_HOOKS] = {POLICY_HOOKS(X)};
#undef X

/* X(name), the default first */
#define SHIPPED(X) X(robust) X(even) X(trtllm) X(deepseek)
#define X(name) #name,
const char *const policy_shipped[] = {SHIPPED(X) NULL};
#undef X
#define X(name) extern const char embed_##name##_lua[], embed_##name##_lua_end[];
SHIPPED(X)
#undef X

/* ---- values ---- */

struct value {
    char tag;
    union {
        int64_t i;
        double x;
        const char *text;
        const struct table *table;
    };
};
struct pair {
    struct value key, value;
};
struct table {
    uint32_t n, pairs;
    struct value *items; /* of keys 1 .. n */
    struct pair *pair;   /* the other ones: whole numbers, texts, the rest */
};

struct parser {
    struct arena *arena;
    const char *at, *end;
    long values;
};

static bool take(struct parser *p, void *out, size_t len) {
    if ((size_t)(p->end - p->at) < len)
        return false;
    memcpy(out, p->at, len);
    p->at += len;
    return true;
}

static bool parse_value(struct parser *p, struct value *v, int depth);

static int key_rank(char tag) {
    return tag == VALUE_INT ? 0 : tag == VALUE_STRING ? 1 : tag;
}

/* Lua's own order differs from run to run; the first fault found must not. */
static int compare_pairs(const void *x, const void *y) {
    const struct value *a = &((const struct pair *)x)->key, *b = &((const struct pair *)y)->key;
    if (a->tag != b->tag)
        return key_rank(a->tag) - key_rank(b->tag);
    if (a->tag == VALUE_INT)
        return (a->i > b->i) - (a->i < b->i);
    if (a->tag == VALUE_NUMBER)
        return (a->x > b->x) - (a->x < b->x);
    return a->tag == VALUE_STRING ? strcmp(a->text, b->text) : 0;
}

static bool parse_table(struct parser *p, struct value *v, int depth) {
    struct table *t = arena_array(p->arena, struct table, 1);
    if (depth > POLICY_DEPTH || !take(p, &t->n, 4) || !take(p, &t->pairs, 4) ||
        t->n > POLICY_VALUES || t->pairs > POLICY_VALUES ||
        (size_t)(p->end - p->at) < t->n + 2ull * t->pairs)
        return false;
    t->items = arena_array(p->arena, struct value, t->n);
    t->pair = arena_array(p->arena, struct pair, t->pairs);
    v->table = t;
    for (uint32_t i = 0; i < t->n; i++)
        if (!parse_value(p, &t->items[i], depth + 1))
            return false;
    for (uint32_t i = 0; i < t->pairs; i++)
        if (!parse_value(p, &t->pair[i].key, depth + 1) ||
            !parse_value(p, &t->pair[i].value, depth + 1))
            return false;
    qsort(t->pair, t->pairs, sizeof *t->pair, compare_pairs);
    return true;
}

/* A byte 0 becomes 1: as little what anything is called, but it ends no text. */
static bool parse_text(struct parser *p, struct value *v) {
    uint32_t n;
    if (!take(p, &n, 4) || n > (size_t)(p->end - p->at))
        return false;
    char *text = arena_array(p->arena, char, (size_t)n + 1);
    for (uint32_t i = 0; i < n; i++)
        text[i] = p->at[i] ? p->at[i] : 1;
    v->text = text;
    p->at += n;
    return true;
}

static bool parse_value(struct parser *p, struct value *v, int depth) {
    if (!take(p, &v->tag, 1) || ++p->values > POLICY_VALUES + 1)
        return false;
    switch (v->tag) {
    case VALUE_NIL:
    case VALUE_FALSE:
    case VALUE_TRUE:
        return true;
    case VALUE_INT:
        return take(p, &v->i, sizeof v->i);
    case VALUE_NUMBER:
        return take(p, &v->x, sizeof v->x);
    case VALUE_STRING:
    case VALUE_OTHER:
        return parse_text(p, v);
    case VALUE_TABLE:
        return parse_table(p, v, depth);
    default:
        return false;
    }
}

bool policy_value_ok(struct arena *a, const char *data, size_t len) {
    struct parser p = {a, data, data + len, 0};
    struct value v;
    return parse_value(&p, &v, 0) && p.at == p.end;
}

/* A value in words: "nil", "300", "'abc'", "a table". */
static const char *spell(struct arena *a, const struct value *v) {
    switch (v ? v->tag : VALUE_NIL) {
    case VALUE_FALSE:
        return "false";
    case VALUE_TRUE:
        return "true";
    case VALUE_INT:
        return arena_printf(a, "%lld", (long long)v->i);
    case VALUE_NUMBER:
        return v->x != v->x ? "nan" : arena_printf(a, "%.17g", v->x);
    case VALUE_STRING:
        return arena_printf(a, "'%.60s'", v->text);
    case VALUE_OTHER:
        return arena_printf(a, "a %.60s", v->text);
    case VALUE_TABLE:
        return "a table";
    default:
        return "nil";
    }
}

/* A whole number, also when Lua made it a float. */
static bool whole(const struct value *v, int64_t *out) {
    if (v && v->tag == VALUE_INT) {
        *out = v->i;
        return true;
    }
    if (!v || v->tag != VALUE_NUMBER || !(fabs(v->x) < 1e15) || v->x != floor(v->x))
        return false;
    *out = (int64_t)v->x;
    return true;
}

static const struct value *get_int(const struct table *t, int64_t key) {
    if (key >= 1 && key <= (int64_t)t->n)
        return &t->items[key - 1];
    for (uint32_t i = 0; i < t->pairs; i++)
        if (t->pair[i].key.tag == VALUE_INT && t->pair[i].key.i == key)
            return &t->pair[i].value;
    return NULL;
}

static const struct value *get_text(const struct table *t, const char *key) {
    for (uint32_t i = 0; i < t->pairs; i++)
        if (t->pair[i].key.tag == VALUE_STRING && !strcmp(t->pair[i].key.text, key))
            return &t->pair[i].value;
    return NULL;
}

/* ---- where: a line of the policy ---- */

/* Its first letter, or, for a syntax error, the word that it stopped at. */
static struct loc line_loc(const struct source *s, int line, const char *text) {
    struct loc loc = {s, line, 1};
    const char *from = s->text, *end = s->text + s->len;
    for (int i = 1; i < line && from; i++)
        if ((from = memchr(from, '\n', (size_t)(end - from))))
            from++;
    if (line < 1 || !from)
        return (struct loc){s, 0, 0};
    const char *stop = memchr(from, '\n', (size_t)(end - from));
    size_t len = (size_t)((stop ? stop : end) - from), blank = 0;
    while (blank < len && isspace((unsigned char)from[blank]))
        blank++;
    loc.col = (int)blank + 1;
    const char *near = text ? strstr(text, " near '") : NULL;
    size_t word = near && near[7] && near[strlen(near) - 1] == '\'' ? strlen(near + 7) - 1 : 0;
    const char *found = word ? memmem(from, len, near + 7, word) : NULL;
    if (found)
        loc.col = (int)(found - from) + 1;
    return loc;
}

/* ---- a call ---- */

#define GRACE 0.5 /* seconds for a child to say itself that its time is over */

/* A call while it runs and while its result is checked. */
struct caller {
    struct policy *policy;
    struct arena *arena;
    struct diags *diags;
    const struct policy_world *world;
    const char *what; /* the function's name; "" while opening */
    int line;         /* its line */
    struct value result;
};

static void fault(struct caller *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fault(struct caller *c, const char *fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    diag_error(c->diags, line_loc(c->policy->source, c->line, NULL), "%s%s%s", c->what,
               *c->what ? ": " : "", text);
}

/* Reads until the end, the deadline or too much. */
static bool read_result(struct caller *c, int fd, double deadline, struct buf *out) {
    static const size_t most =
        POLICY_RESULT + POLICY_NOTES * (POLICY_NOTE + RECORD_HEAD) + 4096;
    char chunk[1 << 16];
    for (;;) {
        double left = deadline - now_seconds();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (left <= 0) {
            fault(c, "stopped: it took %.0f s in all", POLICY_WALL);
            return false;
        }
        int ready = poll(&p, 1, (int)(left * 1000) + 1);
        if (ready <= 0)
            continue;
        ssize_t n = read(fd, chunk, sizeof chunk);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return true;
        buf_add(out, chunk, (size_t)n);
        if (out->len > most) {
            fault(c, "stopped: it sent too much");
            return false;
        }
    }
}

/* Takes the records apart. What no child of ours would send is a fault like any other. */
static bool read_records(struct caller *c, const struct buf *b) {
    struct parser p = {c->arena, b->data, b->data + b->len, 0};
    const struct source *s = c->policy->source;
    for (;;) {
        char type;
        int32_t line;
        uint32_t n;
        if (!take(&p, &type, 1) || !take(&p, &line, 4) || !take(&p, &n, 4) ||
            n > (size_t)(p.end - p.at))
            return false;
        const char *text =
            arena_printf(c->arena, "%.*s", type == RECORD_VALUE ? 0 : (int)n, p.at);
        if (type == RECORD_NOTE) {
            diag_add(c->diags, DIAG_NOTE, line_loc(s, line, NULL), "%s", text);
            p.at += n;
        } else if (type == RECORD_ERROR) {
            diag_error(c->diags, line_loc(s, line ? line : c->line, text), "%s%s%s", c->what,
                       *c->what ? ": " : "", text);
            return true;
        } else {
            return type == RECORD_VALUE && parse_value(&p, &c->result, 0) && p.at == p.end;
        }
    }
}

static void say_end(struct caller *c, int status) {
    if (WIFSIGNALED(status))
        fault(c, "its process died of signal %d (%s)", WTERMSIG(status),
              strsignal(WTERMSIG(status)));
    else
        fault(c, "its process ended without a result");
}

/* Runs a call in a child of its own. False with an error. */
static bool run(struct caller *c, struct policy_call *call) {
    int fds[2], status = 0, before = c->diags->errors;
    double start = now_seconds();
    struct buf b = {.arena = c->arena};
    buf_add(&b, "", 0);
    call->seconds = c->policy->seconds_left > 0.01 ? c->policy->seconds_left : 0.01;
    if (pipe2(fds, O_CLOEXEC)) {
        fault(c, "no pipe to its process: %s", strerror(errno));
        return false;
    }
    pid_t pid = fork();
    if (pid == 0) {
        close(fds[0]);
        sandbox_run(c->policy->source, call, fds[1]);
    }
    close(fds[1]);
    bool whole = pid > 0 && read_result(c, fds[0], start + call->seconds + GRACE, &b);
    if (pid < 0)
        fault(c, "no process for it: %s", strerror(errno));
    close(fds[0]);
    if (pid > 0) {
        kill(pid, SIGKILL); /* it has closed the pipe, so it has nothing more to say */
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
    }
    c->policy->seconds_left -= now_seconds() - start;
    if (whole && !read_records(c, &b))
        say_end(c, status);
    return c->diags->errors == before;
}

static bool call_hook(struct caller *c, struct policy_call *call) {
    c->what = hook_names[call->hook];
    c->line = c->policy->line[call->hook];
    call->world = c->world;
    if (!run(c, call))
        return false;
    if (c->result.tag != VALUE_NIL)
        return true;
    fault(c, "it returned nothing");
    return false;
}

/* ---- opening ---- */

static bool read_source(struct arena *a, struct diags *d, const char *name, const char *path,
                        struct loc at, struct source *s) {
#define X(id) \
    if (!path && !strcmp(name, #id)) { \
        *s = (struct source){"lua/" #id ".lua (built in)", embed_##id##_lua, \
                             (size_t)(embed_##id##_lua_end - embed_##id##_lua)}; \
        return true; \
    }
    SHIPPED(X)
#undef X
    char *text;
    size_t len;
    int err = file_read(a, path ? path : name, POLICY_FILE, &text, &len);
    *s = (struct source){path ? path : name, text, len};
    if (err == EFBIG)
        diag_error(d, at, "policy %s: larger than 1 MiB", s->path);
    else if (err)
        diag_error(d, at, "policy %s: %s", s->path, strerror(err));
    return !err;
}

static void unknown_field(struct caller *c, const struct value *key) {
    const char *names[NUM_HOOKS + 1];
    const char *text = key->tag == VALUE_STRING ? key->text : NULL;
    memcpy(names, hook_names, sizeof hook_names);
    names[NUM_HOOKS] = "name";
    const char *near = text ? nearest(text, names, NUM_HOOKS + 1) : NULL;
    if (near)
        fault(c, "a policy has no field %s; did you mean '%s'?", spell(c->arena, key), near);
    else
        fault(c,
              "a policy has no field %s; it may have name, replicate, place, share, exchange, "
              "variant and constraints",
              spell(c->arena, key));
}

/* A field as the child describes it: f and a line, n and a name, x and a type. */
static void read_field(struct caller *c, const struct value *key, const char *text) {
    struct policy *p = c->policy;
    const char *name = key->tag == VALUE_STRING ? key->text : "";
    int hook = 0;
    while (hook < NUM_HOOKS && strcmp(hook_names[hook], name))
        hook++;
    if (hook < NUM_HOOKS && *text == 'f') {
        p->defines[hook] = true;
        p->line[hook] = atoi(text + 1) > 0 ? atoi(text + 1) : 0;
    } else if (hook < NUM_HOOKS) {
        fault(c, "%s: expected a function, got a %s", name, text + !!*text);
    } else if (strcmp(name, "name")) {
        unknown_field(c, key);
    } else if (*text != 'n' || !text[1] || strlen(text) > 100) {
        fault(c, "name: expected a text of at most 99 bytes");
    } else {
        p->name = text + 1;
    }
}

struct policy *policy_open(struct arena *a, struct diags *d, const char *name, const char *path,
                           struct loc at) {
    struct policy *p = arena_array(a, struct policy, 1);
    struct source *s = arena_array(a, struct source, 1);
    struct caller c = {.policy = p, .arena = a, .diags = d, .what = ""};
    struct policy_call call = {.hook = NUM_HOOKS};
    int before = d->errors;
    *p = (struct policy){.name = name, .source = s, .seconds_left = POLICY_WALL};
    if (!read_source(a, d, name, path, at, s) || !run(&c, &call))
        return NULL;
    for (const char *const *n = policy_shipped; *n && !path; n++)
        p->shipped = p->shipped || !strcmp(*n, name);
    if (c.result.tag != VALUE_TABLE)
        say_end(&c, 0);
    for (uint32_t i = 0; c.result.tag == VALUE_TABLE && i < c.result.table->n; i++)
        unknown_field(&c, &(struct value){.tag = VALUE_INT, .i = i + 1});
    for (uint32_t i = 0; c.result.tag == VALUE_TABLE && i < c.result.table->pairs; i++) {
        const struct value *v = &c.result.table->pair[i].value;
        read_field(&c, &c.result.table->pair[i].key, v->tag == VALUE_STRING ? v->text : "");
    }
    return d->errors == before ? p : NULL;
}

/* ---- layers ---- */

static bool is_layer(const struct model *m, int64_t layer) {
    for (int i = 0; i < m->num_moe_layers; i++)
        if (m->moe_layers[i] == layer)
            return true;
    return false;
}

static void unknown_layer(struct caller *c, const struct value *key) {
    const struct model *m = c->world->model;
    fault(c, "%s is no MoE layer of %s, whose %d layers run from %d to %d",
          spell(c->arena, key), m->name, m->num_moe_layers, m->moe_layers[0],
          m->moe_layers[m->num_moe_layers - 1]);
}

/* A table of layers, all of them and no others. */
static bool check_layers(struct caller *c) {
    const struct model *m = c->world->model;
    int before = c->diags->errors;
    if (c->result.tag != VALUE_TABLE) {
        fault(c, "expected a table of layers, got %s", spell(c->arena, &c->result));
        return false;
    }
    const struct table *t = c->result.table;
    for (uint32_t i = 0; i < t->n; i++)
        if (!is_layer(m, (int64_t)i + 1)) {
            unknown_layer(c, &(struct value){.tag = VALUE_INT, .i = i + 1});
            break;
        }
    for (uint32_t i = 0; i < t->pairs; i++)
        if (t->pair[i].key.tag != VALUE_INT || !is_layer(m, t->pair[i].key.i)) {
            unknown_layer(c, &t->pair[i].key);
            break;
        }
    for (int i = 0; i < m->num_moe_layers; i++)
        if (!get_int(t, m->moe_layers[i])) {
            fault(c, "layer %d is missing", m->moe_layers[i]);
            break;
        }
    return c->diags->errors == before;
}

/* The array of a layer: n entries. what: "experts" or "slots". */
static const struct table *layer_array(struct caller *c, int layer, int n, const char *what) {
    const struct value *v = get_int(c->result.table, layer);
    if (v->tag != VALUE_TABLE) {
        fault(c, "layer %d: expected an array, got %s", layer, spell(c->arena, v));
        return NULL;
    }
    const struct table *t = v->table;
    if (t->pairs && get_int(t, 0))
        fault(c, "layer %d: key 0: an array's first entry is 1", layer);
    else if ((int)t->n != n)
        fault(c, "layer %d: %u entries for %d %s", layer, t->n, n, what);
    else if (t->pairs)
        fault(c, "layer %d: key %s beside the %d %s", layer, spell(c->arena, &t->pair[0].key),
              n, what);
    else
        return t;
    return NULL;
}

static bool check_counts(struct caller *c, int layer, int *count) {
    const struct policy_world *w = c->world;
    int E = w->model->num_experts, R = w->cluster->ranks, total = R * w->slots_per_rank;
    const struct table *t = layer_array(c, layer, E, "experts");
    long long sum = 0;
    for (int e = 0; t && e < E; e++) {
        int64_t n;
        if (!whole(&t->items[e], &n) || n < 1 || n > R) {
            fault(c, "layer %d, expert %d: %s replicas out of 1..%d", layer, e,
                  spell(c->arena, &t->items[e]), R);
            return false;
        }
        count[e] = (int)n;
        sum += n;
    }
    if (t && sum > total)
        fault(c, "layer %d: %lld replicas for %d slots", layer, sum, total);
    else if (t && sum < w->num_slots)
        fault(c, "layer %d: %lld replicas, but there are %d slots to fill", layer, sum,
              w->num_slots);
    return t && sum <= total && sum >= w->num_slots;
}

bool policy_replicate(struct policy *p, struct arena *a, struct diags *d,
                      const struct policy_world *w, int *count) {
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_replicate};
    if (!call_hook(&c, &call) || !check_layers(&c))
        return false;
    int before = d->errors;
    for (int i = 0; i < w->model->num_moe_layers; i++)
        check_counts(&c, w->model->moe_layers[i], count + (size_t)i * w->model->num_experts);
    return d->errors == before;
}

/* One entry of a placement. */
static bool check_slot(struct caller *c, int layer, int slot, const struct value *v, int *out) {
    const struct policy_world *w = c->world;
    int E = w->model->num_experts;
    bool may_be_empty = w->num_slots < w->cluster->ranks * w->slots_per_rank;
    int64_t e;
    if (!whole(v, &e) || e < (may_be_empty ? -1 : 0) || e >= E) {
        fault(c, "layer %d, slot %d: expert %s out of 0..%d%s", layer, slot, spell(c->arena, v),
              E - 1, may_be_empty ? ", or -1: empty" : "");
        return false;
    }
    *out = (int)e;
    if (e >= 0 && slot % w->slots_per_rank && out[-1] < 0) {
        fault(c, "layer %d, slot %d: empty slots come last on a rank, but slot %d is empty",
              layer, slot, slot - 1);
        return false;
    }
    return true;
}

static void check_placement(struct caller *c, int layer, int *expert_of_slot) {
    const struct policy_world *w = c->world;
    int E = w->model->num_experts, n = w->cluster->ranks * w->slots_per_rank;
    const struct table *t = layer_array(c, layer, n, "slots");
    bool *placed = arena_array(c->arena, bool, E);
    for (int i = 0; t && i < n; i++) {
        if (!check_slot(c, layer, i, &t->items[i], &expert_of_slot[i]))
            return;
        if (expert_of_slot[i] >= 0)
            placed[expert_of_slot[i]] = true;
    }
    for (int e = 0; t && e < E; e++)
        if (!placed[e]) {
            fault(c, "layer %d: expert %d has no slot", layer, e);
            return;
        }
}

bool policy_place(struct policy *p, struct arena *a, struct diags *d,
                  const struct policy_world *w, const int *count, int *expert_of_slot) {
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_place, .count = count};
    size_t slots = (size_t)w->cluster->ranks * (size_t)w->slots_per_rank;
    if (!call_hook(&c, &call) || !check_layers(&c))
        return false;
    int before = d->errors;
    for (int i = 0; i < w->model->num_moe_layers; i++)
        check_placement(&c, w->model->moe_layers[i], expert_of_slot + (size_t)i * slots);
    return d->errors == before;
}

static void check_shares(struct caller *c, int layer, const int *expert_of_slot,
                         double *share) {
    const struct policy_world *w = c->world;
    int E = w->model->num_experts, n = w->cluster->ranks * w->slots_per_rank;
    const struct table *t = layer_array(c, layer, n, "slots");
    double *sum = arena_array(c->arena, double, E);
    for (int i = 0; t && i < n; i++) {
        const struct value *v = &t->items[i];
        double x = v->tag == VALUE_INT ? (double)v->i : v->tag == VALUE_NUMBER ? v->x : -1;
        if (!(x >= 0 && x <= 1) || (expert_of_slot[i] < 0 && x > 0)) {
            fault(c, "layer %d, slot %d: share %s out of 0..%d", layer, i, spell(c->arena, v),
                  expert_of_slot[i] >= 0);
            return;
        }
        share[i] = x;
        if (expert_of_slot[i] >= 0)
            sum[expert_of_slot[i]] += x;
    }
    for (int e = 0; t && e < E; e++)
        if (!(fabs(sum[e] - 1) <= 1e-6)) {
            fault(c, "layer %d, expert %d: its shares sum to %.9g, not to 1", layer, e, sum[e]);
            return;
        }
}

bool policy_share(struct policy *p, struct arena *a, struct diags *d,
                  const struct policy_world *w, const int *expert_of_slot,
                  double *share_of_slot) {
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_share, .expert_of_slot = expert_of_slot};
    size_t slots = (size_t)w->cluster->ranks * (size_t)w->slots_per_rank;
    if (!call_hook(&c, &call) || !check_layers(&c))
        return false;
    int before = d->errors;
    for (int i = 0; i < w->model->num_moe_layers; i++)
        check_shares(&c, w->model->moe_layers[i], expert_of_slot + (size_t)i * slots,
                     share_of_slot + (size_t)i * slots);
    return d->errors == before;
}

/* ---- exchange and variant ---- */

int policy_exchange(struct policy *p, struct arena *a, struct diags *d,
                    const struct policy_world *w, int tokens) {
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_exchange, .tokens = tokens};
    struct buf names = {.arena = a};
    if (!call_hook(&c, &call))
        return -1;
    for (int i = 0; i < MOE_EXCHANGE_COUNT; i++) {
        if (c.result.tag == VALUE_STRING && !strcmp(c.result.text, exchange_names[i]))
            return i;
        buf_printf(&names, "%s%s", i ? ", " : "", exchange_names[i]);
    }
    fault(&c, "expected one of %s, got %s", names.data, spell(a, &c.result));
    return -1;
}

/* A field of what variant returned: the id of one of n rows. */
static void check_variant(struct caller *c, const char *key, int n, int *out) {
    const struct value *v = get_text(c->result.table, key);
    int64_t id;
    if (!v)
        return;
    if (whole(v, &id) && id >= 0 && id < n)
        *out = (int)id;
    else
        fault(c, "%s: variant %s out of 0..%d", key, spell(c->arena, v), n - 1);
}

/* Keys of a table other than these are a fault. */
static bool check_keys(struct caller *c, const char *where, const struct table *t,
                       const char *const *names, int n) {
    for (uint32_t i = 0; i < t->pairs; i++) {
        const struct value *key = &t->pair[i].key;
        bool known = false;
        for (int k = 0; k < n; k++)
            known = known || (key->tag == VALUE_STRING && !strcmp(key->text, names[k]));
        if (!known) {
            const char *near = key->tag == VALUE_STRING ? nearest(key->text, names, n) : NULL;
            fault(c, "%sunknown key %s%s%s%s", where, spell(c->arena, key),
                  near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
            return false;
        }
    }
    return true;
}

/* experts: false, or the tiles of the launch that does it all. */
static void check_experts(struct caller *c, struct hopper_variant *out) {
    static const char *const names[] = {"w1_rows", "w2_rows", "tokens", "cluster"};
    const struct value *v = get_text(c->result.table, "experts");
    struct hopper_variant h = {.cluster = 1};
    int64_t n[4] = {128, 128, 64, 1};
    if (!v)
        return;
    if (v->tag == VALUE_FALSE)
        *out = (struct hopper_variant){0};
    if (v->tag == VALUE_FALSE)
        return;
    if (v->tag != VALUE_TABLE || v->table->n) {
        fault(c,
              "experts: expected false or a table with w1_rows, w2_rows, tokens or cluster, "
              "got %s",
              v->tag == VALUE_TABLE ? "an array" : spell(c->arena, v));
        return;
    }
    if (!check_keys(c, "experts: ", v->table, names, 4))
        return;
    for (int i = 0; i < 4; i++) {
        const struct value *field = get_text(v->table, names[i]);
        if (!field)
            continue;
        bool ok = whole(field, &n[i]);
        if (i < 2)
            ok = ok && n[i] >= 16 && n[i] <= 256 && n[i] % 16 == 0;
        else
            ok = ok && (i == 2 ? n[i] == 64 || n[i] == 128 : n[i] == 1 || n[i] == 2);
        if (!ok) {
            fault(c, "experts: %s is %s; it must be %s", names[i], spell(c->arena, field),
                  i < 2    ? "a multiple of 16, 16 to 256"
                  : i == 2 ? "64 or 128"
                           : "1 or 2");
            return;
        }
    }
    h.w1_rows = (int)n[0], h.w2_rows = (int)n[1];
    h.tokens = (int)n[2], h.cluster = (int)n[3];
    *out = h;
}

bool policy_variant(struct policy *p, struct arena *a, struct diags *d,
                    const struct policy_world *w, enum moe_target target, int tokens,
                    struct variant_choice *v) {
    static const char *const names[] = {"router",  "gemm1",   "gemm2",
                                        "shared1", "shared2", "experts"};
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_variant, .target = target, .tokens = tokens};
    int before = d->errors,
        *out[] = {&v->router, &v->gemm1, &v->gemm2, &v->shared1, &v->shared2};
    if (!call_hook(&c, &call))
        return false;
    if (c.result.tag != VALUE_TABLE || c.result.table->n) {
        fault(&c,
              "expected a table with router, gemm1, gemm2, shared1, shared2 or experts, got %s",
              c.result.tag == VALUE_TABLE ? "an array" : spell(a, &c.result));
        return false;
    }
    check_keys(&c, "", c.result.table, names, 6);
    for (int i = 0; i < 5; i++)
        check_variant(&c, names[i], i ? num_gemm_variants : num_router_variants, out[i]);
    check_experts(&c, &v->experts);
    if (d->errors == before && gemm_variants[v->gemm1].bn != gemm_variants[v->gemm2].bn)
        fault(&c, "gemm1 %d has tiles of %d tokens and gemm2 %d of %d; they must be equal",
              v->gemm1, gemm_variants[v->gemm1].bn, v->gemm2, gemm_variants[v->gemm2].bn);
    return d->errors == before;
}

/* ---- constraints ---- */

/* An integer field of a record; `fallback` when it is not there, unless that is INT64_MIN. */
static bool record_int(struct caller *c, const char *where, const struct table *t,
                       const char *key, int64_t least, int64_t most, int64_t fallback,
                       int *out) {
    const struct value *v = get_text(t, key);
    int64_t n = fallback;
    if (!v && fallback != INT64_MIN) {
        *out = (int)fallback;
        return true;
    }
    if (whole(v, &n) && n >= least && n <= most) {
        *out = (int)n;
        return true;
    }
    fault(c, "%s%s: %s out of %lld..%lld", where, key, spell(c->arena, v), (long long)least,
          (long long)most);
    return false;
}

/* The list under a key: records, or nothing. */
static const struct table *record_list(struct caller *c, const char *key) {
    static const struct table none;
    const struct value *v = get_text(c->result.table, key);
    if (!v)
        return &none;
    if (v->tag == VALUE_TABLE && !v->table->pairs)
        return v->table;
    fault(c, "%s: expected a list, got %s", key,
          v->tag == VALUE_TABLE ? "a table with other keys" : spell(c->arena, v));
    return &none;
}

enum { EVERY_LAYER = -1 };

/* The layer of a record: one of the model's, or EVERY_LAYER when it names none. */
static bool record_layer(struct caller *c, const char *where, const struct table *t,
                         int *layer) {
    const struct value *v = get_text(t, "layer");
    int64_t n;
    *layer = EVERY_LAYER;
    if (!v)
        return true;
    if (whole(v, &n) && is_layer(c->world->model, n)) {
        *layer = (int)n;
        return true;
    }
    fault(c, "%slayer: %s is no MoE layer of %s", where, spell(c->arena, v),
          c->world->model->name);
    return false;
}

static const struct table *record_of(struct caller *c, const char *list, const struct table *t,
                                     uint32_t i, const char *const *names, int n,
                                     const char **where) {
    *where = arena_printf(c->arena, "%s[%u].", list, i + 1);
    if (t->items[i].tag == VALUE_TABLE && !t->items[i].table->n)
        return check_keys(c, *where, t->items[i].table, names, n) ? t->items[i].table : NULL;
    fault(c, "%s[%u]: expected a table with layer, %s and %s, got %s", list, i + 1, names[1],
          names[2], spell(c->arena, &t->items[i]));
    return NULL;
}

/* Whether a record about `layer` is about the model's i-th. */
static bool about(const struct model *m, int i, int layer) {
    return layer == EVERY_LAYER || layer == m->moe_layers[i];
}

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Every slot once, however often it is listed. */
static bool add_pin(struct caller *c, const char *where, struct pin pin, int *taken,
                    struct constraints *out) {
    const struct model *m = c->world->model;
    int slots = c->world->cluster->ranks * c->world->slots_per_rank;
    for (int l = 0; l < m->num_moe_layers; l++) {
        int *expert = &taken[(size_t)l * (size_t)slots + (size_t)pin.slot];
        if (!about(m, l, pin.layer))
            continue;
        if (*expert && *expert != pin.expert + 1) {
            fault(c, "%sexpert: %d, but an earlier record pins expert %d to layer %d, slot %d",
                  where, pin.expert, *expert - 1, m->moe_layers[l], pin.slot);
            return false;
        }
        if (!*expert)
            out->pins[out->num_pins++] = (struct pin){m->moe_layers[l], pin.slot, pin.expert};
        *expert = pin.expert + 1;
    }
    return true;
}

static void read_pins(struct caller *c, struct constraints *out) {
    static const char *const names[] = {"layer", "slot", "expert"};
    const struct policy_world *w = c->world;
    const struct table *t = record_list(c, "pins");
    int slots = w->cluster->ranks * w->slots_per_rank;
    size_t layers = (size_t)w->model->num_moe_layers;
    const char *where;
    if (!t->n)
        return;
    out->pins = arena_array(c->arena, struct pin, layers * least(t->n, (size_t)slots));
    int *taken = arena_array(c->arena, int, layers *(size_t)slots); /* by expert - 1 */
    for (uint32_t i = 0; i < t->n; i++) {
        const struct table *r = record_of(c, "pins", t, i, names, 3, &where);
        struct pin pin;
        if (!r || !record_layer(c, where, r, &pin.layer) ||
            !record_int(c, where, r, "slot", 0, slots - 1, INT64_MIN, &pin.slot) ||
            !record_int(c, where, r, "expert", 0, w->model->num_experts - 1, INT64_MIN,
                        &pin.expert) ||
            !add_pin(c, where, pin, taken, out))
            return;
    }
}

static void read_forbidden(struct caller *c, struct constraints *out) {
    static const char *const names[] = {"layer", "expert", "rank"};
    const struct model *m = c->world->model;
    const struct table *t = record_list(c, "forbidden");
    int R = c->world->cluster->ranks;
    size_t layers = (size_t)m->num_moe_layers, all = (size_t)m->num_experts * (size_t)R;
    const char *where;
    if (!t->n)
        return;
    out->forbidden = arena_array(c->arena, struct forbidden, layers * least(t->n, all));
    bool *listed = arena_array(c->arena, bool, layers *all);
    for (uint32_t i = 0; i < t->n; i++) {
        const struct table *r = record_of(c, "forbidden", t, i, names, 3, &where);
        struct forbidden f;
        if (!r || !record_layer(c, where, r, &f.layer) ||
            !record_int(c, where, r, "expert", 0, m->num_experts - 1, INT64_MIN, &f.expert) ||
            !record_int(c, where, r, "rank", 0, R - 1, INT64_MIN, &f.rank))
            return;
        for (int l = 0; l < m->num_moe_layers; l++) {
            bool *is = &listed[(size_t)l * all + (size_t)f.expert * (size_t)R + (size_t)f.rank];
            if (about(m, l, f.layer) && !*is) {
                *is = true;
                out->forbidden[out->num_forbidden++] =
                    (struct forbidden){m->moe_layers[l], f.expert, f.rank};
            }
        }
    }
}

static bool weight_ok(struct caller *c, const char *where, const struct value *v, double *out) {
    double x = v->tag == VALUE_INT ? (double)v->i : v->tag == VALUE_NUMBER ? v->x : -1;
    if (x >= 0 && x <= 1e9) {
        *out = x;
        return true;
    }
    fault(c, "workload_weights%s: %s out of 0..1e9", where, spell(c->arena, v));
    return false;
}

/* A list with one weight per workload, or weights by the workloads' names. */
static void read_weights(struct caller *c, struct constraints *out) {
    const struct value *v = get_text(c->result.table, "workload_weights");
    const struct loads *l = c->world->loads;
    int n = l ? l->num_workloads : 0;
    if (!v)
        return;
    if (v->tag != VALUE_TABLE || (v->table->n && (v->table->pairs || (int)v->table->n != n))) {
        fault(c, "workload_weights: expected a list of %d weights, or names and weights", n);
        return;
    }
    double *weights = arena_array(c->arena, double, n), sum = 0;
    for (int i = 0; i < n; i++) {
        const struct value *x =
            v->table->n ? &v->table->items[i] : get_text(v->table, l->workloads[i].name);
        weights[i] = l->workloads[i].weight;
        if (x && !weight_ok(c, arena_printf(c->arena, "[%d]", i + 1), x, &weights[i]))
            return;
        sum += weights[i];
    }
    for (uint32_t i = 0; i < v->table->pairs; i++) {
        bool known = false;
        for (int k = 0; k < n; k++)
            known = known || (v->table->pair[i].key.tag == VALUE_STRING &&
                              !strcmp(v->table->pair[i].key.text, l->workloads[k].name));
        if (!known) {
            fault(c, "workload_weights: %s is no workload",
                  spell(c->arena, &v->table->pair[i].key));
            return;
        }
    }
    if (n && !(sum > 0))
        fault(c, "workload_weights: at least one must be above 0");
    out->workload_weights = n ? weights : NULL;
}

bool policy_constraints(struct policy *p, struct arena *a, struct diags *d,
                        const struct policy_world *w, struct constraints *out) {
    static const char *const names[] = {"pins", "forbidden", "workload_weights", "move_budget"};
    struct caller c = {.policy = p, .arena = a, .diags = d, .world = w};
    struct policy_call call = {.hook = HOOK_constraints};
    int before = d->errors;
    *out = (struct constraints){.move_budget = -1};
    if (!call_hook(&c, &call))
        return false;
    if (c.result.tag != VALUE_TABLE || c.result.table->n) {
        fault(&c,
              "expected a table with pins, forbidden, workload_weights or move_budget, got %s",
              c.result.tag == VALUE_TABLE ? "an array" : spell(a, &c.result));
        return false;
    }
    if (!check_keys(&c, "", c.result.table, names, 4))
        return false;
    read_pins(&c, out);
    read_forbidden(&c, out);
    read_weights(&c, out);
    record_int(&c, "", c.result.table, "move_budget", 0, 1 << 20, -1, &out->move_budget);
    return d->errors == before;
}
