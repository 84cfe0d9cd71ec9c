/* moec explain on balancing: what was recorded, which experts are hot and what they got for it, and
 * whether the placement is worth its memory and its moves. */
#include "explain.h"

#include <stdlib.h>
#include <string.h>

/* Less than this part of a step is not worth the machinery: predictions differ more. */
#define WORTH 0.01
enum { HOTTEST = 8 };

/* ---- the plan's layers as the cost model wants them ---- */

static void model_of_class(struct view *v, const struct moe_plan_class *c, int layers,
                           struct model *out) {
    *out = (struct model){.name = v->model,
                          .num_moe_layers = layers,
                          .hidden_size = c->hidden,
                          .moe_intermediate_size = c->inter,
                          .num_experts = c->experts,
                          .num_experts_per_tok = c->topk,
                          .activation = (enum moe_activation)c->activation};
    out->router.n_group = c->n_group;
    out->router.topk_group = c->topk_group;
    out->shared.intermediate_size = c->shared_inter;
    out->weights.bias = c->has_bias;
}

static enum dispatch dispatch_of(const struct view *v) {
    return (enum dispatch)v->plan.balance[0].dispatch;
}

static void in_order(int experts, int ranks, int slots, int *out) {
    for (int i = 0; i < ranks * slots; i++)
        out[i] = i < experts ? i : -1;
}

/* The plan's layers of a class. */
static void planned(struct view *v, int index, struct cost_placement *p) {
    const struct moe_plan_class *c = &v->plan.classes[index];
    int n = (int)v->plan.count[MOE_SECTION_LAYER], total = c->ranks * c->slots_per_rank;
    int *layers = arena_array(&v->arena, int, n);
    *p = (struct cost_placement){.ranks = c->ranks,
                                 .slots_per_rank = c->slots_per_rank,
                                 .dispatch = dispatch_of(v),
                                 .loads = v->loads};
    p->expert_of_slot = arena_array(&v->arena, const int *, n);
    p->share_of_slot = arena_array(&v->arena, const double *, n);
    for (int i = 0; i < n; i++) {
        const struct moe_plan_layer *l = &v->plan.layers[i];
        double *share = arena_array(&v->arena, double, total);
        if (l->class_index != index)
            continue;
        for (int s = 0; s < total; s++)
            share[s] = v->plan.tables[l->share_of_slot + s] / (double)MOE_SHARE_ONE;
        layers[p->num_layers] = l->layer;
        p->expert_of_slot[p->num_layers] = v->plan.tables + l->expert_of_slot;
        p->share_of_slot[p->num_layers++] = share;
    }
    p->layers = layers;
}

static void add_way(struct view *v, struct balance_view *b, int way,
                    const struct cost_placement *p) {
    struct way *w = &b->ways[way];
    struct cost c;
    w->slots_per_rank = p->slots_per_rank;
    w->n = cost_placed(&v->arena, &b->base, p, &w->setups);
    cost_layers(w->setups, w->n, 1, &c);
    w->imbalance = c.imbalance;
}

/* The same layers, experts in order. */
static void add_in_order(struct view *v, struct balance_view *b, struct cost_placement p) {
    int experts = b->model.num_experts, slots = (experts + p.ranks - 1) / p.ranks;
    int *order = arena_array(&v->arena, int, p.ranks *slots);
    const int **all = arena_array(&v->arena, const int *, p.num_layers);
    in_order(experts, p.ranks, slots, order);
    for (int i = 0; i < p.num_layers; i++)
        all[i] = order;
    p.slots_per_rank = slots;
    p.expert_of_slot = all;
    p.share_of_slot = NULL;
    add_way(v, b, WAY_in_order, &p);
}

/* What the policy makes of as many slots as there are experts. A policy of one's own may count on
 * the slots, so only shipped ones are asked. */
static void add_rearranged(struct view *v, struct balance_view *b, struct cost_placement p) {
    struct diags quiet = {.arena = &v->arena};
    if (!v->dep || !v->loads || v->dep->policy_path || !b->redundant_slots)
        return;
    struct deployment dep = *v->dep;
    dep.num_slots = dep.num_assignments = dep.num_start = 0;
    dep.moves = -1;
    const struct placement *r = place_layers(&v->arena, &quiet, &dep, core_count());
    if (!r)
        return;
    const int **all = arena_array(&v->arena, const int *, p.num_layers);
    const double **share = arena_array(&v->arena, const double *, p.num_layers);
    int total = r->ranks * r->slots_per_rank, n = 0;
    for (int i = 0; i < r->num_layers && n < p.num_layers; i++)
        if (r->layers[i] == p.layers[n]) {
            all[n] = r->expert_of_slot + (size_t)i * (size_t)total;
            share[n++] = r->share_of_slot + (size_t)i * (size_t)total;
        }
    p.slots_per_rank = r->slots_per_rank;
    p.expert_of_slot = all;
    p.share_of_slot = share;
    if (n == p.num_layers)
        add_way(v, b, WAY_rearranged, &p);
}

/* ---- steps ---- */

static void add_steps(struct balance_view *b, int max_tokens) {
    for (int t = 1; t < max_tokens && b->num_steps < MAX_STEPS - 1; t *= t < 8 ? 8 : 4)
        b->tokens[b->num_steps++] = t;
    b->tokens[b->num_steps++] = max_tokens;
    for (int w = 0; w < NUM_WAYS; w++)
        for (int i = 0; i < b->num_steps && b->ways[w].setups; i++)
            cost_layers(b->ways[w].setups, b->ways[w].n, b->tokens[i], &b->cost[w][i]);
    b->from = -1;
    for (int i = 0; i < b->num_steps; i++) {
        double old = b->cost[WAY_in_order][i].layer_us;
        b->gain[i] = old > 0 ? 1 - b->cost[WAY_planned][i].layer_us / old : 0;
        if (b->gain[i] > b->gain[b->best])
            b->best = i;
        if (b->gain[i] >= WORTH && b->from < 0)
            b->from = i;
        else if (b->gain[i] < WORTH)
            b->from = -1;
    }
}

bool explain_cost(const struct balance_view *b, const struct moe_plan_bucket *bucket,
                  struct cost *out) {
    const struct way *w = &b->ways[WAY_planned];
    cost_layers(w->setups, w->n, bucket->max_tokens, out);
    cost_exchange(out, bucket->exchange);
    return b->timed;
}

/* ---- the verdict ---- */

static double step_ms(const struct balance_view *b, int way, int i) {
    return b->cost[way][i].layer_us * b->num_layers / 1e3;
}

static void add_price(const struct view *v, const struct balance_view *b, struct buf *t) {
    if (!b->redundant_slots)
        buf_printf(t, " It needs no slots beyond those of experts in order, so it takes no "
                      "memory.");
    else
        buf_printf(t, " Its %d redundant slots a layer take %.2f GB of each rank",
                   b->redundant_slots, b->redundant_bytes / 1e9);
    if (b->redundant_slots && v->cluster->memory_gb > 0)
        buf_printf(t, " (%.1f %% of %.0f GB).",
                   b->redundant_bytes / v->cluster->memory_gb / 1e7, v->cluster->memory_gb);
    else if (b->redundant_slots)
        buf_printf(t, ".");
}

static void add_alternative(const struct balance_view *b, struct buf *t) {
    if (!b->ways[WAY_rearranged].setups)
        return;
    double moved = step_ms(b, WAY_rearranged, b->best), all = step_ms(b, WAY_planned, b->best);
    buf_printf(t,
               " Moving experts without redundant slots would give %.3f ms there: the slots "
               "themselves %s %.1f %%.",
               moved, moved >= all ? "save" : "cost",
               100 * (moved >= all ? 1 - all / moved : all / moved - 1));
}

/* What a slot of every layer costs to move while serving, in steps that pay for it. */
static void add_moves(const struct balance_view *b, struct buf *t) {
    double saved = step_ms(b, WAY_in_order, b->best) - step_ms(b, WAY_planned, b->best);
    buf_printf(t, " Moving a slot of every layer while serving takes %.2f ms of the links",
               b->move_us / 1e3);
    if (saved > 0)
        buf_printf(t, ", what %.2g steps save", b->move_us / 1e3 / saved);
    buf_printf(t, ".");
}

static void add_decision(const struct balance_view *b, struct buf *t) {
    int i = b->best;
    double before = step_ms(b, WAY_in_order, i), after = step_ms(b, WAY_planned, i);
    if (b->verdict == VERDICT_NO) {
        buf_printf(t,
                   "balancing is not worth it here: at best, with %d tokens on each rank, a "
                   "step takes %.3f ms and %.3f with experts in order.",
                   b->tokens[i], after, before);
        return;
    }
    buf_printf(t, "balancing is worth it");
    if (b->from > 0)
        buf_printf(t, " from %d tokens on each rank", b->tokens[b->from]);
    else if (b->from < 0)
        buf_printf(t, " at %d tokens on each rank, though not at all sizes", b->tokens[i]);
    buf_printf(t, ": at %d a step takes %.3f ms, %.3f with experts in order, %.1f %% less.",
               b->tokens[i], after, before, 100 * b->gain[i]);
}

static void decide(struct view *v, struct balance_view *b) {
    struct buf t = {.arena = &v->arena};
    int loss = 0; /* where the redundant slots cost most */
    for (int i = 0; i < b->num_steps; i++)
        loss = b->gain[i] < b->gain[loss] ? i : loss;
    b->verdict = b->base.ranks == 1         ? VERDICT_ONE_RANK
                 : !v->loads                ? VERDICT_NO_LOADS
                 : !b->timed                ? VERDICT_NO_GPU
                 : b->gain[b->best] < WORTH ? VERDICT_NO
                                            : VERDICT_YES;
    if (b->verdict == VERDICT_ONE_RANK) {
        buf_printf(&t, "there is nothing to balance on one rank.");
    } else if (b->verdict == VERDICT_NO_LOADS) {
        buf_printf(&t, "without recorded loads it cannot be said what balancing gains.");
        add_price(v, b, &t);
        if (b->timed && b->redundant_slots && b->gain[loss] < 0)
            buf_printf(&t, " With %d tokens on each rank a step is %.1f %% longer for them.",
                       b->tokens[loss], -100 * b->gain[loss]);
    } else if (b->verdict == VERDICT_NO_GPU) {
        buf_printf(&t, "no GPU is named, so there are no times to weigh memory against.");
        add_price(v, b, &t);
    } else {
        add_decision(b, &t);
        add_price(v, b, &t);
        add_alternative(b, &t);
        add_moves(b, &t);
    }
    b->text = t.data;
}

void explain_balance(struct view *v, int index, struct balance_view *b) {
    const struct moe_plan_class *c = &v->plan.classes[index];
    struct cost_placement p;
    planned(v, index, &p);
    *b = (struct balance_view){.num_layers = p.num_layers};
    model_of_class(v, c, p.num_layers, &b->model);
    b->base = (struct cost_setup){.model = &b->model,
                                  .cluster = v->cluster,
                                  .ranks = c->ranks,
                                  .slots_per_rank = c->slots_per_rank,
                                  .max_num_tokens = c->max_tokens * c->ranks,
                                  .imbalance = 1,
                                  .weight = 1};
    int least = (c->experts + c->ranks - 1) / c->ranks;
    b->redundant_slots = (c->slots_per_rank - least) * c->ranks;
    b->timed = !cost_lacks(&b->base);
    add_way(v, b, WAY_planned, &p);
    add_in_order(v, b, p);
    add_rearranged(v, b, p);
    add_steps(b, c->max_tokens);
    b->redundant_bytes = (double)c->slot_bytes * (c->slots_per_rank - least) * b->num_layers;
    if (b->timed)
        b->move_us = cost_migration_us(&b->base, (double)b->num_layers / c->ranks);
    decide(v, b);
}

/* ---- loads ---- */

/* Over the layers of a workload that have tokens: the hottest expert's share, tokens, and max/mean
 * of the ranks with experts in order. */
struct recorded {
    int layers;
    double tokens, hottest, imbalance;
};
static struct recorded look(const struct view *v, const struct workload *w) {
    const struct moe_plan_class *c = &v->plan.classes[0];
    int slots = (c->experts + c->ranks - 1) / c->ranks;
    struct recorded r = {0};
    for (int i = 0; i < v->loads->num_layers; i++) {
        const double *count = w->count + (size_t)i * (size_t)c->experts;
        double sum = 0, most = 0, rank = 0, busiest = 0;
        for (int e = 0; e < c->experts; e++) {
            rank = e % slots ? rank + count[e] : count[e];
            busiest = rank > busiest ? rank : busiest;
            most = count[e] > most ? count[e] : most;
            sum += count[e];
        }
        if (sum == 0)
            continue;
        r.layers++;
        r.tokens += sum;
        r.hottest += most / sum;
        r.imbalance += busiest * c->ranks / sum;
    }
    int n = r.layers ? r.layers : 1;
    return (struct recorded){r.layers, r.tokens / n, r.hottest / n, r.imbalance / n};
}

void explain_loads_text(struct view *v) {
    if (!v->loads) {
        printf("loads: none; all experts weigh the same\n");
        return;
    }
    int experts = v->plan.classes[0].experts;
    printf("loads: %d workload%s; means over the layers\n", v->loads->num_workloads,
           v->loads->num_workloads == 1 ? "" : "s");
    for (int i = 0; i < v->loads->num_workloads; i++) {
        const struct workload *w = &v->loads->workloads[i];
        struct recorded r = look(v, w);
        printf("  %s: weight %g, %d layers of %.4g routed tokens, hottest expert %.2f %% (%.1f "
               "x the mean), imbalance %.3f with experts in order\n",
               w->name, w->weight, r.layers, r.tokens, 100 * r.hottest, r.hottest * experts,
               r.imbalance);
    }
}

void explain_loads_json(struct view *v, struct buf *out) {
    buf_printf(out, "\"loads\":[");
    for (int i = 0; v->loads && i < v->loads->num_workloads; i++) {
        const struct workload *w = &v->loads->workloads[i];
        struct recorded r = look(v, w);
        buf_printf(out, "%s{\"name\":", i ? "," : "");
        buf_json_string(out, w->name);
        buf_printf(out,
                   ",\"weight\":%.9g,\"layers\":%d,\"tokens\":%.9g,\"hottest\":%.6g,"
                   "\"imbalance_in_order\":%.6g}",
                   w->weight, r.layers, r.tokens, r.hottest, r.imbalance);
    }
    buf_printf(out, "]");
}

/* ---- replicas of a layer ---- */

struct hot {
    int expert, replicas;
    double share; /* of the layer's tokens */
};

static int hotter(const void *a, const void *b) {
    const struct hot *x = a, *y = b;
    return x->share != y->share ? (x->share < y->share) - (x->share > y->share)
                                : x->expert - y->expert;
}

/* All experts of a layer, hottest first; NULL without loads. */
static struct hot *by_heat(struct view *v, const struct moe_plan_layer *l) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    const double *load = v->loads ? cost_load(&v->arena, v->loads, l->layer) : NULL;
    struct hot *all = arena_array(&v->arena, struct hot, c->experts);
    if (!load)
        return NULL;
    for (int e = 0; e < c->experts; e++)
        all[e] = (struct hot){e, 0, load[e]};
    for (int s = 0; s < c->ranks * c->slots_per_rank; s++) {
        int e = v->plan.tables[l->expert_of_slot + s];
        if (e >= 0)
            all[e].replicas++;
    }
    qsort(all, (size_t)c->experts, sizeof *all, hotter);
    return all;
}

static void print_hot(const struct view *v, const struct moe_plan_layer *l,
                      const struct hot *h) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    printf("    expert %d: %.2f %% of the tokens (%.1f x the mean), %d slot%s on rank",
           h->expert, 100 * h->share, h->share * c->experts, h->replicas,
           h->replicas == 1 ? "" : "s");
    for (int s = 0; s < c->ranks * c->slots_per_rank; s++)
        if (v->plan.tables[l->expert_of_slot + s] == h->expert)
            printf(" %d", s / c->slots_per_rank);
    printf("; %.2f %% each\n", 100 * h->share / h->replicas);
}

void explain_replicas_text(struct view *v, const struct moe_plan_layer *l, bool full) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    const struct hot *all = by_heat(v, l);
    if (c->ranks > 1)
        printf("    imbalance (max/mean of the ranks): %.4f under dispatch %s, %.4f split "
               "evenly; no placement is below %.4f\n",
               l->imbalance, v->dispatch, l->imbalance_even, l->bound);
    if (!all || c->ranks == 1)
        return;
    printf("    a rank's fair part is %.2f %% of the tokens; the hottest experts:\n",
           100. / c->ranks);
    for (int i = 0; i < c->experts; i++)
        if (i < HOTTEST || (full && all[i].replicas > 1))
            print_hot(v, l, &all[i]);
}

void explain_replicas_json(struct view *v, const struct moe_plan_layer *l, struct buf *out) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    const struct hot *all = by_heat(v, l);
    buf_printf(out, ",\"imbalance\":%.6g,\"imbalance_even\":%.6g,\"bound\":%.6g,\"hottest\":[",
               l->imbalance, l->imbalance_even, l->bound);
    for (int i = 0; all && i < HOTTEST && i < c->experts; i++)
        buf_printf(out, "%s{\"expert\":%d,\"share\":%.6g,\"slots\":%d}", i ? "," : "",
                   all[i].expert, all[i].share, all[i].replicas);
    buf_printf(out, "]");
}

/* ---- balancing ---- */

static const char *const way_names[NUM_WAYS] = {
#define X(name) #name,
    EXPLAIN_WAYS(X)
#undef X
};

static double mean_bound(const struct view *v) {
    double sum = 0;
    int n = (int)v->plan.count[MOE_SECTION_LAYER];
    for (int i = 0; i < n; i++)
        sum += v->plan.layers[i].bound;
    return sum / n;
}

static void print_steps(const struct balance_view *b) {
    printf("  a step of %d layers on paper, ms (moec simulate says more)\n", b->num_layers);
    printf("  %9s  %9s  %10s  %9s  %7s  %s\n", "tokens", "in order", "rearranged", "planned",
           "saved", "exchange");
    for (int i = 0; i < b->num_steps; i++) {
        const struct cost *c = &b->cost[WAY_planned][i];
        printf("  %9d  %9.3f", b->tokens[i], step_ms(b, WAY_in_order, i));
        if (b->ways[WAY_rearranged].setups)
            printf("  %10.3f", step_ms(b, WAY_rearranged, i));
        else
            printf("  %10s", "-");
        printf("  %9.3f  %5.1f %%  %s\n", step_ms(b, WAY_planned, i), 100 * b->gain[i],
               c->exchange < 0 ? "-" : exchange_names[c->exchange]);
    }
}

/* Words in lines of at most 100 columns. */
static void print_wrapped(const char *start, const char *text) {
    size_t col = strlen(start);
    fputs(start, stdout);
    while (*text) {
        size_t n = strcspn(text, " ");
        if (col + 1 + n > 100) {
            printf("\n ");
            col = 1;
        }
        printf(" %.*s", (int)n, text);
        col += 1 + n;
        text += n;
        text += strspn(text, " ");
    }
    putchar('\n');
}

void explain_balance_text(const struct view *v, const struct balance_view *b) {
    const struct way *w = b->ways;
    if (b->base.ranks > 1 && v->loads) {
        printf("  imbalance, mean of layers and workloads: %.4f with experts in order",
               w[WAY_in_order].imbalance);
        if (w[WAY_rearranged].setups)
            printf(", %.4f rearranged", w[WAY_rearranged].imbalance);
        printf(", %.4f planned; bound %.4f\n", w[WAY_planned].imbalance, mean_bound(v));
    }
    if (b->timed)
        print_steps(b);
    print_wrapped("  verdict:", b->text);
}

static void json_way(const struct balance_view *b, int way, struct buf *out) {
    const struct way *w = &b->ways[way];
    buf_printf(out, "%s\"%s\":", way ? "," : "", way_names[way]);
    if (!w->setups) {
        buf_printf(out, "null");
        return;
    }
    buf_printf(out, "{\"slots_per_rank\":%d,\"imbalance\":%.6g}", w->slots_per_rank,
               w->imbalance);
}

static void json_step(const struct balance_view *b, int i, struct buf *out) {
    const struct cost *c = &b->cost[WAY_planned][i];
    buf_printf(out, "%s{\"tokens\":%d", i ? "," : "", b->tokens[i]);
    for (int w = 0; w < NUM_WAYS; w++)
        if (b->ways[w].setups)
            buf_printf(out, ",\"%s_us\":%.6g", way_names[w], 1e3 * step_ms(b, w, i));
        else
            buf_printf(out, ",\"%s_us\":null", way_names[w]);
    buf_printf(out, ",\"gain\":%.6g,\"exchange\":", b->gain[i]);
    if (c->exchange < 0)
        buf_printf(out, "null}");
    else
        buf_printf(out, "\"%s\"}", exchange_names[c->exchange]);
}

void explain_balance_json(const struct view *v, const struct balance_view *b, struct buf *out) {
    static const char *const verdicts[] = {[VERDICT_ONE_RANK] = "one_rank",
                                           [VERDICT_NO_LOADS] = "no_loads",
                                           [VERDICT_NO_GPU] = "no_gpu",
                                           [VERDICT_NO] = "not_worth_it",
                                           [VERDICT_YES] = "worth_it"};
    buf_printf(out, "{\"ways\":{");
    for (int w = 0; w < NUM_WAYS; w++)
        json_way(b, w, out);
    buf_printf(out,
               "},\"bound\":%.6g,\"redundant_slots\":%d,\"redundant_bytes\":%.0f,\"move_us\":",
               mean_bound(v), b->redundant_slots, b->redundant_bytes);
    buf_printf(out, b->timed ? "%.6g" : "null", b->move_us);
    buf_printf(out, ",\"steps\":[");
    for (int i = 0; b->timed && i < b->num_steps; i++)
        json_step(b, i, out);
    buf_printf(out, "],\"verdict\":\"%s\",\"worth_from_tokens\":", verdicts[b->verdict]);
    bool from = b->verdict == VERDICT_YES && b->from >= 0;
    buf_printf(out, from ? "%d" : "null", from ? b->tokens[b->from] : 0);
    buf_printf(out, ",\"text\":");
    buf_json_string(out, b->text);
    buf_printf(out, "}");
}
