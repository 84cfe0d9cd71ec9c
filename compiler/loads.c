/* Recorded loads: every format, told apart by content, laid over the model's layers.
 *
 * Each input becomes a struct recording (rows of counts, and which layers they are, if it says
 * so); then the recordings are checked against the model, or without one against each other. */
#include "loads.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_BYTES = 64 << 20, MAX_FIELD = 63 };

struct reader {
    struct arena *arena;
    struct diags *diags;
    const struct model *model; /* or NULL */
    const struct loads_options *options;
};

bool loads_range(struct diags *d, struct loc loc, const struct loads_options *o,
                 long long first, long long last, long long *start, long long *n,
                 int *windows) {
    long long stop = o->iter_stop ? o->iter_stop : last + 1;
    *start = o->iter_start || o->iter_stop ? o->iter_start : first;
    *n = stop - *start;
    if (*n <= 0 || *start < first || stop > last + 1) {
        diag_error(d, loc, "iterations %lld to %lld are asked for, but %lld to %lld are there",
                   *start, stop - 1, first, last);
        return false;
    }
    long long w = o->window ? (*n + o->window - 1) / o->window : 1;
    if (w > LOADS_MAX_WINDOWS) {
        diag_error(d, loc, "%lld iterations are %lld windows of %lld; the limit is %d", *n, w,
                   o->window, LOADS_MAX_WINDOWS);
        return false;
    }
    *windows = (int)w;
    return true;
}

double *loads_zeros(struct arena *a, struct diags *d, struct loc loc, int windows, int rows,
                    int experts) {
    size_t n = (size_t)windows * (size_t)rows * (size_t)experts;
    if (n <= 1 << 27)
        return arena_array(a, double, n);
    diag_error(d, loc, "%d windows of %d layers and %d experts are over a gigabyte", windows,
               rows, experts);
    return NULL;
}

/* For inputs that are one sum. */
static bool refuse_range(struct reader *r, struct loc loc) {
    const struct loads_options *o = r->options;
    if (!o->iter_start && !o->iter_stop && !o->window)
        return true;
    diag_error(r->diags, loc, "one sum of counts: it has no iterations to choose from");
    return false;
}

/* ---- CSV ---- */

struct csv {
    struct source *source;
    const char *at, *end, *line; /* line: where it starts */
    struct loc loc;
    struct buf counts, rows_at;
    int rows, experts;
};

/* One field, up to a comma or the line's end, without the spaces around it. */
static bool csv_field(struct reader *r, struct csv *c, double *out) {
    char text[MAX_FIELD + 1];
    const char *from = c->at, *to = from;
    while (to < c->end && *to != ',' && *to != '\n')
        to++;
    c->at = to;
    while (from < to && (*from == ' ' || *from == '\t'))
        from++;
    while (to > from && strchr(" \t\r", to[-1]))
        to--;
    c->loc.col = (int)(from - c->line) + 1;
    if (to - from > MAX_FIELD) {
        diag_error(r->diags, c->loc, "a count of more than %d characters", MAX_FIELD);
        return false;
    }
    memcpy(text, from, (size_t)(to - from));
    text[to - from] = 0;
    struct node node = {.kind = NODE_SCALAR, .loc = c->loc, .text = text};
    if (node_double(r->diags, &node, "a count", 0, LOADS_MAX_COUNT, out))
        return true;
    if (c->loc.line == 1)
        diag_add(r->diags, DIAG_NOTE, c->loc,
                 "read as CSV: a line per MoE layer, a count per expert, no header");
    return false;
}

static bool csv_line(struct reader *r, struct csv *c) {
    struct loc start = {c->source, c->rows + 1, 1};
    int n = 0;
    double v;
    c->loc = start;
    c->line = c->at;
    for (;; c->at++) {
        if (!csv_field(r, c, &v))
            return false;
        if (++n > LOADS_MAX_EXPERTS) {
            diag_error(r->diags, c->loc, "more than %d counts on a line", LOADS_MAX_EXPERTS);
            return false;
        }
        buf_add(&c->counts, &v, sizeof v);
        if (c->at == c->end || *c->at == '\n')
            break;
    }
    if (c->at < c->end)
        c->at++;
    if (c->rows && n != c->experts) {
        diag_error(r->diags, start, "%d counts, but line 1 has %d", n, c->experts);
        return false;
    }
    c->experts = n;
    c->rows++;
    buf_add(&c->rows_at, &start, sizeof start);
    return true;
}

/* One line per layer, one count per expert. */
static bool read_csv(struct reader *r, struct source *s, struct recording *out) {
    struct csv c = {.source = s,
                    .at = s->text,
                    .end = s->text + s->len,
                    .counts = {.arena = r->arena},
                    .rows_at = {.arena = r->arena}};
    if (!refuse_range(r, out->loc))
        return false;
    while (c.at < c.end)
        if (c.rows == LOADS_MAX_LAYER) {
            diag_error(r->diags, out->loc, "more than %d lines", LOADS_MAX_LAYER);
            return false;
        } else if (!csv_line(r, &c)) {
            return false;
        }
    out->rows = c.rows;
    out->experts = c.experts;
    out->rows_at = (const struct loc *)(const void *)c.rows_at.data;
    out->windows = 1;
    out->count = (double *)(void *)c.counts.data;
    return true;
}

/* ---- JSON ---- */

/* Adds a list of counts to sum[experts]. */
static bool add_row(struct reader *r, const struct node *list, int experts, double *sum) {
    double v;
    if (!node_kind_is(r->diags, list, "a layer's counts", NODE_LIST))
        return false;
    if (list->count != experts) {
        diag_error(r->diags, list->loc, "%d counts, but there are %d experts", list->count,
                   experts);
        return false;
    }
    for (int e = 0; e < experts; e++) {
        if (!node_double(r->diags, list->items[e], "a count", 0, LOADS_MAX_COUNT, &v))
            return false;
        sum[e] += v;
    }
    return true;
}

/* Adds [layers][experts] to a window of the recording. */
static bool add_matrix(struct reader *r, const struct node *list, int window,
                       struct recording *out) {
    if (!node_kind_is(r->diags, list, "the counts of a step", NODE_LIST))
        return false;
    if (list->count != out->rows) {
        diag_error(r->diags, list->loc, "%d layers, but there are %d", list->count, out->rows);
        return false;
    }
    double *sum = out->count + (size_t)window * (size_t)out->rows * (size_t)out->experts;
    for (int i = 0; i < out->rows; i++)
        if (!add_row(r, list->items[i], out->experts, sum + (size_t)i * (size_t)out->experts))
            return false;
    return true;
}

/* The shape of [layers][experts], and the memory for it. */
static bool shape_matrix(struct reader *r, const struct node *list, struct recording *out) {
    if (!node_kind_is(r->diags, list, "counts", NODE_LIST))
        return false;
    const struct node *first = list->count ? list->items[0] : list;
    if (!node_kind_is(r->diags, first, "a layer's counts", NODE_LIST))
        return false;
    if (!first->count || first->count > LOADS_MAX_EXPERTS || list->count > LOADS_MAX_LAYER) {
        diag_error(r->diags, first->loc,
                   "counts must be [layers][experts], with 1 to %d experts and at most %d "
                   "layers",
                   LOADS_MAX_EXPERTS, LOADS_MAX_LAYER);
        return false;
    }
    out->rows = list->count;
    out->experts = first->count;
    struct loc *rows_at = arena_array(r->arena, struct loc, out->rows);
    for (int i = 0; i < out->rows; i++)
        rows_at[i] = list->items[i]->loc;
    out->rows_at = rows_at;
    out->count =
        loads_zeros(r->arena, r->diags, list->loc, out->windows, out->rows, out->experts);
    return out->count;
}

/* ---- SGLang's recorder ---- */

/* [steps][layers][experts], or [layers][experts]: one step. */
static bool read_logical_count(struct reader *r, const struct node *list,
                               struct recording *out) {
    long long start, n;
    if (!node_kind_is(r->diags, list, "logical_count", NODE_LIST))
        return false;
    const struct node *inner = list->count ? list->items[0] : list;
    bool steps = inner->kind == NODE_LIST && inner->count && inner->items[0]->kind == NODE_LIST;
    out->windows = 1;
    if (!steps)
        return refuse_range(r, list->loc) && shape_matrix(r, list, out) &&
               add_matrix(r, list, 0, out);
    if (!loads_range(r->diags, list->loc, r->options, 0, list->count - 1, &start, &n,
                     &out->windows) ||
        !shape_matrix(r, list->items[start], out))
        return false;
    long long window = r->options->window ? r->options->window : n;
    for (long long i = 0; i < n; i++)
        if (!add_matrix(r, list->items[start + i], (int)(i / window), out))
            return false;
    return true;
}

/* The one logical_count in a map or in maps below it; *found counts them. */
static struct node *find_logical_count(struct node *map, int *found) {
    struct node *n = NULL;
    for (int i = 0; i < map->count; i++) {
        if (!strcmp(map->keys[i]->text, "logical_count")) {
            n = map->items[i];
            ++*found;
        } else if (map->items[i]->kind == NODE_MAP) {
            struct node *below = find_logical_count(map->items[i], found);
            n = below ? below : n;
        }
    }
    return n;
}

/* ---- our own ---- */

static bool read_layers(struct reader *r, const struct node *list, struct recording *out) {
    int *layers = arena_array(r->arena, int, list->count);
    if (!node_kind_is(r->diags, list, "layers", NODE_LIST))
        return false;
    if (list->count != out->rows) {
        diag_error(r->diags, list->loc, "layers: %d numbers, but counts has %d rows",
                   list->count, out->rows);
        return false;
    }
    for (int i = 0; i < out->rows; i++)
        if (!node_int(r->diags, list->items[i], "a layer (they must ascend)",
                      i ? layers[i - 1] + 1 : 0, LOADS_MAX_LAYER, &layers[i]))
            return false;
    out->layers = layers;
    return true;
}

static struct node *must_have(struct reader *r, struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    if (!n)
        diag_error(r->diags, map->loc, "no '%s'", key);
    return n;
}

static bool read_own(struct reader *r, struct node *map, struct recording *out) {
    static const char *const legal[] = {"moec_loads", "model",   "name",   "weight",
                                        "layers",     "experts", "counts", "top_k"};
    struct diags *d = r->diags;
    struct node *n, *layers = must_have(r, map, "layers"),
                    *counts = must_have(r, map, "counts"),
                    *experts = must_have(r, map, "experts");
    int version, width;
    if (!node_int(d, map_get(map, "moec_loads"), "moec_loads (the format's version)", 1, 1,
                  &version) ||
        !layers || !counts || !experts || !refuse_range(r, out->loc))
        return false;
    out->windows = 1;
    bool ok = node_int(d, experts, "experts", 1, LOADS_MAX_EXPERTS, &width) &&
              shape_matrix(r, counts, out) && read_layers(r, layers, out);
    if ((n = map_get(map, "model")))
        ok &= node_string(d, n, "model", &out->model);
    if ((n = map_get(map, "name")))
        ok &= node_string(d, n, "name", &out->name);
    if ((n = map_get(map, "weight")))
        ok &= node_double(d, n, "weight", 0, 1e6, &out->weight);
    if ((n = map_get(map, "top_k")))
        ok &= node_int(d, n, "top_k", 1, LOADS_MAX_EXPERTS, &out->experts_per_token);
    ok &= map_unused(d, map, "recorded loads", legal, sizeof legal / sizeof *legal);
    if (ok && out->experts != width) {
        diag_error(d, counts->items[0]->loc, "%d counts, but there are %d experts",
                   out->experts, width);
        diag_add(d, DIAG_NOTE, experts->loc, "experts is set here");
        return false;
    }
    return ok && add_matrix(r, counts, 0, out);
}

/* ---- which it is ---- */

static bool has_key(const struct node *map, const char *key) {
    for (int i = 0; i < map->count; i++)
        if (!strcmp(map->keys[i]->text, key))
            return true;
    return false;
}

/* JSON without counts: says what it is instead. */
static bool refuse_json(struct reader *r, const struct node *root) {
    static const char wanted[] =
        "moec's own {\"moec_loads\": 1, ...} or SGLang's logical_count";
    if (has_key(root, "num_experts_per_token"))
        diag_error(r->diags, root->loc,
                   "meta_info.json of a TensorRT-LLM recording: give the folder it is in");
    else if (has_key(root, "physical_to_logical_map"))
        diag_error(r->diags, root->loc, "a placement, no recorded loads; expected %s", wanted);
    else
        diag_error(r->diags, root->loc, "no recorded loads: expected %s", wanted);
    return false;
}

static bool read_json(struct reader *r, struct source *s, struct recording *out) {
    int found = 0;
    struct node *root = yaml_parse(r->arena, r->diags, s->path, s->text, s->len);
    if (!root || !node_kind_is(r->diags, root, "a file of recorded loads", NODE_MAP))
        return false;
    out->loc = root->loc;
    if (has_key(root, "moec_loads"))
        return read_own(r, root, out);
    struct node *count = find_logical_count(root, &found);
    if (found > 1) {
        diag_error(r->diags, count->loc, "one logical_count is expected, but there are %d",
                   found);
        return false;
    }
    return found ? read_logical_count(r, count, out) : refuse_json(r, root);
}

static bool is_blank(const char *text, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (!strchr(" \t\r\n", text[i]) || !text[i])
            return false;
    return true;
}

static bool read_file(struct reader *r, struct loc at, struct recording *out) {
    struct source *s = arena_array(r->arena, struct source, 1);
    char *text;
    int err = file_read(r->arena, out->path, MAX_BYTES, &text, &s->len);
    if (err) {
        diag_error(r->diags, at, "cannot read %s: %s", out->path,
                   err == EFBIG ? "larger than 64 MiB" : strerror(err));
        return false;
    }
    s->path = out->path;
    s->text = text;
    out->loc = (struct loc){s, 1, 1};
    const char *why = NULL;
    if (is_blank(text, s->len))
        why = "empty: no recorded loads";
    else if (s->len > 4 && !memcmp(text, "PK\3\4", 4))
        why = "a PyTorch file: save its logical_count as JSON, "
              "json.dump({\"logical_count\": x[\"logical_count\"].tolist()}, f)";
    else if (s->len > 8 && text[8] == '{' && memchr(text, 0, 8))
        why = "a safetensors file: give the folder of the TensorRT-LLM recording";
    if (why) {
        out->loc.line = 0; /* bytes are not shown */
        diag_error(r->diags, out->loc, "%s", why);
        return false;
    }
    char first = text[strspn(text, " \t\r\n")];
    return first == '{' || first == '[' ? read_json(r, s, out) : read_csv(r, s, out);
}

/* A sum may be too large where no count was. */
static bool check_sums(struct reader *r, const struct recording *c) {
    size_t row = (size_t)c->experts, n = (size_t)c->windows * (size_t)c->rows * row;
    for (size_t i = 0; i < n; i++)
        if (c->count[i] > LOADS_MAX_COUNT) {
            diag_error(r->diags, c->loc, "row %d, expert %d: more than %g tokens in sum",
                       (int)(i / row % (size_t)c->rows), (int)(i % row), LOADS_MAX_COUNT);
            return false;
        }
    return true;
}

static const char *base_name(struct arena *a, const char *path) {
    char *name = arena_strdup(a, path);
    size_t n = strlen(name);
    while (n > 1 && name[n - 1] == '/')
        name[--n] = 0;
    char *slash = strrchr(name, '/');
    return slash && slash[1] ? slash + 1 : name;
}

static bool read_input(struct reader *r, const char *path, struct loc at,
                       struct recording *out) {
    struct stat st;
    *out = (struct recording){.path = path, .weight = 1};
    if (stat(path, &st)) {
        diag_error(r->diags, at, "cannot read %s: %s", path, strerror(errno));
        return false;
    }
    if (S_ISDIR(st.st_mode) && access(path_join(r->arena, path, "meta_info.json"), F_OK)) {
        diag_error(
            r->diags, at,
            "%s: a folder without meta_info.json is no TensorRT-LLM recording; files in it "
            "must be named one by one",
            path);
        return false;
    }
    bool ok = S_ISDIR(st.st_mode)
                  ? loads_folder(r->arena, r->diags, path, r->model ? r->model->num_experts : 0,
                                 r->options, out)
                  : read_file(r, at, out);
    if (!out->name)
        out->name = base_name(r->arena, path);
    return ok && check_sums(r, out);
}

/* ---- rows to layers ---- */

static int find_layer(const int *layers, int n, int layer) {
    int low = 0, high = n;
    while (low < high) {
        int mid = (low + high) / 2;
        if (layers[mid] < layer)
            low = mid + 1;
        else
            high = mid;
    }
    return low < n && layers[low] == layer ? low : -1;
}

int loads_layer(const struct loads *l, int layer) {
    return find_layer(l->layers, l->num_layers, layer);
}

static struct loc row_loc(const struct recording *c, int row) {
    return c->rows_at && row < c->rows ? c->rows_at[row] : c->loc;
}

static bool row_is_zero(const struct recording *c, int row) {
    for (int w = 0; w < c->windows; w++)
        for (int e = 0; e < c->experts; e++)
            if (c->count[((size_t)w * (size_t)c->rows + (size_t)row) * (size_t)c->experts +
                         (size_t)e] > 0)
                return false;
    return true;
}

/* MoE layers that are no MTP layers. */
static int num_decoder(const struct model *m) {
    int n = 0;
    while (n < m->num_moe_layers && m->moe_layers[n] < m->num_hidden_layers)
        n++;
    return n;
}

/* A row for every decoder layer, dense ones included, as SGLang counts: theirs hold nothing. */
static bool has_dense_rows(const struct model *m, const struct recording *c) {
    if (c->rows != m->num_hidden_layers || num_decoder(m) == c->rows)
        return false;
    for (int i = 0; i < c->rows; i++)
        if (find_layer(m->moe_layers, m->num_moe_layers, i) < 0 && !row_is_zero(c, i))
            return false;
    return true;
}

/* Rows that carry the model's numbers. */
static bool rows_by_number(struct reader *r, const struct recording *c, int *row_of) {
    const struct model *m = r->model;
    bool ok = true;
    for (int i = 0; i < c->rows; i++) {
        int at = find_layer(m->moe_layers, m->num_moe_layers, c->layers[i]);
        if (at < 0) {
            diag_error(r->diags, row_loc(c, i),
                       "layer %d is recorded, but is no MoE layer of %s; those are %s",
                       c->layers[i], m->name,
                       layer_ranges(r->arena, m->moe_layers, m->num_moe_layers));
            ok = false;
        } else {
            row_of[at] = i;
        }
    }
    return ok;
}

/* Rows that do not say which layers they are: row_of[i] is MoE layer i's row, or -1. */
static bool rows_in_order(struct reader *r, const struct recording *c, int *row_of) {
    const struct model *m = r->model;
    int decoder = num_decoder(m);
    bool dense = has_dense_rows(m, c);
    if (!dense && c->rows != decoder && c->rows != m->num_moe_layers) {
        diag_error(r->diags, row_loc(c, c->rows < decoder ? c->rows - 1 : decoder),
                   "%d %s recorded, but %s has %d MoE layers: %s", c->rows,
                   c->rows == 1 ? "layer is" : "layers are", m->name, m->num_moe_layers,
                   layer_ranges(r->arena, m->moe_layers, m->num_moe_layers));
        return false;
    }
    for (int i = 0; i < (dense ? decoder : c->rows); i++)
        row_of[i] = dense ? m->moe_layers[i] : i;
    return true;
}

/* Layers that lack a row: an error, unless they are MTP layers. */
static bool check_missing(struct reader *r, const struct recording *c, const int *row_of) {
    const struct model *m = r->model;
    int n = 0, decoder = num_decoder(m),
        *missing = arena_array(r->arena, int, m->num_moe_layers);
    for (int i = 0; i < decoder; i++)
        if (row_of[i] < 0)
            missing[n++] = m->moe_layers[i];
    if (n) {
        diag_error(r->diags, c->loc, "MoE layers of %s that are not recorded: %s", m->name,
                   layer_ranges(r->arena, missing, n));
        return false;
    }
    for (int i = decoder; i < m->num_moe_layers; i++)
        if (row_of[i] < 0)
            missing[n++] = m->moe_layers[i];
    if (n)
        diag_add(r->diags, DIAG_NOTE, c->loc,
                 "MTP layers are not recorded and weigh evenly: %s",
                 layer_ranges(r->arena, missing, n));
    return true;
}

static bool check_model(struct reader *r, const struct recording *c, int *row_of) {
    const struct model *m = r->model;
    if (c->experts != m->num_experts) {
        diag_error(r->diags, row_loc(c, 0), "%d counts, but %s has %d experts", c->experts,
                   m->name, m->num_experts);
        diag_add(r->diags, DIAG_NOTE, m->at.num_experts, "num_experts is set here");
        return false;
    }
    if (c->model && strcmp(c->model, m->name))
        diag_add(r->diags, DIAG_WARNING, c->loc, "recorded with the model %s, not %s", c->model,
                 m->name);
    for (int i = 0; i < m->num_moe_layers; i++)
        row_of[i] = -1;
    return (c->layers ? rows_by_number : rows_in_order)(r, c, row_of) &&
           check_missing(r, c, row_of);
}

static const int *layers_of(struct arena *a, const struct recording *c) {
    int *layers = arena_array(a, int, c->rows);
    for (int i = 0; i < c->rows; i++)
        layers[i] = c->layers ? c->layers[i] : i;
    return layers;
}

/* Without a model all inputs must have the first one's shape. */
static bool check_first(struct reader *r, const struct loads *l, const struct recording *c,
                        const struct recording *first, int *row_of) {
    const int *layers = layers_of(r->arena, c);
    bool same = c->rows == l->num_layers && c->experts == l->experts;
    for (int i = 0; same && i < c->rows; i++) {
        row_of[i] = i;
        same = layers[i] == l->layers[i];
    }
    if (!same) {
        diag_error(r->diags, c->loc,
                   "layers %s and %d experts are recorded here; give a model to say which rows "
                   "belong together",
                   layer_ranges(r->arena, layers, c->rows), c->experts);
        diag_add(r->diags, DIAG_NOTE, first->loc, "layers %s and %d experts here",
                 layer_ranges(r->arena, l->layers, l->num_layers), l->experts);
    }
    return same;
}

/* ---- recordings to workloads ---- */

static void warn_zeros(struct reader *r, const struct loads *l, const struct recording *c,
                       const int *row_of) {
    int n = 0, *zeros = arena_array(r->arena, int, l->num_layers);
    for (int i = 0; i < l->num_layers; i++)
        if (row_of[i] >= 0 && row_is_zero(c, row_of[i]))
            zeros[n++] = l->layers[i];
    if (n)
        diag_add(r->diags, DIAG_WARNING, c->loc, "layers without tokens weigh evenly: %s",
                 layer_ranges(r->arena, zeros, n));
}

static void add_workload(struct reader *r, struct loads *l, const struct recording *c,
                         int input, int window, const int *row_of) {
    size_t row = (size_t)c->experts;
    struct workload *w = &l->workloads[l->num_workloads++];
    *w = (struct workload){c->name, c->weight, input, c->ranks,
                           arena_array(r->arena, double, (size_t)l->num_layers *row)};
    for (int i = 0; i < l->num_layers; i++)
        if (row_of[i] >= 0)
            memcpy(w->count + (size_t)i * row,
                   c->count + ((size_t)window * (size_t)c->rows + (size_t)row_of[i]) * row,
                   row * sizeof(double));
}

/* The result's layers: the model's, or the first input's. */
static struct loads *make_loads(struct reader *r, const struct recording *first, int windows) {
    struct loads *l = arena_array(r->arena, struct loads, 1);
    const struct model *m = r->model;
    l->num_layers = m ? m->num_moe_layers : first->rows;
    l->experts = m ? m->num_experts : first->experts;
    l->layers = arena_array(r->arena, int, l->num_layers);
    memcpy(l->layers, m ? m->moe_layers : layers_of(r->arena, first),
           sizeof(int) * (size_t)l->num_layers);
    l->workloads = arena_array(r->arena, struct workload, windows);
    return l;
}

static bool check_top_k(struct reader *r, struct loads *l, const struct recording *c) {
    int k = c->experts_per_token, want = r->model ? r->model->num_experts_per_tok : 0;
    if (!k)
        return true;
    if (want && k != want) {
        diag_error(r->diags, c->loc, "%d experts per token are recorded, but %s has %d", k,
                   r->model->name, want);
        return false;
    }
    l->experts_per_token = k;
    return true;
}

struct loads *loads_read(struct arena *a, struct diags *d, const char *const *paths,
                         const struct loc *at, int n, const struct model *m,
                         const struct loads_options *o) {
    struct reader r = {a, d, m, o};
    struct recording *all = arena_array(a, struct recording, n);
    int before = d->errors, windows = 0;
    for (int i = 0; i < n; i++)
        if (read_input(&r, paths[i], at ? at[i] : (struct loc){0}, &all[i]))
            windows += all[i].windows;
    if (d->errors != before || !n)
        return NULL;
    struct loads *l = make_loads(&r, &all[0], windows);
    int *row_of = arena_array(a, int, l->num_layers);
    for (int i = 0; i < n; i++) {
        const struct recording *c = &all[i];
        if (!(m ? check_model(&r, c, row_of) : check_first(&r, l, c, &all[0], row_of)) ||
            !check_top_k(&r, l, c))
            continue;
        warn_zeros(&r, l, c, row_of);
        for (int w = 0; w < c->windows; w++)
            add_workload(&r, l, c, i, w, row_of);
    }
    return d->errors == before ? l : NULL;
}
