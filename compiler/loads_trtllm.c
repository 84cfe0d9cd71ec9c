/* A TensorRT-LLM statistics folder: meta_info.json, and for every rank a safetensors file with one
 * tensor of counts, int64 [num_experts], per iteration and layer, named "ITERATION_LAYER"; where
 * asked for also rank{r}_raw.safetensors, with the chosen ids [tokens, experts per token].
 *
 * The counts of all ranks are summed. With an EPLB on they are counts of slots: they are put back
 * together through the balancer's assignments. A rank file that lacks what another has is an
 * error, not zero: half a recording would look like an imbalance. */
#include "loads.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../runtime/tool.h"

enum { MAX_RANKS = 4096, MAX_META = 1 << 20, MAX_KEYS = 1 << 24 };

struct folder {
    struct arena *arena;
    struct diags *diags;
    const char *path;
    struct loc loc;  /* of meta_info.json */
    struct loc file; /* of the rank file being read */
    struct loc entries_at, top_k_at;
    int entries; /* counts in a tensor: experts, or slots */
    int experts; /* after mapping */
    int top_k, ranks;
    int *layers, num_layers;
    long long first, last; /* iterations that are there */
    long long start, n;    /* those that are read */
    long long window;
    int windows;
    const struct loads_options *options;
    const char *suffix;         /* of the files: "" or "_raw" */
    const int **expert_of_slot; /* [num_layers], or NULL: counts are of experts */
    double *count;              /* "": [windows][num_layers][experts] */
    struct pairs *pairs;        /* "_raw" */
};

/* ---- meta_info.json ---- */

static bool read_meta(struct folder *f) {
    static const char *const legal[] = {"num_experts", "num_experts_per_token"};
    struct diags *d = f->diags;
    struct node *root = yaml_read(f->arena, d, path_join(f->arena, f->path, "meta_info.json"));
    if (!root || !node_kind_is(d, root, "meta_info.json", NODE_MAP))
        return false;
    struct node *entries = map_get(root, legal[0]), *top_k = map_get(root, legal[1]);
    f->loc = root->loc;
    if (!entries || !top_k) {
        diag_error(d, root->loc, "no '%s'", legal[entries ? 1 : 0]);
        return false;
    }
    f->entries_at = entries->loc;
    f->top_k_at = top_k->loc;
    bool ok = node_int(d, entries, legal[0], 1, LOADS_MAX_EXPERTS * 1024, &f->entries) &
              node_int(d, top_k, legal[1], 1, LOADS_MAX_EXPERTS, &f->top_k);
    for (int i = 0; i < root->count; i++)
        if (!root->items[i]->used)
            diag_add(d, DIAG_NOTE, root->keys[i]->loc, "'%.60s' is not read",
                     root->keys[i]->text);
    return ok;
}

/* ---- which ranks ---- */

/* R of "rankR.safetensors" or "rankR_raw.safetensors", or -1. */
static int rank_of(const char *name, const char *suffix) {
    char again[64];
    if (strncmp(name, "rank", 4) || strlen(name) > 40)
        return -1;
    long rank = strtol(name + 4, NULL, 10);
    if (rank < 0 || rank >= MAX_RANKS)
        return -1;
    snprintf(again, sizeof again, "rank%ld%s.safetensors", rank, suffix);
    return strcmp(again, name) ? -1 : (int)rank;
}

static bool find_ranks(struct folder *f) {
    bool *there = arena_array(f->arena, bool, MAX_RANKS);
    struct dirent *e;
    int files = 0;
    DIR *dir = opendir(f->path);
    if (!dir) {
        diag_error(f->diags, f->loc, "cannot read %s: %s", f->path, strerror(errno));
        return false;
    }
    while ((e = readdir(dir))) {
        int rank = rank_of(e->d_name, f->suffix);
        files += rank >= 0;
        if (rank >= 0)
            there[rank] = true;
        f->ranks = rank >= f->ranks ? rank + 1 : f->ranks;
    }
    closedir(dir);
    for (int i = 0; i < f->ranks; i++)
        if (!there[i]) {
            diag_error(f->diags, f->loc, "rank%d%s.safetensors is missing: there are %d of %d",
                       i, f->suffix, files, f->ranks);
            return false;
        }
    if (!files)
        diag_error(f->diags, f->loc, "no rank0%s.safetensors beside it", f->suffix);
    return files;
}

/* ---- one rank's file ---- */

/* "ITERATION_LAYER", both without leading zeros. */
static bool parse_key(const char *name, long long *iteration, int *layer) {
    char again[64], *end;
    errno = 0;
    *iteration = strtoll(name, &end, 10);
    if (errno || *end != '_' || *iteration < 0 || *iteration > 1LL << 53 || strlen(name) > 40)
        return false;
    long long l = strtoll(end + 1, NULL, 10);
    if (errno || l < 0 || l > LOADS_MAX_LAYER)
        return false;
    *layer = (int)l;
    snprintf(again, sizeof again, "%lld_%d", *iteration, *layer);
    return !strcmp(again, name);
}

static int by_number(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

/* Layers and iterations of the first rank; the others must have the same. */
static bool scan_keys(struct folder *f, const moert_tool_file *t) {
    int n = moert_tool_count(t), distinct = 0;
    if (!n || n > MAX_KEYS) {
        diag_error(f->diags, f->file, n ? "too many tensors" : "no tensors in it");
        return false;
    }
    f->layers = arena_array(f->arena, int, n);
    for (int i = 0; i < n; i++) {
        long long it;
        if (!parse_key(moert_tool_name(t, i), &it, &f->layers[i])) {
            diag_error(f->diags, f->file,
                       "tensor '%.60s': expected a name like 12_3, iteration and layer",
                       moert_tool_name(t, i));
            return false;
        }
        f->first = !i || it < f->first ? it : f->first;
        f->last = !i || it > f->last ? it : f->last;
    }
    qsort(f->layers, (size_t)n, sizeof *f->layers, by_number);
    for (int i = 0; i < n; i++)
        if (!i || f->layers[i] != f->layers[i - 1])
            f->layers[distinct++] = f->layers[i];
    f->num_layers = distinct;
    return true;
}

static bool get_tensor(struct folder *f, const moert_tool_file *t, long long iteration,
                       int layer, struct moert_tool_tensor *out) {
    char key[64];
    snprintf(key, sizeof key, "%lld_%d", iteration, layer);
    if (moert_tool_find(t, key, out) == MOERT_OK)
        return true;
    diag_error(f->diags, f->file,
               "no tensor %s: iterations must follow each other and hold the same layers on "
               "every rank (%lld to %lld, layers %s)",
               key, f->first, f->last, layer_ranges(f->arena, f->layers, f->num_layers));
    return false;
}

/* Every iteration has every layer, and nothing else is there. */
static bool check_keys(struct folder *f, const moert_tool_file *t) {
    struct moert_tool_tensor tensor;
    long long n = moert_tool_count(t), it;
    for (it = f->first; it <= f->last; it++)
        for (int l = 0; l < f->num_layers; l++)
            if (!get_tensor(f, t, it, f->layers[l], &tensor))
                return false;
    if ((f->last - f->first + 1) * f->num_layers == n)
        return true;
    for (int i = 0, layer; i < n; i++)
        if (!parse_key(moert_tool_name(t, i), &it, &layer) || it < f->first || it > f->last ||
            !bsearch(&layer, f->layers, (size_t)f->num_layers, sizeof layer, by_number)) {
            diag_error(f->diags, f->file, "tensor '%.60s' is not in rank0%s.safetensors",
                       moert_tool_name(t, i), f->suffix);
            break;
        }
    return false;
}

static bool check_tensor(struct folder *f, const struct moert_tool_tensor *t) {
    if (strcmp(t->dtype, "I64"))
        diag_error(f->diags, f->file, "tensor %s has type %s; counts are I64", t->name,
                   t->dtype);
    else if (t->rank != 1 || t->shape[0] != f->entries)
        diag_error(f->diags, f->file, "tensor %s must have shape [%d], as num_experts says",
                   t->name, f->entries);
    else
        return true;
    return false;
}

/* Adds one tensor to a layer's counts. */
static bool add_tensor(struct folder *f, const struct moert_tool_tensor *t, int layer,
                       double *sum) {
    const int *map = f->expert_of_slot ? f->expert_of_slot[layer] : NULL;
    if (!check_tensor(f, t))
        return false;
    for (int i = 0; i < f->entries; i++) {
        int64_t v;
        memcpy(&v, (const char *)t->data + 8 * (size_t)i, sizeof v);
        if (v < 0 || (double)v > LOADS_MAX_COUNT) {
            diag_error(f->diags, f->file, "tensor %s, entry %d: %lld is no count of tokens",
                       t->name, i, (long long)v);
            return false;
        }
        sum[map ? map[i] : i] += (double)v;
    }
    return true;
}

/* ---- raw ids ---- */

/* Id i of a tensor as an expert, or -1. */
static int expert_at(const struct folder *f, const struct moert_tool_tensor *t, int layer,
                     size_t i) {
    const int *map = f->expert_of_slot ? f->expert_of_slot[layer] : NULL;
    int32_t narrow;
    int64_t id;
    if (!strcmp(t->dtype, "I32")) {
        memcpy(&narrow, (const char *)t->data + 4 * i, 4);
        id = narrow;
    } else {
        memcpy(&id, (const char *)t->data + 8 * i, 8);
    }
    if (id < 0 || id >= f->entries)
        return -1;
    return map ? map[id] : (int)id;
}

static void add_token(struct folder *f, const int *chosen, int n, struct layer_pairs *p) {
    p->tokens += n > 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++) {
            int a = chosen[i], b = chosen[j];
            p->count[a > b ? pair_index(a, b) : pair_index(b, a)]++;
        }
    f->pairs->ignored += f->top_k - n;
}

/* Adds [tokens][top_k] ids to a layer's pairs. */
static bool add_ids(struct folder *f, const struct moert_tool_tensor *t, int layer) {
    int chosen[LOADS_MAX_EXPERTS];
    if (strcmp(t->dtype, "I32") && strcmp(t->dtype, "I64")) {
        diag_error(f->diags, f->file, "tensor %s has type %s; ids are I32 or I64", t->name,
                   t->dtype);
        return false;
    }
    if (t->rank != 2 || t->shape[1] != f->top_k) {
        diag_error(f->diags, f->file,
                   "tensor %s must have shape [tokens, %d], as num_experts_per_token says",
                   t->name, f->top_k);
        return false;
    }
    for (int64_t token = 0; token < t->shape[0]; token++) {
        int n = 0;
        for (int k = 0; k < f->top_k; k++) {
            size_t at = (size_t)token * (size_t)f->top_k + (size_t)k;
            int e = expert_at(f, t, layer, at);
            if (e >= 0)
                chosen[n++] = e;
        }
        add_token(f, chosen, n, &f->pairs->layers[layer]);
    }
    return true;
}

static bool add_raw_rank(struct folder *f, const moert_tool_file *t) {
    struct moert_tool_tensor tensor;
    for (long long i = 0; i < f->n; i++)
        for (int l = 0; l < f->num_layers; l++)
            if (!get_tensor(f, t, f->start + i, f->layers[l], &tensor) ||
                !add_ids(f, &tensor, l))
                return false;
    return true;
}

static bool add_rank(struct folder *f, const moert_tool_file *t) {
    struct moert_tool_tensor tensor;
    for (long long i = 0; i < f->n; i++) {
        size_t window = (size_t)(i / f->window);
        for (int l = 0; l < f->num_layers; l++) {
            double *sum =
                f->count + (window * (size_t)f->num_layers + (size_t)l) * (size_t)f->experts;
            if (!get_tensor(f, t, f->start + i, f->layers[l], &tensor) ||
                !add_tensor(f, &tensor, l, sum))
                return false;
        }
    }
    return true;
}

/* ---- slots to experts ---- */

static const struct assignment *assignment_of(const struct folder *f, int layer) {
    for (int i = 0; i < f->options->num_assignments; i++)
        if (f->options->assignments[i].layer == layer)
            return &f->options->assignments[i];
    return NULL;
}

/* Recorded with the balancer that the assignments are of: counts are then per slot. */
static bool map_slots(struct folder *f) {
    int most = 0;
    f->expert_of_slot = arena_array(f->arena, const int *, f->num_layers);
    for (int l = 0; l < f->num_layers; l++) {
        const struct assignment *as = assignment_of(f, f->layers[l]);
        if (!as) {
            diag_error(f->diags, f->file,
                       "layer %d is recorded in slots, but the load balancer assigns none",
                       f->layers[l]);
            return false;
        }
        f->expert_of_slot[l] = as->expert_of_slot;
        for (int i = 0; i < f->entries; i++) {
            int e = as->expert_of_slot[i];
            most = e > most ? e : most;
            if (e < 0 || (f->experts && e >= f->experts)) {
                diag_error(f->diags, as->loc, "layer %d, slot %d: expert %d is none",
                           f->layers[l], i, e);
                return false;
            }
        }
    }
    f->experts = f->experts ? f->experts : most + 1;
    return true;
}

static bool choose_experts(struct folder *f) {
    const struct loads_options *o = f->options;
    if (o->num_assignments && o->num_slots == f->entries)
        return map_slots(f);
    if (f->experts && f->experts != f->entries) {
        diag_error(f->diags, f->entries_at, "num_experts: %d, but the model has %d experts%s",
                   f->entries, f->experts,
                   f->entries < f->experts ? ""
                                           : "; if a load balancer was on while recording, "
                                             "these are slots, and its file is needed");
        if (o->num_assignments)
            diag_add(f->diags, DIAG_NOTE, o->assignments[0].loc,
                     "this load balancer has %d slots", o->num_slots);
        return false;
    }
    if (f->entries > LOADS_MAX_EXPERTS) {
        diag_error(f->diags, f->entries_at, "num_experts: %d; at most %d are possible",
                   f->entries, LOADS_MAX_EXPERTS);
        return false;
    }
    f->experts = f->entries;
    return true;
}

/* ---- the whole ---- */

static void plan_pairs(struct folder *f) {
    f->pairs->experts = f->experts;
    f->pairs->num_layers = f->num_layers;
    f->pairs->layers = arena_array(f->arena, struct layer_pairs, f->num_layers);
    for (int l = 0; l < f->num_layers; l++)
        f->pairs->layers[l] = (struct layer_pairs){
            .layer = f->layers[l],
            .count = arena_array(f->arena, uint32_t, pair_index(f->experts, 0))};
}

/* From the first rank's file: the shape of the whole. */
static bool plan_sum(struct folder *f, const moert_tool_file *t) {
    if (!scan_keys(f, t) || !choose_experts(f) ||
        !loads_range(f->diags, f->file, f->options, f->first, f->last, &f->start, &f->n,
                     &f->windows))
        return false;
    f->window = f->options->window ? f->options->window : f->n;
    if (f->pairs) {
        plan_pairs(f);
        return true;
    }
    f->count = loads_zeros(f->arena, f->diags, f->file, f->windows, f->num_layers, f->experts);
    return f->count;
}

static struct loc file_loc(struct arena *a, const char *path) {
    struct source *s = arena_array(a, struct source, 1);
    s->path = path;
    return (struct loc){s, 0, 0};
}

static bool read_rank(struct folder *f, int rank) {
    moert_tool_file *t;
    const char *name = arena_printf(f->arena, "rank%d%s.safetensors", rank, f->suffix);
    name = path_join(f->arena, f->path, name);
    f->file = file_loc(f->arena, name);
    if (moert_tool_open(name, &t) != MOERT_OK) {
        size_t n = strlen(name);
        const char *why = moert_last_error(); /* most begin with the path */
        diag_error(f->diags, f->file, "%s",
                   !strncmp(why, name, n) && why[n] == ':' ? why + n + 2 : why);
        return false;
    }
    bool ok = (rank || plan_sum(f, t)) && check_keys(f, t) &&
              (f->pairs ? add_raw_rank : add_rank)(f, t);
    moert_tool_close(t);
    return ok;
}

static bool read_folder(struct folder *f) {
    if (!read_meta(f) || !find_ranks(f))
        return false;
    for (int rank = 0; rank < f->ranks; rank++)
        if (!read_rank(f, rank))
            return false;
    return true;
}

bool loads_folder(struct arena *a, struct diags *d, const char *path, int experts,
                  const struct loads_options *o, struct recording *out) {
    struct folder f = {
        .arena = a, .diags = d, .path = path, .experts = experts, .options = o, .suffix = ""};
    out->loc = file_loc(a, path);
    if (!read_folder(&f))
        return false;
    out->rows = f.num_layers;
    out->experts = f.experts;
    out->layers = f.layers;
    out->ranks = f.ranks;
    out->experts_per_token = f.top_k;
    out->windows = f.windows;
    out->count = f.count;
    return true;
}

bool loads_pairs(struct arena *a, struct diags *d, const char *path, int experts,
                 const struct loads_options *o, struct pairs *out) {
    struct folder f = {.arena = a,
                       .diags = d,
                       .path = path,
                       .experts = experts,
                       .options = o,
                       .suffix = "_raw",
                       .pairs = out};
    *out = (struct pairs){0};
    return read_folder(&f);
}
