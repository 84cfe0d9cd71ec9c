/* The online planner on recorded loads. A layer's experts are placed for one workload alone, as if it
 * were all there is; then every iteration brings another's counts. What is measured is the imbalance
 * under the new workload and the slots whose weights had to come from another rank, beside those that
 * a new plan from scratch would move. */
#include "online.h"

#include <stdlib.h>
#include <string.h>

/* The planner and the factors are the runtime's own: what is simulated is what will serve. */
#include "../runtime/loadstats.h"
#include "../runtime/rebalance.h"
#include "policy.h"

enum {
    TOKENS = 1 << 20, /* of a layer an iteration */
    WARM = 200,       /* iterations before the load moves */
};

/* One workload: its counts scaled to TOKENS, and the placement made for it alone. */
struct known {
    const char *name;
    int32_t *count; /* [layers][E] */
    struct placement *placement;
    double imbalance; /* of it, under its own loads */
};
struct turn { /* a rotation */
    double imbalance;
    int moved; /* slots since the load moved */
};
struct shift {
    const struct known *from, *to;
    double before; /* the old placement under the new workload */
    struct turn *turns;
    int scratch; /* slots that planning anew moves */
};
struct online {
    struct arena *arena;
    struct diags *diags;
    const struct deployment *dep;
    const struct online_options *o;
    int layers, experts, slots; /* slots over all ranks */
    bool *recorded;             /* [layers] every workload has tokens there */
    int counted;                /* layers of which that is so */
    struct known *known;
    int num_known;
    struct shift *shifts;
    int num_shifts, updates;
    double slot_bytes;
};

/* ---- workloads ---- */

static int32_t *scale_counts(const struct online *s, const struct placement *p,
                             const struct workload *w) {
    int32_t *count = arena_array(s->arena, int32_t, s->layers * s->experts);
    for (int l = 0; l < s->layers; l++) {
        int row = loads_layer(s->dep->loads, p->layers[l]);
        const double *from = row < 0 ? NULL : w->count + (size_t)row * (size_t)s->experts;
        double sum = 0;
        for (int e = 0; from && e < s->experts; e++)
            sum += from[e];
        for (int e = 0; sum > 0 && e < s->experts; e++)
            count[l * s->experts + e] = (int32_t)(from[e] * (TOKENS / sum) + 0.5);
    }
    return count;
}

static bool know(struct online *s, int w) {
    struct loads alone = *s->dep->loads;
    struct deployment dep = *s->dep;
    struct known *k = &s->known[w];
    alone.workloads = &s->dep->loads->workloads[w];
    alone.num_workloads = 1;
    dep.loads = &alone;
    k->name = alone.workloads->name;
    k->placement = place_layers(s->arena, s->diags, &dep, core_count());
    if (!k->placement)
        return false;
    s->layers = k->placement->num_layers;
    k->count = scale_counts(s, k->placement, alone.workloads);
    return true;
}

/* ---- what binds a layer, and how it fares ---- */

static void limits_of(const struct online *s, const struct placement *p, int l,
                      struct balance_problem *out) {
    static const enum balance_split splits[] = {
        [DISPATCH_ROUNDROBIN] = BALANCE_EVEN,
        [DISPATCH_EVEN] = BALANCE_EVEN,
        [DISPATCH_SHARE] = BALANCE_SHARE,
        [DISPATCH_BALANCED] = BALANCE_BALANCED,
    };
    const struct constraints *c = p->constraints;
    int *pin = arena_array(s->arena, int, s->slots);
    uint8_t *forbidden = arena_array(s->arena, uint8_t, s->experts * p->ranks);
    *out = (struct balance_problem){.experts = s->experts,
                                    .ranks = p->ranks,
                                    .slots_per_rank = p->slots_per_rank,
                                    .split = splits[s->dep->dispatch],
                                    .pin = pin,
                                    .forbidden = forbidden};
    place_limits(s->dep, out);
    memset(pin, -1, sizeof *pin * (size_t)s->slots);
    for (int i = 0; c && i < c->num_pins; i++)
        if (c->pins[i].layer == p->layers[l])
            pin[c->pins[i].slot] = c->pins[i].expert;
    for (int i = 0; c && i < c->num_forbidden; i++)
        if (c->forbidden[i].layer == p->layers[l])
            forbidden[c->forbidden[i].expert * p->ranks + c->forbidden[i].rank] = 1;
}

static double judge(const struct online *s, const struct balance_problem *limits,
                    const int32_t *slot, const double *share, const int32_t *count) {
    struct balance_problem p = *limits;
    struct balance_result r;
    double *load = malloc(sizeof *load * (size_t)s->experts);
    if (!load)
        abort();
    for (int e = 0; e < s->experts; e++)
        load[e] = count[e];
    p.load = load;
    p.workloads = 1;
    balance_judge(&p, slot, share, &r, NULL);
    free(load);
    return r.imbalance;
}

/* Slots of `to` whose expert was not on their rank in `from`. */
static int count_received(const struct placement *p, const int32_t *from, const int32_t *to) {
    int n = 0, S = p->slots_per_rank;
    for (int i = 0; i < p->ranks * S; i++) {
        bool there = to[i] < 0;
        for (int j = i / S * S; j < i / S * S + S; j++)
            there |= from[j] == to[i];
        n += !there;
    }
    return n;
}

/* ---- one shift ---- */

struct run {
    struct online *s;
    struct shift *shift;
    struct rt_rebalance *engine;
    struct balance_problem *limits; /* [layers] */
    float *factor;                  /* [layers][E] */
    double *load;                   /* the same, as the engine takes it */
    const double **rows;
};

static const int32_t *counts_of(const struct online *s, const struct known *k, int layer) {
    return k->count + (size_t)layer * (size_t)s->experts;
}

static void count_iteration(struct run *r, const struct known *k) {
    struct online *s = r->s;
    for (int l = 0; l < s->layers; l++)
        rt_load_decay(r->factor + l * s->experts, counts_of(s, k, l), s->experts, RT_DECAY);
}

static bool open_run(struct run *r, struct online *s, struct shift *shift) {
    const struct placement *p = shift->from->placement;
    struct rt_rebalance_layer *layers =
        arena_array(s->arena, struct rt_rebalance_layer, s->layers);
    struct rt_rebalance_options o = {s->updates, s->o->moves, s->o->worth};
    *r = (struct run){.s = s, .shift = shift};
    r->limits = arena_array(s->arena, struct balance_problem, s->layers);
    r->factor = arena_array(s->arena, float, s->layers * s->experts);
    r->load = arena_array(s->arena, double, s->layers * s->experts);
    r->rows = arena_array(s->arena, const double *, s->layers);
    if (o.moves < 0 && p->constraints)
        o.moves = p->constraints->move_budget;
    for (int l = 0; l < s->layers; l++) {
        int32_t *share = arena_array(s->arena, int32_t, s->slots);
        limits_of(s, p, l, &r->limits[l]);
        balance_whole_shares(s->experts, s->slots, p->expert_of_slot + l * s->slots,
                             p->share_of_slot + l * s->slots, MOE_SHARE_ONE, share);
        layers[l] =
            (struct rt_rebalance_layer){.layer = p->layers[l],
                                        .limits = r->limits[l],
                                        .expert_of_slot = p->expert_of_slot + l * s->slots,
                                        .share_of_slot = share};
        r->rows[l] = r->load + l * s->experts;
    }
    if (rt_rebalance_open(layers, s->layers, &o, &r->engine) == MOERT_OK)
        return true;
    diag_error(s->diags, s->dep->policy_loc, "%s", moert_last_error());
    return false;
}

/* Moves slots of the layers whose turn it is; their number is added to *moved. */
static bool take_turn(struct run *r, int iteration, int *moved) {
    struct online *s = r->s;
    struct rt_update u;
    for (int i = 0; i < s->layers * s->experts; i++)
        r->load[i] = r->factor[i];
    if (rt_rebalance_plan(r->engine, iteration, r->rows, &u) != MOERT_OK) {
        diag_error(s->diags, s->dep->policy_loc, "%s", moert_last_error());
        return false;
    }
    for (int l = 0; l < u.num_layers; l++)
        for (int m = 0; s->recorded[u.layers[l].index] && m < u.layers[l].num_moves; m++) {
            const struct rt_move *move = &u.moves[u.layers[l].first_move + m];
            *moved += move->to >= 0 && move->source != move->slot / r->limits[0].slots_per_rank;
        }
    rt_rebalance_apply(r->engine, &u);
    rt_update_free(&u);
    return true;
}

static double mean_imbalance(struct run *r) {
    const struct online *s = r->s;
    double sum = 0;
    for (int l = 0; l < s->layers; l++) {
        if (!s->recorded[l])
            continue;
        const int32_t *part = rt_rebalance_shares(r->engine, l);
        double *share = NULL;
        if (part) {
            share = arena_array(s->arena, double, s->slots);
            for (int i = 0; i < s->slots; i++)
                share[i] = part[i] / (double)MOE_SHARE_ONE;
        }
        sum += judge(s, &r->limits[l], rt_rebalance_slots(r->engine, l), share,
                     counts_of(s, r->shift->to, l));
    }
    return sum / s->counted;
}

static bool follow(struct run *r) {
    struct online *s = r->s;
    struct shift *shift = r->shift;
    int moved = 0, rotation = rt_rebalance_rotation(r->engine), iteration = 0;
    for (int i = 0; i < WARM; i++)
        count_iteration(r, shift->from);
    shift->before = mean_imbalance(r);
    for (int i = 0; i < s->o->settle; i++)
        count_iteration(r, shift->to);
    for (int t = 0; t < s->o->rotations; t++) {
        for (int i = 0; i < rotation; i++, iteration++) {
            count_iteration(r, shift->to);
            if (!take_turn(r, iteration, &moved))
                return false;
        }
        shift->turns[t] = (struct turn){mean_imbalance(r), moved};
    }
    return true;
}

static bool run_shift(struct online *s, struct shift *shift) {
    const struct placement *from = shift->from->placement, *to = shift->to->placement;
    struct run r;
    shift->turns = arena_array(s->arena, struct turn, s->o->rotations);
    for (int l = 0; l < s->layers; l++)
        if (s->recorded[l])
            shift->scratch += count_received(from, from->expert_of_slot + l * s->slots,
                                             to->expert_of_slot + l * s->slots);
    if (!open_run(&r, s, shift))
        return false;
    bool ok = follow(&r);
    rt_rebalance_close(r.engine);
    return ok;
}

static bool run_all(struct online *s) {
    int n = s->num_known;
    s->shifts = arena_array(s->arena, struct shift, n * n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            struct shift *shift = &s->shifts[s->num_shifts];
            shift->from = &s->known[i];
            shift->to = &s->known[j];
            if (i == j)
                continue;
            s->num_shifts++;
            if (!run_shift(s, shift))
                return false;
        }
    return true;
}

/* Layers that some workload has no tokens for say nothing. */
static bool find_recorded(struct online *s) {
    s->recorded = arena_array(s->arena, bool, s->layers);
    for (int l = 0; l < s->layers; l++) {
        s->recorded[l] = true;
        for (int w = 0; w < s->num_known; w++) {
            bool any = false;
            for (int e = 0; e < s->experts; e++)
                any |= s->known[w].count[l * s->experts + e] > 0;
            s->recorded[l] &= any;
        }
        s->counted += s->recorded[l];
    }
    if (!s->counted)
        diag_error(s->diags, (struct loc){0},
                   "--online: no layer was recorded in all of 'loads'");
    return s->counted > 0;
}

static bool prepare(struct online *s) {
    const struct deployment *dep = s->dep;
    if (!dep->loads || dep->loads->num_workloads < 2) {
        diag_error(
            s->diags, (struct loc){0},
            "--online: name two workloads or more in 'loads', to go from one to another");
        return false;
    }
    s->num_known = dep->loads->num_workloads;
    s->experts = dep->model->num_experts;
    s->slots = deployment_slots(dep) * dep->cluster->ranks;
    s->updates = s->o->updates ? s->o->updates : 1;
    s->known = arena_array(s->arena, struct known, s->num_known);
    for (int w = 0; w < s->num_known; w++)
        if (!know(s, w))
            return false;
    if (!find_recorded(s))
        return false;
    for (int w = 0; w < s->num_known; w++)
        for (int l = 0; l < s->layers; l++)
            if (s->recorded[l])
                s->known[w].imbalance += s->known[w].placement->imbalance[l] / s->counted;
    struct cost_setup setup;
    cost_setup(&setup, dep);
    s->slot_bytes = cost_slot_bytes(&setup);
    return true;
}

/* ---- results ---- */

static double percent(const struct shift *f, int moved) {
    return f->scratch ? 100.0 * moved / f->scratch : 0;
}

static void print_shift(const struct online *s, const struct shift *f) {
    printf("%-22.22s %-22.22s %7.4f %7.4f", f->from->name, f->to->name, f->from->imbalance,
           f->before);
    for (int t = 0; t < s->o->rotations; t++)
        printf("  %7.4f %6.2f %8.2f %6.2f", f->turns[t].imbalance,
               (double)f->turns[t].moved / s->counted, f->turns[t].moved * s->slot_bytes / 1e9,
               percent(f, f->turns[t].moved));
    printf("  %7.4f %6.1f\n", f->to->imbalance, (double)f->scratch / s->counted);
}

static void print_text(const struct online *s) {
    printf("%s: %d recorded MoE layers, %d ranks, %d slots, dispatch %s; updates an "
           "iteration: %d\n",
           s->dep->model->name, s->counted, s->dep->cluster->ranks, s->slots,
           dispatch_names[s->dep->dispatch], s->updates);
    printf("max/mean rank load, mean of layers: of the first workload as placed, of the second "
           "there,\n"
           "of the second after each rotation with slots a layer and GB moved since then, and "
           "their %%\n"
           "of what planning for the second from scratch moves (last: its max/mean and "
           "slots)\n\n");
    printf("%-22s %-22s %7s %7s", "from", "to", "placed", "before");
    for (int t = 0; t < s->o->rotations; t++)
        printf("  after %d moved       GB      %%", t + 1);
    printf("  %7s %6s\n", "scratch", "moved");
    for (int i = 0; i < s->num_shifts; i++)
        print_shift(s, &s->shifts[i]);
}

static void json_shift(struct buf *b, const struct online *s, const struct shift *f) {
    buf_printf(b, "{\"from\": ");
    buf_json_string(b, f->from->name);
    buf_printf(b, ", \"to\": ");
    buf_json_string(b, f->to->name);
    buf_printf(b, ", \"placed\": %.6g, \"before\": %.6g, \"rotations\": [", f->from->imbalance,
               f->before);
    for (int t = 0; t < s->o->rotations; t++)
        buf_printf(b,
                   "%s{\"imbalance\": %.6g, \"moved\": %d, \"bytes\": %.0f, \"percent\": %.4g}",
                   t ? ", " : "", f->turns[t].imbalance, f->turns[t].moved,
                   f->turns[t].moved * s->slot_bytes, percent(f, f->turns[t].moved));
    buf_printf(b, "], \"scratch\": {\"imbalance\": %.6g, \"moved\": %d, \"bytes\": %.0f}}",
               f->to->imbalance, f->scratch, f->scratch * s->slot_bytes);
}

static void print_json(const struct online *s) {
    struct buf b = {.arena = s->arena};
    buf_printf(&b, "{\"model\": ");
    buf_json_string(&b, s->dep->model->name);
    buf_printf(&b,
               ", \"layers\": %d, \"ranks\": %d, \"slots\": %d, \"dispatch\": \"%s\", "
               "\"updates\": %d, \"settle\": %d, \"slot_bytes\": %.0f,\n \"shifts\": [",
               s->counted, s->dep->cluster->ranks, s->slots, dispatch_names[s->dep->dispatch],
               s->updates, s->o->settle, s->slot_bytes);
    for (int i = 0; i < s->num_shifts; i++) {
        buf_printf(&b, i ? ",\n  " : "\n  ");
        json_shift(&b, s, &s->shifts[i]);
    }
    buf_printf(&b, "]}\n");
    fputs(b.data, stdout);
}

bool simulate_online(struct arena *a, struct diags *d, const struct deployment *dep,
                     const struct online_options *o) {
    struct online s = {.arena = a, .diags = d, .dep = dep, .o = o};
    if (!prepare(&s) || !run_all(&s))
        return false;
    o->json ? print_json(&s) : print_text(&s);
    return true;
}
