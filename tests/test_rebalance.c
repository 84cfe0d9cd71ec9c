// The online planner: turns, what it moves, that no rank can take another's update for its own; and
// what it is there for, loads that change from one recorded workload to another.
#include "dice.h"
#include "../compiler/moec.h"
#include "../compiler/split.h"
#include "../runtime/internal.h"
#include "../runtime/rebalance.h"

#include <criterion/criterion.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/wait.h>
#include <unistd.h>

TestSuite(rebalance, .timeout = 300);

enum { MAX_LAYERS = 61, MAX_E = 1000 };

struct world {                         // layers alike, with loads of their own
    int layers, experts, ranks, slots; // slots of a rank
    struct balance_problem limits;
    int32_t *expert_of_slot, *share;
    double *load[MAX_LAYERS];
};

static struct world make_world(int layers, int experts, int ranks, int slots) {
    struct world w = {layers, experts, ranks, slots};
    w.limits = (struct balance_problem){
        .experts = experts, .ranks = ranks, .slots_per_rank = slots, .split = BALANCE_BALANCED};
    w.expert_of_slot = calloc((size_t)(layers * ranks * slots), sizeof(int32_t));
    w.share = calloc((size_t)(layers * ranks * slots), sizeof(int32_t));
    for (int l = 0; l < layers; l++)
        w.load[l] = calloc((size_t)experts, sizeof(double));
    return w;
}
static void free_world(struct world *w) {
    free(w->expert_of_slot);
    free(w->share);
    for (int l = 0; l < w->layers; l++)
        free(w->load[l]);
}

// Skewed loads; again: others.
static void draw_loads(struct world *w) {
    for (int l = 0; l < w->layers; l++)
        for (int e = 0; e < w->experts; e++) {
            double x = roll();
            w->load[l][e] = 1 + (int)(1000 * x * x * x * x);
        }
}

// The first placement, planned for the loads as they are.
static void place(struct world *w, int budget) {
    for (int l = 0; l < w->layers; l++) {
        struct balance_problem p = w->limits;
        struct balance_result r;
        int total = w->ranks * w->slots, *slot = w->expert_of_slot + l * total;
        double *share = calloc((size_t)total, sizeof *share);
        p.workloads = 1;
        p.load = w->load[l];
        p.effort = budget;
        cr_assert(balance_plan(&p, slot, share, &r), "%s", balance_check(&p));
        balance_whole_shares(w->experts, total, slot, share, MOE_SHARE_ONE,
                             w->share + l * total);
        free(share);
    }
}

static struct rt_rebalance *open_engine(const struct world *w, int updates, int moves,
                                        double worth) {
    struct rt_rebalance_layer layers[MAX_LAYERS];
    struct rt_rebalance_options o = {updates, moves, worth};
    struct rt_rebalance *r;
    for (int l = 0; l < w->layers; l++)
        layers[l] = (struct rt_rebalance_layer){
            .layer = 3 + 2 * l,
            .limits = w->limits,
            .expert_of_slot = w->expert_of_slot + l * w->ranks * w->slots,
            .share_of_slot = w->share + l * w->ranks * w->slots};
    cr_assert_eq(rt_rebalance_open(layers, w->layers, &o, &r), MOERT_OK, "%s",
                 moert_last_error());
    return r;
}

static const double *const *loads_of(const struct world *w) {
    return (const double *const *)w->load;
}

/* ---- turns ---- */

static void expect_rotation(int layers, int updates, const int *sizes, int n) {
    struct world w = make_world(layers, 1, 1, 1);
    struct rt_rebalance *r = open_engine(&w, updates, -1, 0);
    cr_assert_eq(rt_rebalance_rotation(r), n, "(%d, %d)", layers, updates);
    for (int i = 0; i < 2 * n; i++) {
        int due = 0;
        for (int l = 0; l < layers; l++)
            due += rt_rebalance_due(r, i, l);
        cr_expect_eq(due, sizes[i % n], "(%d, %d), iteration %d", layers, updates, i);
    }
    rt_rebalance_close(r);
    free_world(&w);
}
#define ROTATION(layers, updates, ...) \
    expect_rotation(layers, updates, (const int[]){__VA_ARGS__}, \
                    sizeof((const int[]){__VA_ARGS__}) / sizeof(int))

Test(rebalance, turns_are_those_of_tensorrt_llm) {
    ROTATION(2, 1, 1, 1, 0);
    ROTATION(61, 10, 9, 9, 9, 9, 9, 8, 8);
    ROTATION(6, 4, 3, 3, 0);
    ROTATION(1, 1, 1, 0);
    ROTATION(3, 8, 3, 0);
}

Test(rebalance, every_layer_has_one_turn_in_a_rotation) {
    static const int layers[] = {1, 2, 58, 61};
    for (int k = 0; k < 4; k++)
        for (int updates = 1; updates <= 61; updates++) {
            struct world w = make_world(layers[k], 1, 1, 1);
            struct rt_rebalance *r = open_engine(&w, updates, -1, 0);
            int rotation = rt_rebalance_rotation(r), turns[MAX_LAYERS] = {0};
            for (int i = 0; i < rotation; i++) {
                int due = 0;
                for (int l = 0; l < layers[k]; l++) {
                    due += rt_rebalance_due(r, 7LL * rotation + i, l);
                    turns[l] += rt_rebalance_due(r, 7LL * rotation + i, l);
                }
                cr_expect_leq(due, updates);
            }
            for (int l = 0; l < layers[k]; l++)
                cr_expect_eq(turns[l], 1, "layer %d of %d, %d updates", l, layers[k], updates);
            rt_rebalance_close(r);
            free_world(&w);
        }
}

/* ---- what is moved ---- */

// Every limit, by plain code.
static void expect_legal(const struct world *w, const int32_t *slot) {
    const struct balance_problem *p = &w->limits;
    int count[MAX_E] = {0}, nodes = p->ranks_per_node ? w->ranks / p->ranks_per_node : 1;
    int there[MAX_E][8] = {{0}};
    for (int s = 0; s < w->ranks * w->slots; s++) {
        int e = slot[s], rank = s / w->slots;
        cr_assert(e >= -1 && e < w->experts);
        if (p->pin && p->pin[s] >= 0)
            cr_assert_eq(e, p->pin[s], "slot %d is pinned", s);
        if (e < 0)
            continue;
        cr_assert(!p->capacity || s % w->slots < p->capacity[rank]);
        cr_assert(!p->forbidden || !p->forbidden[e * w->ranks + rank]);
        for (int t = rank * w->slots; t < s; t++)
            cr_assert_neq(slot[t], e, "expert %d twice on rank %d", e, rank);
        count[e]++;
        there[e][p->ranks_per_node ? rank / p->ranks_per_node : 0]++;
    }
    for (int e = 0; e < w->experts; e++) {
        cr_assert_geq(count[e], 1, "expert %d is lost", e);
        cr_assert(!p->max_replicas || count[e] <= p->max_replicas);
        for (int n = 0; p->max_per_node && n < nodes; n++)
            cr_assert_leq(there[e][n], p->max_per_node);
        for (int n = 0; p->groups && n < nodes; n++) // homes do not move here: all or nothing
            cr_assert(!there[e][n] || there[e][n] == count[e], "expert %d on two nodes", e);
    }
}

static void expect_moves(const struct world *w, const struct rt_rebalance *r,
                         const struct rt_update *u, int budget) {
    for (int i = 0; i < u->num_layers; i++) {
        const struct rt_update_layer *l = &u->layers[i];
        const int32_t *slot = rt_rebalance_slots(r, l->index);
        cr_assert(rt_rebalance_due(r, u->iteration, l->index));
        int filled = 0;
        for (int m = 0; m < l->num_moves; m++) {
            const struct rt_move *move = &u->moves[l->first_move + m];
            bool holds = false, near = false, from_near = false;
            int node = w->limits.ranks_per_node;
            cr_assert_eq(slot[move->slot], move->from);
            cr_assert_neq(move->to, move->from);
            filled += move->to >= 0;
            if (move->to < 0) {
                cr_assert_eq(move->source, -1);
                continue;
            }
            for (int s = 0; s < w->ranks * w->slots; s++) {
                int rank = s / w->slots;
                bool same = node && rank / node == move->slot / w->slots / node;
                holds |= slot[s] == move->to && rank == move->source;
                near |= slot[s] == move->to && same;
                from_near |= slot[s] == move->to && rank == move->source && same;
            }
            cr_assert(holds, "rank %d does not hold expert %d", move->source, move->to);
            cr_assert(from_near || !near, "a rank of the same node holds it");
        }
        cr_assert_leq(filled, budget);
    }
}

// One rotation and a little more; returns the slots moved.
static int run_rotation(struct world *w, int updates, int moves, double worth) {
    struct rt_rebalance *r = open_engine(w, updates, moves, worth);
    int moved = 0, total = w->ranks * w->slots;
    for (int i = 0; i < rt_rebalance_rotation(r) + 1; i++) {
        struct rt_update u;
        cr_assert_eq(rt_rebalance_plan(r, i, loads_of(w), &u), MOERT_OK, "%s",
                     moert_last_error());
        expect_moves(w, r, &u, moves < 0 ? RT_MOVES : moves);
        for (int l = 0; l < u.num_layers; l++)
            moved += u.layers[l].num_moves;
        rt_rebalance_apply(r, &u);
        rt_update_free(&u);
        for (int l = 0; l < w->layers; l++)
            expect_legal(w, rt_rebalance_slots(r, l));
    }
    for (int l = 0; l < w->layers; l++)
        memcpy(w->expert_of_slot + l * total, rt_rebalance_slots(r, l),
               sizeof(int32_t) * (size_t)total);
    rt_rebalance_close(r);
    return moved;
}

static double imbalance(const struct world *w, const int *slot, const double *load) {
    int total = w->ranks * w->slots;
    double *tokens = calloc((size_t)(total + w->ranks), sizeof *tokens), sum = 0;
    for (int e = 0; e < w->experts; e++)
        sum += load[e];
    double most = split_fractions(w->experts, w->ranks, w->slots, slot, NULL, load, 500, tokens,
                                  tokens + total);
    free(tokens);
    return most * w->ranks / sum;
}

static double mean_imbalance(const struct world *w) {
    double sum = 0;
    for (int l = 0; l < w->layers; l++)
        sum += imbalance(w, w->expert_of_slot + l * w->ranks * w->slots, w->load[l]);
    return sum / w->layers;
}

Test(rebalance, any_number_of_experts_layers_and_updates_follows_new_loads) {
    static const int shapes[][4] = {{61, 16, 4, 5},    {61, 5, 2, 3}, {1, 5, 5, 2},
                                    {1, 1000, 8, 126}, {61, 6, 3, 2}, {1, 129, 10, 14},
                                    {2, 256, 32, 9}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const int *s = shapes[k];
        for (int updates = 1; updates <= 61; updates += s[0] == 61 && s[1] == 16 ? 6 : 30) {
            struct world w = make_world(s[0], s[1], s[2], s[3]);
            draw_loads(&w);
            place(&w, 2000);
            draw_loads(&w);
            double before = mean_imbalance(&w);
            run_rotation(&w, updates, -1, 0.002);
            double after = mean_imbalance(&w);
            cr_expect_leq(after, before, "%d layers, %d experts: %g to %g", s[0], s[1], before,
                          after);
            if (s[2] * s[3] > s[1] && before > 1.1)
                cr_expect_lt(after, 1 + 0.9 * (before - 1), "%d layers, %d experts: %g to %g",
                             s[0], s[1], before, after);
            free_world(&w);
        }
    }
}

Test(rebalance, every_moved_slot_is_worth_its_bytes) {
    static const double worth[] = {0.003, 0.02, 0.1};
    int moved[3] = {0};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 12; i++) {
            struct world w = make_world(1, 64, 8, 10);
            dice = (uint64_t)i + 1;
            w.limits.split = i % 3 == 0 ? BALANCE_EVEN : BALANCE_BALANCED;
            draw_loads(&w);
            place(&w, 2000);
            draw_loads(&w);
            struct balance_problem p = w.limits;
            struct balance_result before, after;
            p.workloads = 1;
            p.load = w.load[0];
            balance_judge(&p, w.expert_of_slot, NULL, &before, NULL);
            int n = run_rotation(&w, 1, -1, worth[k]);
            balance_judge(&p, w.expert_of_slot, NULL, &after, NULL);
            cr_expect_geq(before.imbalance - after.imbalance, worth[k] * n - 2e-3,
                          "%d moves took %g to %g", n, before.imbalance, after.imbalance);
            moved[k] += n;
            free_world(&w);
        }
    cr_expect(moved[0] > moved[1] && moved[1] > moved[2], "%d, %d, %d slots moved", moved[0],
              moved[1], moved[2]);
}

Test(rebalance, loads_that_stay_move_nothing) {
    struct world w = make_world(4, 128, 16, 9);
    draw_loads(&w);
    place(&w, 0);
    for (int l = 0; l < 4; l++) // what chance makes of a few thousand tokens
        for (int e = 0; e < 128; e++)
            w.load[l][e] *= 1 + 0.02 * (roll() - 0.5);
    cr_expect_eq(run_rotation(&w, 1, -1, 0), 0);
    for (int l = 0; l < 4; l++)
        memset(w.load[l], 0, sizeof(double) * 128);
    cr_expect_eq(run_rotation(&w, 1, -1, 0), 0, "no load says nothing");
    free_world(&w);
}

Test(rebalance, constraints_bind_whoever_moves) {
    for (int round = 0; round < 60; round++) {
        int R = 4 + 4 * pick(2), S = 4 + pick(4), E = R * S - pick(R * S / 3);
        bool grouped = round % 4 == 3;
        dice += (uint64_t)round;
        if (grouped)
            E = E / 8 * 8;
        struct world w = make_world(2, E, R, S);
        int pin[64], capacity[8];
        double speed[8];
        uint8_t *forbidden = calloc((size_t)(E * R), 1);
        for (int s = 0; s < R * S; s++)
            pin[s] = -1;
        w.limits.split = (enum balance_split)(round % 3);
        if (round % 2)
            w.limits.max_replicas = 1 + pick(3);
        if (grouped) {
            w.limits.ranks_per_node = R / 2;
            w.limits.groups = 4;
        } else if (round % 4 == 1) {
            w.limits.ranks_per_node = R / 2;
            w.limits.max_per_node = 1;
        }
        for (int r = 0; r < R; r++) {
            capacity[r] = S;
            speed[r] = 1 + roll();
        }
        w.limits.speed = round % 5 ? NULL : speed;
        w.limits.capacity = capacity;
        for (int i = 0; i < E * R / 10 && !grouped; i++)
            forbidden[pick(E * R)] = 1;
        w.limits.forbidden = grouped ? NULL : forbidden;
        if (!grouped && R * S - E > 2) {
            capacity[pick(R)]--;
            int e = pick(E), r = pick(R);
            if (!forbidden[e * R + r])
                pin[r * S] = e;
        }
        w.limits.pin = pin;
        draw_loads(&w);
        if (!balance_check(&w.limits)) {
            place(&w, 2000);
            draw_loads(&w);
            run_rotation(&w, 1 + pick(2), 1 + pick(8), 0.001);
        }
        free(forbidden);
        free_world(&w);
    }
}

Test(rebalance, what_breaks_a_limit_is_moved_whatever_the_budget) {
    struct world w = make_world(1, 24, 4, 8);
    int capacity[] = {8, 8, 0, 8}; // a rank is lost
    draw_loads(&w);
    place(&w, 2000);
    w.limits.capacity = capacity;
    struct rt_rebalance *r = open_engine(&w, 1, 1, 0);
    struct rt_update u;
    cr_assert_eq(rt_rebalance_plan(r, 0, loads_of(&w), &u), MOERT_OK);
    rt_rebalance_apply(r, &u);
    expect_legal(&w, rt_rebalance_slots(r, 0));
    cr_expect(u.num_layers == 1 && u.layers[0].num_moves > 1);
    rt_update_free(&u);
    rt_rebalance_close(r);
    free_world(&w);
}

Test(rebalance, shares_follow_the_loads_and_move_nothing) {
    struct world w = make_world(1, 12, 4, 4);
    w.limits.split = BALANCE_SHARE;
    draw_loads(&w);
    place(&w, 0);
    for (int e = 0; e < 12; e++)
        w.load[0][e] *= 1 + 0.2 * roll();
    struct rt_rebalance *r = open_engine(&w, 1, -1, 1e3);
    struct rt_update u;
    cr_assert_eq(rt_rebalance_plan(r, 0, loads_of(&w), &u), MOERT_OK);
    cr_assert_eq(u.num_layers, 1);
    cr_expect_eq(u.layers[0].num_moves, 0);
    cr_assert_eq(u.layers[0].num_shares, 16);
    rt_rebalance_apply(r, &u);
    int sum[12] = {0};
    for (int s = 0; s < 16; s++)
        if (w.expert_of_slot[s] >= 0)
            sum[w.expert_of_slot[s]] += rt_rebalance_shares(r, 0)[s];
    for (int e = 0; e < 12; e++)
        cr_expect_eq(sum[e], MOE_SHARE_ONE);
    rt_update_free(&u);
    rt_rebalance_close(r);
    free_world(&w);
}

/* ---- one plans, the others check ---- */

Test(rebalance, ranks_cannot_diverge) {
    struct world w = make_world(7, 48, 8, 8);
    w.limits.split = BALANCE_SHARE;
    draw_loads(&w);
    place(&w, 2000);
    draw_loads(&w);
    struct rt_rebalance *leader = open_engine(&w, 2, -1, 0.001),
                        *again = open_engine(&w, 2, -1, 0.001),
                        *follower = open_engine(&w, 2, -1, 0.001);
    int moved = 0;
    for (int i = 0; i < 12; i++) {
        struct rt_update u, v, t;
        cr_assert_eq(rt_rebalance_plan(leader, i, loads_of(&w), &u), MOERT_OK);
        cr_assert_eq(rt_rebalance_plan(again, i, loads_of(&w), &v), MOERT_OK);
        cr_assert(u.size == v.size && !memcmp(u.bytes, v.bytes, u.size),
                  "the same loads gave other bytes");
        cr_assert_eq(rt_rebalance_check(follower, u.bytes, u.size, &t), MOERT_OK, "%s",
                     moert_last_error());
        cr_assert_eq(t.num_layers, u.num_layers);
        for (int l = 0; l < u.num_layers; l++)
            moved += u.layers[l].num_moves;
        rt_rebalance_apply(leader, &u);
        rt_rebalance_apply(again, &v);
        rt_rebalance_apply(follower, &t);
        for (int l = 0; l < 7; l++) {
            cr_assert(
                !memcmp(rt_rebalance_slots(leader, l), rt_rebalance_slots(follower, l), 256));
            cr_assert(
                !memcmp(rt_rebalance_shares(leader, l), rt_rebalance_shares(follower, l), 256));
        }
        rt_update_free(&u);
        rt_update_free(&v);
        rt_update_free(&t);
    }
    cr_expect_gt(moved, 0);
    rt_rebalance_close(leader);
    rt_rebalance_close(again);
    rt_rebalance_close(follower);
    free_world(&w);
}

Test(rebalance, a_rank_that_holds_something_else_finds_out) {
    struct world w = make_world(1, 20, 4, 7);
    draw_loads(&w);
    place(&w, 2000);
    struct world other = make_world(1, 20, 4, 7);
    memcpy(other.expert_of_slot, w.expert_of_slot, sizeof(int32_t) * 28);
    int a = 0, b = 7; // two slots that may change places
    while (w.expert_of_slot[a] < 0 || w.expert_of_slot[a] == w.expert_of_slot[b])
        a++;
    other.expert_of_slot[a] = w.expert_of_slot[a + 1];
    other.expert_of_slot[a + 1] = w.expert_of_slot[a];
    draw_loads(&w);
    struct rt_rebalance *leader = open_engine(&w, 1, -1, 0.001),
                        *follower = open_engine(&other, 1, -1, 0.001);
    struct rt_update u, t;
    cr_assert_eq(rt_rebalance_plan(leader, 0, loads_of(&w), &u), MOERT_OK);
    cr_assert_gt(u.num_layers, 0);
    cr_expect_eq(rt_rebalance_check(follower, u.bytes, u.size, &t), MOERT_INVALID);
    cr_expect_null(t.bytes);
    rt_update_free(&u);
    rt_rebalance_close(leader);
    rt_rebalance_close(follower);
    free_world(&w);
    free_world(&other);
}

Test(rebalance, no_byte_of_an_update_may_be_wrong) {
    struct world w = make_world(2, 20, 4, 7);
    w.limits.split = BALANCE_SHARE;
    draw_loads(&w);
    place(&w, 2000);
    draw_loads(&w);
    struct rt_rebalance *leader = open_engine(&w, 2, 6, 0.001),
                        *follower = open_engine(&w, 2, 6, 0.001);
    struct rt_update u, t;
    cr_assert_eq(rt_rebalance_plan(leader, 0, loads_of(&w), &u), MOERT_OK);
    cr_assert(u.num_layers == 2 && u.layers[0].num_moves > 0);
    unsigned char *copy = malloc(u.size);
    for (size_t i = 0; i < u.size; i++)
        for (int bit = 0; bit < 8; bit += 7) {
            memcpy(copy, u.bytes, u.size);
            copy[i] ^= (unsigned char)(1 << bit);
            cr_assert_neq(rt_rebalance_check(follower, copy, u.size, &t), MOERT_OK,
                          "byte %zu, bit %d was taken", i, bit);
            cr_assert_null(t.bytes);
        }
    for (size_t size = 0; size < u.size; size += 3) {
        unsigned char *cut = malloc(size + 1);
        memcpy(cut, u.bytes, size);
        cr_assert_neq(rt_rebalance_check(follower, cut, size, &t), MOERT_OK);
        free(cut);
    }
    cr_expect_eq(rt_rebalance_check(follower, u.bytes, u.size, &t), MOERT_OK);
    free(copy);
    rt_update_free(&u);
    rt_update_free(&t);
    rt_rebalance_close(leader);
    rt_rebalance_close(follower);
    free_world(&w);
}

Test(rebalance, an_update_under_way_is_waited_for_and_may_be_dropped) {
    struct world w = make_world(1, 20, 4, 7);
    draw_loads(&w);
    place(&w, 2000);
    draw_loads(&w);
    struct rt_rebalance *r = open_engine(&w, 1, -1, 0.001);
    struct rt_update u, v;
    cr_assert_eq(rt_rebalance_plan(r, 0, loads_of(&w), &u), MOERT_OK);
    cr_assert_eq(u.num_layers, 1);
    cr_expect(!memcmp(rt_rebalance_slots(r, 0), w.expert_of_slot, sizeof(int32_t) * 28),
              "nothing changes before it is applied");
    cr_assert_eq(rt_rebalance_plan(r, 2, loads_of(&w), &v), MOERT_OK);
    cr_expect_eq(v.num_layers, 0, "planned twice");
    rt_update_free(&v);
    cr_expect_eq(rt_rebalance_check(r, u.bytes, u.size, &v), MOERT_INVALID);
    rt_rebalance_drop(r, &u);
    cr_expect(!memcmp(rt_rebalance_slots(r, 0), w.expert_of_slot, sizeof(int32_t) * 28));
    cr_assert_eq(rt_rebalance_plan(r, 0, loads_of(&w), &v), MOERT_OK);
    cr_expect(v.size == u.size && !memcmp(u.bytes, v.bytes, u.size));
    rt_update_free(&u);
    rt_update_free(&v);
    rt_rebalance_close(r);
    free_world(&w);
}

Test(rebalance, wrong_arguments_are_named) {
    struct world w = make_world(1, 20, 4, 7);
    draw_loads(&w);
    place(&w, 2000);
    struct rt_rebalance_layer layer = {
        .layer = 9, .limits = w.limits, .expert_of_slot = w.expert_of_slot};
    struct rt_rebalance_options o = {1, -1, 0};
    struct rt_rebalance *r;
    cr_expect_eq(rt_rebalance_open(&layer, 0, &o, &r), MOERT_INVALID);
    o.updates_per_iter = 0;
    cr_expect_eq(rt_rebalance_open(&layer, 1, &o, &r), MOERT_INVALID);
    o = (struct rt_rebalance_options){1, -1, NAN};
    cr_expect_eq(rt_rebalance_open(&layer, 1, &o, &r), MOERT_INVALID);
    o.worth = 0;
    layer.limits.slots_per_rank = 4;
    cr_expect_eq(rt_rebalance_open(&layer, 1, &o, &r), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "layer 9: 20 experts need at least 20 slots"), "%s",
              moert_last_error());
    layer.limits.slots_per_rank = 7;
    w.expert_of_slot[3] = 20;
    cr_expect_eq(rt_rebalance_open(&layer, 1, &o, &r), MOERT_INVALID);
    w.expert_of_slot[3] = -1;
    cr_expect_eq(rt_rebalance_open(&layer, 1, &o, &r), MOERT_OK);
    struct rt_update u;
    w.load[0][7] = NAN;
    cr_expect_eq(rt_rebalance_plan(r, 0, loads_of(&w), &u), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "expert 7"), "%s", moert_last_error());
    rt_rebalance_close(r);
    free_world(&w);
}

Test(rebalance, a_lack_of_memory_anywhere_is_said) {
    for (int split = 0; split < 3; split++) {
        struct world w = make_world(1, 20, 4, 7);
        struct rt_update u;
        moert_result result = MOERT_NO_MEMORY;
        long n = 0;
        w.limits.split = (enum balance_split)split;
        draw_loads(&w);
        place(&w, 2000);
        draw_loads(&w);
        struct rt_rebalance *r = open_engine(&w, 1, -1, 0.001);
        for (; result == MOERT_NO_MEMORY && n < 5000; n++) {
            balance_allocations = n;
            result = rt_rebalance_plan(r, 0, loads_of(&w), &u);
            balance_allocations = -1;
        }
        cr_assert_eq(result, MOERT_OK, "%s", moert_last_error());
        cr_expect_gt(n, 20, "what failed at all?");
        cr_expect_eq(u.num_layers, 1);
        rt_update_free(&u);
        rt_rebalance_close(r);
        free_world(&w);
    }
}

/* ---- a bundle's plan ---- */

Test(rebalance, a_bundles_constraints_bind) {
    static const char text[] =
        "model: {name: m, num_hidden_layers: 3, moe_layers: [1, 2], hidden_size: 64,\n"
        "  moe_intermediate_size: 32, num_experts: 16, num_experts_per_tok: 2,\n"
        "  router: {method: softmax_topk, norm_topk_prob: true}}\n"
        "cluster: {ranks: 4, ranks_per_node: 2}\n"
        "target: [host]\ndispatch: balanced\npolicy: p.lua\n"
        "placement: {max_replicas: 2, max_replicas_per_node: 1}\n"
        "moe_config: {load_balancer: {num_slots: 24}}\n";
    static const char policy[] =
        "return {name = 'p', constraints = function(model, cluster) return {\n"
        "  pins = {{layer = 2, slot = 7, expert = 3}},\n"
        "  forbidden = {{layer = 1, expert = 5, rank = 2}}, move_budget = 3} end}\n";
    char dir[] = "/tmp/moec-rebalance-XXXXXX", file[64], lua[64], out[64];
    cr_assert(mkdtemp(dir));
    snprintf(file, sizeof file, "%s/d.yaml", dir);
    snprintf(lua, sizeof lua, "%s/p.lua", dir);
    snprintf(out, sizeof out, "%s/m.moe", dir);
    cr_assert(!file_write(file, text, strlen(text)) &&
              !file_write(lua, policy, strlen(policy)));
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct overrides o = {0};
    struct build_options options = {.jobs = 1, .out = out};
    struct build_report report;
    struct deployment *dep = deployment_read(&a, &d, file, &o);
    struct plan *plan = dep ? plan_make(&a, &d, dep, 1) : NULL;
    bool built = plan && bundle_build(&a, &d, plan, &options, &report);
    diag_print(&d, stderr);
    arena_free(&a);
    cr_assert(built);
    moert_bundle *b;
    struct rt_rebalance *r;
    cr_assert_eq(moert_bundle_open(out, &b), MOERT_OK, "%s", moert_last_error());
    cr_assert_eq(rt_rebalance_open_bundle(b, 0.001, &r), MOERT_OK, "%s", moert_last_error());
    cr_assert_eq(rt_rebalance_layers(r), 2);
    cr_expect_eq(rt_rebalance_rotation(r), 3);
    struct world w = make_world(2, 16, 4, 6);
    uint8_t forbidden[16 * 4] = {[5 * 4 + 2] = 1};
    int pin[24];
    for (int s = 0; s < 24; s++)
        pin[s] = s == 7 ? 3 : -1;
    int moved = 0;
    for (int i = 0; i < 30; i++) {
        struct rt_update u;
        draw_loads(&w);
        cr_assert_eq(rt_rebalance_plan(r, i, loads_of(&w), &u), MOERT_OK);
        w.limits = (struct balance_problem){.ranks_per_node = 2};
        expect_moves(&w, r, &u, 3);
        rt_rebalance_apply(r, &u);
        for (int l = 0; l < u.num_layers; l++)
            moved += u.layers[l].num_moves;
        rt_update_free(&u);
        w.limits = (struct balance_problem){
            .max_replicas = 2, .ranks_per_node = 2, .max_per_node = 1, .forbidden = forbidden};
        expect_legal(&w, rt_rebalance_slots(r, 0));
        w.limits = (struct balance_problem){.max_replicas = 2, .pin = pin};
        expect_legal(&w, rt_rebalance_slots(r, 1));
    }
    cr_expect_gt(moved, 20);
    free_world(&w);
    rt_rebalance_close(r);
    moert_bundle_close(b);
    dir_remove(dir);
}

/* ---- the loads move from one recorded workload to another ---- */

static const char *const workloads[] = {"prefill_in512", "decode_in1000out1000",
                                        "prefill_in1024", "prefill_in2048",
                                        "decode_in2000out100"};
#ifdef __SANITIZE_ADDRESS__
enum { WORKLOADS = 2 };
#else
enum { WORKLOADS = 5 };
#endif

// `moec simulate --online` of DeepSeek-V3 on 32 ranks with 288 slots, as JSON.
static struct node *simulate(struct arena *a, struct diags *d, const char *settle,
                             const char *rotations) {
    char dir[] = "/tmp/moec-rebalance-XXXXXX", file[64], out[64], here[512], *text;
    size_t len;
    int status;
    struct buf yaml = {.arena = a};
    for (int i = 0; i < WORKLOADS; i++) {
        snprintf(here, sizeof here, "../shared/data/loads/deepseek-v3/%s.csv", workloads[i]);
        if (access(here, R_OK))
            cr_skip_test("%s is not here", here);
    }
    cr_assert(mkdtemp(dir) && getcwd(here, sizeof here));
    snprintf(file, sizeof file, "%s/d.yaml", dir);
    snprintf(out, sizeof out, "%s/out", dir);
    buf_printf(&yaml,
               "model: %s/plans/models/deepseek-v3.yaml\n"
               "cluster: %s/plans/clusters/h200-32.yaml\n"
               "moe_config: {load_balancer: {num_slots: 288}}\nloads:\n",
               here, here);
    for (int i = 0; i < WORKLOADS; i++)
        buf_printf(&yaml, "- %s/../shared/data/loads/deepseek-v3/%s.csv\n", here, workloads[i]);
    cr_assert_eq(file_write(file, yaml.data, yaml.len), 0);
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        char *argv[] = {"simulate",        file,       "--online",     "--json", "--rotations",
                        (char *)rotations, "--settle", (char *)settle, NULL};
        if (!freopen(out, "w", stdout) || !freopen("/dev/null", "w", stderr))
            _exit(99);
        optind = 0;
        int code = cmd_simulate(8, argv);
        fflush(NULL);
        _exit(code);
    }
    cr_assert(waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
    cr_assert_eq(file_read(a, out, 1 << 20, &text, &len), 0);
    dir_remove(dir);
    return yaml_parse(a, d, "out", text, len);
}

static double number(struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    cr_assert(n, "no %s", key);
    return strtod(n->text, NULL);
}

static void expect_turn(struct node *shifts, int turn, double most, double mean) {
    double sum = 0, moved = 0;
    printf("after rotation %d:\n", turn + 1);
    for (int i = 0; i < shifts->count; i++) {
        struct node *shift = shifts->items[i];
        struct node *t = map_get(shift, "rotations")->items[turn];
        double x = number(t, "imbalance"), percent = number(t, "percent");
        printf("  %-24s -> %-24s %.4f, then %.4f with %.2f %% of the bytes\n",
               map_get(shift, "from")->text, map_get(shift, "to")->text,
               number(shift, "before"), x, percent);
        cr_expect_leq(x, most);
        cr_expect_leq(percent, 2);
        sum += x;
        moved += percent;
    }
    printf("  mean %.4f, %.2f %%\n", sum / shifts->count, moved / shifts->count);
    cr_expect(sum / shifts->count <= mean || WORKLOADS < 5);
}

static struct node *shifts_of(struct arena *a, struct diags *d, const char *settle,
                              const char *rotations) {
    struct node *shifts = map_get(simulate(a, d, settle, rotations), "shifts");
    cr_assert_eq(shifts->count, WORKLOADS * (WORKLOADS - 1));
    return shifts;
}

Test(rebalance, one_rotation_brings_a_new_workload_into_balance) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    printf("max/mean when the statistics know the new loads, and bytes of planning anew\n");
    expect_turn(shifts_of(&a, &d, "50", "1"), 0, 1.04, 1.03);
    arena_free(&a);
}

// The first layers have their turn when the statistics are of the old workload still.
Test(rebalance, a_sudden_change_takes_two) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct node *shifts = shifts_of(&a, &d, "1", "2");
    printf("the same after a sudden change\n");
    expect_turn(shifts, 0, 1.08, 1.04);
    expect_turn(shifts, 1, 1.04, 1.03);
    arena_free(&a);
}
