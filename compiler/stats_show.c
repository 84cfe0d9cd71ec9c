/* moec stats show: how even recorded loads are, expert by expert or on a placement's ranks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "loads.h"

enum { HOTTEST = 4 };

/* Of one layer's loads, over ranks or over slots. */
struct figures {
    double mean, std, max; /* std: of the population */
    double ratio;          /* max / mean; 1 when nothing was counted */
};

struct layer_figures {
    struct figures ranks, slots;
    double *rank_load;         /* [ranks] mean over the windows */
    double *expert_load;       /* [experts] */
    struct layer_pairs *pairs; /* or NULL */
};

struct show {
    struct arena *arena;
    struct diags *diags;
    const struct loads *loads;
    const struct show_options *o;
    const char *const *inputs;
    int ranks, slots;           /* slots: in all */
    const int **expert_of_slot; /* [num_layers][slots], -1: empty */
    const char *where;
    struct layer_figures *layers; /* of the input at hand */
    struct pairs pairs;
    int first, windows; /* its workloads */
    double tokens, ratio, slot_ratio, sum_of_max;
};

static struct figures judge(const double *load, int n) {
    struct figures f = {.ratio = 1};
    double square = 0;
    for (int i = 0; i < n; i++) {
        f.mean += load[i];
        f.max = load[i] > f.max ? load[i] : f.max;
    }
    f.mean /= n;
    for (int i = 0; i < n; i++)
        square += (load[i] - f.mean) * (load[i] - f.mean);
    f.std = sqrt(square / n);
    if (f.mean > 0)
        f.ratio = f.max / f.mean;
    return f;
}

static void add_figures(struct figures *sum, struct figures f, int n) {
    sum->mean += f.mean / n;
    sum->std += f.std / n;
    sum->max += f.max / n;
    sum->ratio += f.ratio / n;
}

/* ---- where the experts are ---- */

static bool check_placed(struct show *s, const struct assignment *as) {
    int experts = s->loads->experts;
    bool *placed = arena_array(s->arena, bool, experts);
    for (int i = 0; i < s->slots; i++) {
        int e = as->expert_of_slot[i];
        if (e >= experts) {
            diag_error(s->diags, as->loc, "layer %d, slot %d: expert %d out of 0..%d",
                       as->layer, i, e, experts - 1);
            return false;
        }
        if (e >= 0)
            placed[e] = true;
    }
    for (int e = 0; e < experts; e++)
        if (!placed[e]) {
            diag_error(s->diags, as->loc, "layer %d: expert %d is in no slot", as->layer, e);
            return false;
        }
    return true;
}

/* How many ranks the file's slots are on. */
static bool choose_ranks(struct show *s, const struct slots *p) {
    s->slots = p->num_slots;
    s->ranks = s->o->ep ? s->o->ep : p->ranks;
    if (!s->ranks)
        diag_error(s->diags, p->loc, "%d slots, but on how many ranks is not said: give --ep",
                   s->slots);
    else if (p->ranks && p->ranks != s->ranks)
        diag_error(s->diags, p->loc, "placed on %d ranks, not on the %d of --ep", p->ranks,
                   s->ranks);
    else if (s->slots % s->ranks)
        diag_error(s->diags, p->loc, "%d slots are not divisible by %d ranks", s->slots,
                   s->ranks);
    else
        return true;
    return false;
}

static bool place_by_file(struct show *s, const struct slots *p) {
    s->where = p->path;
    if (!choose_ranks(s, p))
        return false;
    for (int i = 0; i < p->num_assignments; i++) {
        int row = loads_layer(s->loads, p->assignments[i].layer);
        if (row >= 0 && !check_placed(s, &p->assignments[i]))
            return false;
        if (row >= 0)
            s->expert_of_slot[row] = p->assignments[i].expert_of_slot;
    }
    for (int i = 0; i < s->loads->num_layers; i++)
        if (!s->expert_of_slot[i]) {
            diag_error(s->diags, p->loc, "layer %d is recorded, but not placed",
                       s->loads->layers[i]);
            return false;
        }
    return true;
}

/* Experts in order; empty slots come last. */
static void place_in_order(struct show *s) {
    int experts = s->loads->experts;
    s->slots = (experts + s->ranks - 1) / s->ranks * s->ranks;
    int *order = arena_array(s->arena, int, s->slots);
    for (int i = 0; i < s->slots; i++)
        order[i] = i < experts ? i : -1;
    for (int i = 0; i < s->loads->num_layers; i++)
        s->expert_of_slot[i] = order;
}

/* The ranks that all inputs were recorded on; experts where that is not known. */
static int default_ranks(const struct loads *l) {
    int ranks = l->workloads[0].ranks;
    for (int i = 1; i < l->num_workloads; i++)
        if (l->workloads[i].ranks != ranks)
            return l->experts;
    return ranks > 1 ? ranks : l->experts;
}

static bool place(struct show *s) {
    s->expert_of_slot = arena_array(s->arena, const int *, s->loads->num_layers);
    if (s->o->placement)
        return place_by_file(s, s->o->placement);
    s->ranks = s->o->ep ? s->o->ep : default_ranks(s->loads);
    s->where = "experts in order";
    place_in_order(s);
    return true;
}

/* ---- loads on it ---- */

/* A slot takes its expert's load over the expert's replicas. */
static void project(const struct show *s, int row, const double *count, double *slot_load,
                    double *rank_load) {
    const int *expert_of_slot = s->expert_of_slot[row];
    int replicas[LOADS_MAX_EXPERTS] = {0}, per_rank = s->slots / s->ranks;
    for (int i = 0; i < s->slots; i++)
        if (expert_of_slot[i] >= 0)
            replicas[expert_of_slot[i]]++;
    for (int i = 0; i < s->slots; i++) {
        int e = expert_of_slot[i];
        slot_load[i] = e < 0 ? 0 : count[e] / replicas[e];
        rank_load[i / per_rank] += slot_load[i];
    }
}

/* Means over the input's windows. */
static void judge_layer(struct show *s, int row) {
    const struct loads *l = s->loads;
    struct layer_figures *f = &s->layers[row];
    double *slot_load = arena_array(s->arena, double, s->slots);
    double *rank_load = arena_array(s->arena, double, s->ranks);
    f->rank_load = arena_array(s->arena, double, s->ranks);
    f->expert_load = arena_array(s->arena, double, l->experts);
    f->ranks.ratio = f->slots.ratio = 0;
    for (int w = 0; w < s->windows; w++) {
        const double *count =
            l->workloads[s->first + w].count + (size_t)row * (size_t)l->experts;
        memset(rank_load, 0, sizeof *rank_load * (size_t)s->ranks);
        project(s, row, count, slot_load, rank_load);
        add_figures(&f->ranks, judge(rank_load, s->ranks), s->windows);
        add_figures(&f->slots, judge(slot_load, s->slots), s->windows);
        for (int i = 0; i < s->ranks; i++)
            f->rank_load[i] += rank_load[i] / s->windows;
        for (int e = 0; e < l->experts; e++)
            f->expert_load[e] += count[e] / s->windows;
    }
}

/* Layers without tokens say nothing and are left out of the averages. */
static void judge_input(struct show *s) {
    const struct loads *l = s->loads;
    double max = 0, mean = 0;
    int counted = 0;
    s->layers = arena_array(s->arena, struct layer_figures, l->num_layers);
    s->tokens = s->ratio = s->slot_ratio = 0;
    for (int i = 0; i < l->num_layers; i++) {
        const struct layer_figures *f = &s->layers[i];
        judge_layer(s, i);
        if (f->ranks.mean == 0)
            continue;
        counted++;
        s->ratio += f->ranks.ratio;
        s->slot_ratio += f->slots.ratio;
        max += f->ranks.max;
        mean += f->ranks.mean;
    }
    s->tokens = mean * s->ranks * s->windows;
    s->ratio = counted ? s->ratio / counted : 1;
    s->slot_ratio = counted ? s->slot_ratio / counted : 1;
    s->sum_of_max = counted ? max / mean : 1;
}

/* ---- co-occurrence ---- */

struct pair {
    int a, b; /* a < b */
    uint32_t count;
};

static int by_count(const void *x, const void *y) {
    const struct pair *p = x, *q = y;
    if (p->count != q->count)
        return p->count < q->count ? 1 : -1;
    return p->a != q->a ? p->a - q->a : p->b - q->b;
}

/* The most frequent pairs of a layer. */
static int top_pairs(struct show *s, const struct layer_pairs *l, struct pair **out) {
    int n = 0, experts = s->pairs.experts;
    struct pair *all = arena_array(s->arena, struct pair, pair_index(experts, 0));
    for (int b = 1; b < experts; b++)
        for (int a = 0; a < b; a++) {
            uint32_t count = l->count[pair_index(b, a)];
            if (count)
                all[n++] = (struct pair){a, b, count};
        }
    if (n)
        qsort(all, (size_t)n, sizeof *all, by_count);
    *out = all;
    return n < s->o->pairs ? n : s->o->pairs;
}

/* How often a pair is chosen, over how often it would be if its experts were independent. */
static double lift(const struct layer_pairs *l, const struct pair *p) {
    double a = l->count[pair_index(p->a, p->a)], b = l->count[pair_index(p->b, p->b)];
    return p->count * (double)l->tokens / (a * b);
}

static bool read_pairs(struct show *s, const char *path) {
    const struct model *m = s->o->model;
    if (!s->loads->workloads[s->first].ranks) {
        diag_error(s->diags, (struct loc){0},
                   "--cooccurrence: %s is no folder of a TensorRT-LLM recording", path);
        return false;
    }
    if (!loads_pairs(s->arena, s->diags, path, m ? m->num_experts : 0, s->o->read, &s->pairs))
        return false;
    if (s->pairs.ignored)
        diag_add(s->diags, DIAG_NOTE, (struct loc){0},
                 "%s: %lld ids name no expert and are left out", path, s->pairs.ignored);
    for (int i = 0; i < s->pairs.num_layers; i++) {
        int row = loads_layer(s->loads, s->pairs.layers[i].layer);
        if (row >= 0)
            s->layers[row].pairs = &s->pairs.layers[i];
    }
    return true;
}

/* ---- text ---- */

static void text_hottest(const struct show *s, const struct layer_figures *f) {
    bool *taken = calloc((size_t)s->loads->experts, sizeof *taken);
    double mean = f->ranks.mean * s->ranks / s->loads->experts;
    for (int n = 0; taken && mean > 0 && n < HOTTEST && n < s->loads->experts; n++) {
        int best = -1;
        for (int e = 0; e < s->loads->experts; e++)
            if (!taken[e] && (best < 0 || f->expert_load[e] > f->expert_load[best]))
                best = e;
        taken[best] = true;
        printf("%s%d %.2fx", n ? ", " : "   ", best, f->expert_load[best] / mean);
    }
    free(taken);
}

static void text_pairs(struct show *s, const struct layer_pairs *l) {
    struct pair *pairs;
    int n = l ? top_pairs(s, l, &pairs) : 0;
    for (int i = 0; i < n; i++)
        printf("%18d+%-4d %10u tokens %6.2f%%  %.2f times chance\n", pairs[i].a, pairs[i].b,
               pairs[i].count, 100.0 * pairs[i].count / (double)l->tokens, lift(l, &pairs[i]));
}

static void text_input(struct show *s, const char *name) {
    const struct loads *l = s->loads;
    bool single = s->ranks == l->experts && !s->o->placement;
    printf("%s: %d layers, %d experts, %.6g counts", name, l->num_layers, l->experts,
           s->tokens);
    if (s->windows > 1)
        printf(", means over %d windows", s->windows);
    if (single)
        printf("\neach expert on its own (--ep or --placement for ranks)\n");
    else
        printf("\n%d ranks of %d slots, %s\n", s->ranks, s->slots / s->ranks, s->where);
    printf("%7s %13s %13s %9s %10s", "layer", "mean", "std", "max/mean", "imbalance");
    printf(s->o->per_expert ? " %14s   hottest experts\n" : "\n", "slots max/mean");
    for (int i = 0; i < l->num_layers; i++) {
        const struct layer_figures *f = &s->layers[i];
        printf("%7d %13.6g %13.6g %9.4f %10.4f", l->layers[i], f->ranks.mean, f->ranks.std,
               f->ranks.ratio, f->ranks.ratio - 1);
        if (s->o->per_expert) {
            printf(" %14.4f", f->slots.ratio);
            text_hottest(s, f);
        }
        putchar('\n');
        text_pairs(s, f->pairs);
    }
    printf("%7s %13s %13s %9.4f %10.4f", "average", "", "", s->ratio, s->ratio - 1);
    printf(s->o->per_expert ? " %14.4f\n" : "\n", s->slot_ratio);
    printf("sum of the layers' max over sum of their mean: %.4f\n", s->sum_of_max);
}

/* ---- JSON ---- */

static void json_figures(struct buf *b, struct figures f) {
    buf_printf(b, "\"mean\":%.17g,\"std\":%.17g,\"max_over_mean\":%.17g,\"imbalance\":%.17g",
               f.mean, f.std, f.ratio, f.ratio - 1);
}

static void json_array(struct buf *b, const char *key, const double *v, int n) {
    buf_printf(b, ",\"%s\":[", key);
    for (int i = 0; i < n; i++)
        buf_printf(b, "%s%.17g", i ? "," : "", v[i]);
    buf_printf(b, "]");
}

static void json_pairs(struct show *s, struct buf *b, const struct layer_pairs *l) {
    struct pair *pairs;
    int n = top_pairs(s, l, &pairs);
    buf_printf(b, ",\"tokens\":%lld,\"pairs\":[", l->tokens);
    for (int i = 0; i < n; i++)
        buf_printf(b, "%s{\"a\":%d,\"b\":%d,\"tokens\":%u,\"lift\":%.17g}", i ? "," : "",
                   pairs[i].a, pairs[i].b, pairs[i].count, lift(l, &pairs[i]));
    buf_printf(b, "]");
}

static void json_layer(struct show *s, struct buf *b, int row) {
    const struct layer_figures *f = &s->layers[row];
    buf_printf(b, "%s{\"layer\":%d,", row ? "," : "", s->loads->layers[row]);
    json_figures(b, f->ranks);
    json_array(b, "rank_loads", f->rank_load, s->ranks);
    if (s->o->per_expert) {
        buf_printf(b, ",\"slots\":{");
        json_figures(b, f->slots);
        buf_printf(b, "}");
        json_array(b, "expert_loads", f->expert_load, s->loads->experts);
    }
    if (f->pairs)
        json_pairs(s, b, f->pairs);
    buf_printf(b, "}");
}

static void json_input(struct show *s, struct buf *b, int input, const char *name) {
    buf_printf(b, "%s{\"name\":", input ? "," : "");
    buf_json_string(b, name);
    buf_printf(b,
               ",\"windows\":%d,\"counts\":%.17g,\"max_over_mean\":%.17g,\"imbalance\":%.17g,"
               "\"sum_of_max\":%.17g,\"layers\":[",
               s->windows, s->tokens, s->ratio, s->ratio - 1, s->sum_of_max);
    for (int i = 0; i < s->loads->num_layers; i++)
        json_layer(s, b, i);
    buf_printf(b, "]}");
}

static void json_head(const struct show *s, struct buf *b) {
    buf_printf(b, "{\"experts\":%d,\"ranks\":%d,\"slots_per_rank\":%d,\"placement\":",
               s->loads->experts, s->ranks, s->slots / s->ranks);
    if (s->o->placement)
        buf_json_string(b, s->o->placement->path);
    else
        buf_printf(b, "null");
    buf_printf(b, ",\"inputs\":[");
}

bool stats_show(struct arena *a, struct diags *d, const struct loads *l,
                const char *const *inputs, const struct show_options *o) {
    struct show s = {.arena = a, .diags = d, .loads = l, .o = o, .inputs = inputs};
    struct buf b = {.arena = a};
    if (!place(&s))
        return false;
    json_head(&s, &b);
    for (int i = 0; i < l->num_workloads; i += s.windows) {
        int input = l->workloads[i].input;
        s.first = i;
        for (s.windows = 1;
             i + s.windows < l->num_workloads && l->workloads[i + s.windows].input == input;)
            s.windows++;
        judge_input(&s);
        if (o->pairs && !read_pairs(&s, inputs[input]))
            return false;
        if (o->json)
            json_input(&s, &b, input, l->workloads[i].name);
        else
            text_input(&s, l->workloads[i].name);
        if (!o->json && i + s.windows < l->num_workloads)
            putchar('\n');
    }
    if (o->json)
        printf("%s]}\n", b.data);
    return true;
}
