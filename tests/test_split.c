// The batch split and the plans made for it, against maximum flows: an optimum that proves itself.
#include "dice.h"
#include "../compiler/balance.h"
#include "../compiler/split.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_E = 256, MAX_R = 72, MAX_SLOTS = 512, LAYERS = 58, SETS = 5 };
#ifdef __SANITIZE_ADDRESS__
enum { STEP = 12, TIMED = 0 };
#else
enum { STEP = 1, TIMED = 1 };
#endif
enum { LOOKED = (LAYERS + STEP - 1) / STEP }; // figures look at every STEPth layer

TestSuite(split, .timeout = 300);

static double cpu_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

struct place { // a fixed placement
    int experts, ranks, slots;
    const int *slot;
    const double *speed;
};

static double speed_of(const struct place *p, int r) {
    return p->speed ? p->speed[r] : 1;
}

// ---- the best split there is: maximum flows (Dinic) ----

// Nodes: experts, ranks, source, sink. An arc's opposite is its index ^ 1.
struct arc {
    int to, next;
    double room;
};
static struct arc arcs[4096];
static int head[MAX_E + MAX_R + 2], level[MAX_E + MAX_R + 2], at[MAX_E + MAX_R + 2], arcs_used;
static const double NOTHING = 1e-13; // of all load

static void add_arc(int from, int to, double room) {
    arcs[arcs_used] = (struct arc){to, head[from], room};
    head[from] = arcs_used++;
    arcs[arcs_used] = (struct arc){from, head[to], 0};
    head[to] = arcs_used++;
}

static bool find_levels(int source, int sink) {
    int queue[MAX_E + MAX_R + 2], n = 1;
    memset(level, -1, sizeof level);
    level[queue[0] = source] = 0;
    for (int i = 0; i < n; i++)
        for (int a = head[queue[i]]; a >= 0; a = arcs[a].next)
            if (arcs[a].room > NOTHING && level[arcs[a].to] < 0) {
                level[arcs[a].to] = level[queue[i]] + 1;
                queue[n++] = arcs[a].to;
            }
    return level[sink] >= 0;
}

static double push(int node, int sink, double most) {
    if (node == sink)
        return most;
    for (; at[node] >= 0; at[node] = arcs[at[node]].next) {
        struct arc *a = arcs + at[node];
        if (a->room <= NOTHING || level[a->to] != level[node] + 1)
            continue;
        double flow = push(a->to, sink, fmin(most, a->room));
        if (flow > NOTHING) {
            a->room -= flow;
            arcs[at[node] ^ 1].room += flow;
            return flow;
        }
    }
    return 0;
}

// How much of the load (parts that sum to 1) fits when no rank may take longer than time. The
// last levels then tell the side of the minimal cut where the source is.
static double fits(const struct place *p, const double *part, double time) {
    int E = p->experts, source = E + p->ranks, sink = source + 1;
    double sum = 0, flow;
    memset(head, -1, sizeof head);
    arcs_used = 0;
    for (int e = 0; e < E; e++)
        add_arc(source, e, part[e]);
    for (int i = 0; i < p->ranks * p->slots; i++)
        if (p->slot[i] >= 0)
            add_arc(p->slot[i], E + i / p->slots, 2);
    for (int r = 0; r < p->ranks; r++)
        add_arc(E + r, sink, time * speed_of(p, r));
    while (find_levels(source, sink)) {
        memcpy(at, head, sizeof at);
        while ((flow = push(source, sink, 2)) > NOTHING)
            sum += flow;
    }
    return sum;
}

// The least possible largest rank time. From below, experts that all live inside a set of ranks
// need load/speed of that set at least; while that much does not fit, the cut names a set that
// needs more. So at the end a set proves the lower bound, and a flow that it is reached.
static double best_time(const struct place *p, const double *load) {
    double part[MAX_E], total = 0, speeds = 0, time;
    for (int e = 0; e < p->experts; e++)
        total += load[e];
    for (int e = 0; e < p->experts; e++)
        part[e] = load[e] / total;
    for (int r = 0; r < p->ranks; r++)
        speeds += speed_of(p, r);
    for (time = 1 / speeds; fits(p, part, time) < 1 - 1e-10;) {
        double inside = 0, speed = 0;
        for (int r = 0; r < p->ranks; r++)
            speed += level[p->experts + r] >= 0 ? speed_of(p, r) : 0;
        for (int e = 0; e < p->experts; e++) {
            bool closed = true;
            for (int i = 0; i < p->ranks * p->slots; i++)
                closed &= p->slot[i] != e || level[p->experts + i / p->slots] >= 0;
            inside += closed ? part[e] : 0;
        }
        cr_assert_gt(inside / speed, time, "the cut does not prove more than it did");
        time = inside / speed;
    }
    return time * total;
}

Test(split, the_flow_finds_best_times_known_by_hand) {
    // ranks {0,1} {1,2} {2,3}
    static const int slot[] = {0, 1, 1, 2, 2, 3};
    struct place p = {4, 3, 2, slot};
    cr_expect_float_eq(best_time(&p, (const double[]){0, 6, 0, 3}), 3, 1e-8);
    cr_expect_float_eq(best_time(&p, (const double[]){6, 1, 1, 1}), 6, 1e-8);
    cr_expect_float_eq(best_time(&p, (const double[]){4, 4, 0, 1}), 4, 1e-8);
    cr_expect_float_eq(best_time(&p, (const double[]){4, 5, 0, 0}), 4.5, 1e-8);
    p.speed = (const double[]){2, 1, 1};
    cr_expect_float_eq(best_time(&p, (const double[]){4, 5, 0, 0}), 3, 1e-8);
    cr_expect_float_eq(best_time(&p, (const double[]){0, 0, 0, 8}), 8, 1e-8);
}

// ---- placements, batches ----

static double loads[SETS][LAYERS][MAX_E]; // each layer sums to 1
static const int shapes[5][2] = {{272, 16}, {288, 32}, {320, 32}, {288, 72}, {320, 64}};

static void read_loads(void) {
    static const char *const names[SETS] = {"decode_in1000out1000", "decode_in2000out100",
                                            "prefill_in1024", "prefill_in2048",
                                            "prefill_in512"};
    for (int w = 0; w < SETS; w++) {
        char path[128];
        sprintf(path, "../shared/data/loads/deepseek-v3/%s.csv", names[w]);
        FILE *f = fopen(path, "r");
        if (!f)
            cr_skip_test("%s is not here", path);
        for (int l = 0; l < LAYERS; l++) {
            double sum = 0;
            for (int e = 0; e < 256; e++) {
                cr_assert_eq(fscanf(f, "%lf%*c", &loads[w][l][e]), 1);
                sum += loads[w][l][e];
            }
            for (int e = 0; e < 256; e++)
                loads[w][l][e] /= sum;
        }
        fclose(f);
    }
}

// tokens draws of an expert.
static void draw_batch(const double *load, int experts, int tokens, int64_t *count) {
    double sum[MAX_E], total = 0;
    for (int e = 0; e < experts; e++)
        sum[e] = total += load[e];
    memset(count, 0, sizeof *count * experts);
    for (int i = 0; i < tokens; i++) {
        double u = roll() * total;
        int low = 0, high = experts - 1;
        while (low < high) {
            int middle = (low + high) / 2;
            if (sum[middle] > u)
                high = middle;
            else
                low = middle + 1;
        }
        count[low]++;
    }
}

// EPLB's global greedy: a replica to the largest part, the largest part to the lightest rank.
static void greedy(int ranks, int slots, const double *load, int *slot) {
    int count[MAX_E], order[MAX_SLOTS], used[MAX_R] = {0}, n = 0;
    double time[MAX_R] = {0};
    for (int e = 0; e < 256; e++)
        count[e] = 1;
    for (int i = 256; i < ranks * slots; i++) {
        int best = 0;
        for (int e = 1; e < 256; e++)
            best = load[e] / count[e] > load[best] / count[best] ? e : best;
        count[best]++;
    }
    for (int e = 0; e < 256; e++)
        for (int c = 0; c < count[e]; c++) {
            int i = n++;
            for (; i > 0 && load[order[i - 1]] / count[order[i - 1]] < load[e] / count[e]; i--)
                order[i] = order[i - 1];
            order[i] = e;
        }
    for (int i = 0; i < n; i++) {
        int best = -1;
        for (int r = 0; r < ranks; r++)
            if (used[r] < slots && (best < 0 || time[r] < time[best]))
                best = r;
        slot[best * slots + used[best]++] = order[i];
        time[best] += load[order[i]] / count[order[i]];
    }
}

struct random_place {
    struct place p;
    int slot[MAX_SLOTS];
    double speed[MAX_R];
    int64_t count[MAX_E];
};

// Some empty slots, experts on one rank or many (twice on one rank among them), zero counts,
// unequal speeds.
static void draw_place(struct random_place *q) {
    int E = 1 + pick(40), R = 1 + pick(12), S = (E + R - 1) / R + pick(4);
    q->p = (struct place){E, R, S, q->slot, pick(2) ? q->speed : NULL};
    for (int i = 0; i < R * S; i++)
        q->slot[i] = pick(8) ? pick(E) : -1;
    for (int e = 0, stride = E <= R * S / 2 ? 2 : 1; e < E; e++)
        q->slot[e * stride] = e;
    for (int r = 0; r < R; r++)
        q->speed[r] = 0.25 + roll() * 2;
    for (int e = 0; e < E; e++)
        q->count[e] = pick(4) ? pick(1 << (1 + pick(14))) : 0;
    q->count[0]++;
}

static double split(const struct place *p, const int64_t *count, int64_t *tokens) {
    return balance_split_batch(p->experts, p->ranks, p->slots, p->slot, p->speed, count,
                               tokens);
}

Test(split, every_token_goes_to_a_slot_of_its_expert) {
    static struct random_place q;
    static int64_t tokens[MAX_SLOTS];
    for (int n = 0; n < 3000; n++) {
        draw_place(&q);
        double time = split(&q.p, q.count, tokens), slowest = 0;
        int64_t sum[MAX_E] = {0};
        for (int i = 0; i < q.p.ranks * q.p.slots; i++) {
            cr_assert_geq(tokens[i], 0, "batch %d, slot %d", n, i);
            cr_assert(q.slot[i] >= 0 || !tokens[i], "batch %d: empty slot %d", n, i);
            if (q.slot[i] >= 0)
                sum[q.slot[i]] += tokens[i];
        }
        for (int e = 0; e < q.p.experts; e++)
            cr_assert_eq(sum[e], q.count[e], "batch %d, expert %d", n, e);
        for (int r = 0; r < q.p.ranks; r++) {
            double load = 0;
            for (int j = 0; j < q.p.slots; j++)
                load += (double)tokens[r * q.p.slots + j];
            slowest = fmax(slowest, load / speed_of(&q.p, r));
        }
        cr_assert_float_eq(time, slowest, 1e-9 * slowest);
    }
}

Test(split, random_batches_are_as_fast_as_flows_allow) {
    static struct random_place q;
    static int64_t tokens[MAX_SLOTS];
    double worst = 0, sum = 0;
    enum { BATCHES = 2000 };
    for (int n = 0; n < BATCHES; n++) {
        draw_place(&q);
        double load[MAX_E], token = 0;
        for (int e = 0; e < q.p.experts; e++)
            load[e] = (double)q.count[e];
        for (int r = 0; r < q.p.ranks; r++)
            token = fmax(token, 1 / speed_of(&q.p, r));
        double best = best_time(&q.p, load), time = split(&q.p, q.count, tokens);
        cr_assert_geq(time, best * (1 - 1e-9), "batch %d: faster than possible", n);
        double gap = fmax(0, time - best - 2 * token) / best; // tokens are whole
        worst = fmax(worst, gap);
        sum += gap;
    }
    printf("random batches, beyond two tokens: mean gap %.1e, worst %.1e\n", sum / BATCHES,
           worst);
    cr_expect_leq(sum / BATCHES, 2e-4);
    cr_expect_leq(worst, 2e-2);
}

Test(split, the_same_batch_is_split_the_same_way) {
    static struct random_place q;
    static int64_t tokens[MAX_SLOTS], again[MAX_SLOTS];
    for (int n = 0; n < 300; n++) {
        draw_place(&q);
        split(&q.p, q.count, tokens);
        memset(again, 0xff, sizeof again);
        split(&q.p, q.count, again);
        cr_assert_arr_eq(tokens, again, sizeof *tokens * q.p.ranks * q.p.slots);
    }
}

Test(split, the_order_of_ranks_hardly_matters) {
    read_loads();
    static int64_t tokens[MAX_SLOTS], count[MAX_E];
    static int slot[MAX_SLOTS], turned[MAX_SLOTS];
    for (int l = 0; l < LAYERS; l += 3) {
        greedy(32, 9, loads[0][l], slot);
        for (int i = 0; i < 288; i++)
            turned[i] = slot[(i / 9 * 11 + 5) % 32 * 9 + (i % 9 + 4) % 9];
        draw_batch(loads[2][l], 256, 32 * 1024, count);
        struct place p = {256, 32, 9, slot}, t = {256, 32, 9, turned};
        double a = split(&p, count, tokens), b = split(&t, count, tokens);
        cr_expect_leq(fabs(a - b), 0.003 * a, "layer %d: %g and %g tokens", l, a, b);
    }
}

// ---- plans ----

struct random_problem {
    struct balance_problem p;
    double load[3 * 24], weight[3], speed[8];
    int capacity[8], pin[48], current[48];
    uint8_t forbidden[24 * 8];
};

// Every limit that a plan may have, each with some chance.
static void draw_problem(struct random_problem *q) {
    int E = 1 + pick(24), R = 1 + pick(8), S = (E + R - 1) / R + pick(3), W = 1 + pick(3);
    S = S * R > 48 ? 48 / R : S;
    q->p = (struct balance_problem){.experts = E, .ranks = R, .slots_per_rank = S};
    struct balance_problem *p = &q->p;
    p->workloads = W;
    p->load = q->load;
    p->split = BALANCE_BALANCED;
    p->seed = (uint64_t)pick(1000);
    for (int i = 0; i < W * E; i++)
        q->load[i] = pick(6) ? pow(roll(), 3) : 0;
    for (int i = 0; i < W; i++)
        q->weight[i] = 0.5 + roll();
    for (int i = 0; i < R; i++) {
        q->speed[i] = 0.5 + roll();
        q->capacity[i] = S - !pick(4);
    }
    for (int i = 0; i < R * S; i++) {
        q->pin[i] = pick(8) ? -1 : pick(E);
        q->current[i] = pick(9) ? pick(E) : -1;
    }
    for (int i = 0; i < E * R; i++)
        q->forbidden[i] = !pick(10);
    p->weight = pick(2) ? q->weight : NULL;
    p->speed = pick(2) ? q->speed : NULL;
    p->capacity = pick(3) ? NULL : q->capacity;
    p->pin = pick(3) ? NULL : q->pin;
    p->forbidden = pick(3) ? NULL : q->forbidden;
    p->max_replicas = pick(3) ? 0 : 1 + pick(3);
    p->ranks_per_node = pick(2) ? 0 : 1 + pick(R);
    p->max_per_node = p->ranks_per_node && pick(2) ? 1 + pick(2) : 0;
    p->current = pick(2) ? NULL : q->current;
    p->moves = p->current && pick(2) ? -1 : pick(8);
}

// A limit that a placement breaks, as text; "" for none.
static const char *broken(const struct balance_problem *p, const int *slot) {
    int S = p->slots_per_rank, size = p->ranks_per_node ? p->ranks_per_node : p->ranks;
    for (int e = 0; e < p->experts; e++) {
        int count = 0, node[8] = {0};
        for (int r = 0; r < p->ranks; r++) {
            int here = 0;
            for (int j = 0; j < S; j++)
                here += slot[r * S + j] == e;
            count += here;
            node[r / size] += here;
            if (here > 1)
                return "an expert twice on a rank";
            if (here && p->forbidden && p->forbidden[e * p->ranks + r])
                return "an expert where it may not be";
            if (p->max_per_node && node[r / size] > p->max_per_node)
                return "too many replicas in a node";
        }
        if (!count || (p->max_replicas && count > p->max_replicas))
            return count ? "too many replicas" : "an expert is missing";
    }
    for (int i = 0; i < p->ranks * S; i++) {
        if (p->pin && p->pin[i] >= 0 && p->pin[i] != slot[i])
            return "a pinned slot has another expert";
        if (p->capacity && i % S >= p->capacity[i / S] && slot[i] >= 0)
            return "a slot beyond the capacity";
    }
    return "";
}

// Mean over workloads of the best max/mean rank time.
static double best_mean(const struct balance_problem *p, const int *slot) {
    struct place place = {p->experts, p->ranks, p->slots_per_rank, slot, p->speed};
    double sum = 0, weights = 0, speeds = 0;
    for (int r = 0; r < p->ranks; r++)
        speeds += p->capacity && !p->capacity[r] ? 0 : speed_of(&place, r);
    for (int w = 0; w < p->workloads; w++) {
        double total = 0, weight = p->weight ? p->weight[w] : 1;
        for (int e = 0; e < p->experts; e++)
            total += p->load[w * p->experts + e];
        if (total <= 0)
            continue;
        sum += weight * best_time(&place, p->load + w * p->experts) / total * speeds;
        weights += weight;
    }
    return weights > 0 ? sum / weights : 1;
}

static int moved(const struct balance_problem *p, const int *slot) {
    int n = 0;
    for (int i = 0; p->current && i < p->ranks * p->slots_per_rank; i++)
        n += slot[i] >= 0 && slot[i] != p->current[i];
    return n;
}

// A random current placement can break limits, and mending it costs moves: budgets are checked on
// placements that were planned.
static void expect_budget(struct balance_problem p, const int *slot) {
    int current[48], next[48];
    struct balance_result r;
    memcpy(current, slot, sizeof current);
    p.current = current;
    p.moves = pick(5);
    cr_assert(balance_plan(&p, next, NULL, &r));
    cr_assert_str_empty(broken(&p, next), "%s, after moves", broken(&p, next));
    cr_assert_leq(moved(&p, next), p.moves);
    cr_assert_eq(moved(&p, next), r.moved);
}

Test(split, plans_of_random_problems_keep_every_limit) {
    static struct random_problem q;
    int planned = 0, slot[48], again[48];
    for (int i = 0; i < 800 / STEP; i++) {
        draw_problem(&q);
        struct balance_result r;
        if (balance_check(&q.p))
            continue;
        cr_assert(balance_plan(&q.p, slot, NULL, &r) && balance_plan(&q.p, again, NULL, &r));
        cr_assert_arr_eq(slot, again, sizeof *slot * q.p.ranks * q.p.slots_per_rank);
        cr_assert_str_empty(broken(&q.p, slot), "problem %d: %s", i, broken(&q.p, slot));
        double best = best_mean(&q.p, slot);
        cr_assert(r.imbalance > best * (1 - 1e-6) && r.imbalance < best * (1 + 1e-3),
                  "problem %d: %.9g, the flow says %.9g", i, r.imbalance, best);
        cr_assert_leq(r.bound, best * (1 + 1e-6), "problem %d", i);
        expect_budget(q.p, slot);
        planned++;
    }
    cr_assert_gt(planned, 200 / STEP);
}

// All placements of the slots from `at` on; the best value.
static double least_of(const struct balance_problem *p, int *slot, int at) {
    if (at == p->ranks * p->slots_per_rank)
        return *broken(p, slot) ? 1e9 : best_mean(p, slot);
    double least = 1e9;
    for (slot[at] = 0; slot[at] < p->experts; slot[at]++)
        if (at % p->slots_per_rank == 0 || slot[at] > slot[at - 1])
            least = fmin(least, least_of(p, slot, at + 1));
    return least;
}

Test(split, tiny_plans_are_nearly_as_good_as_any) {
    double sum = 0, worst = 0;
    int n = 60 / STEP;
    for (int i = 0; i < n; i++) {
        double load[2 * 5];
        int slot[6], other[6];
        for (int e = 0; e < 10; e++)
            load[e] = 0.01 + pow(roll(), 3);
        struct balance_problem p = {.experts = 4 + pick(2), .ranks = 3, .slots_per_rank = 2};
        p.workloads = 1;
        p.load = load;
        p.split = BALANCE_BALANCED;
        struct balance_result r;
        cr_assert(balance_plan(&p, slot, NULL, &r));
        double gap = best_mean(&p, slot) / least_of(&p, other, 0) - 1;
        sum += gap;
        worst = fmax(worst, gap);
    }
    printf("tiny problems: mean %.1e above the best placement, worst %.1e\n", sum / n, worst);
    cr_expect_leq(sum / n, 5e-3);
    cr_expect_leq(worst, 0.1);
}

// ---- figures ----

// The machine may be busy: twice the time is allowed where time is checked.
static void expect_time(double took, double allowed, const char *what) {
    if (TIMED)
        cr_expect_leq(took, 2 * allowed, "%s: %.2f", what, took);
}

struct gaps {
    double sum, worst, us;
    int n;
};

static void one_batch(const struct place *p, const int64_t *count, struct gaps *g) {
    static int64_t tokens[MAX_SLOTS];
    enum { AGAIN = 5 };
    double load[MAX_E], time = 0, start = cpu_ms();
    for (int i = 0; i < AGAIN; i++)
        time = split(p, count, tokens);
    g->us += (cpu_ms() - start) / AGAIN * 1e3;
    for (int e = 0; e < p->experts; e++)
        load[e] = (double)count[e];
    double gap = time / best_time(p, load) - 1;
    g->sum += gap;
    g->worst = fmax(g->worst, gap);
    g->n++;
}

// Greedy placements of the mean of four sets, batches of the fifth, tokens per rank.
Test(split, batches_are_within_a_thousandth_of_the_optimum) {
    read_loads();
    printf("whole-token split against maximum flow, 58 layers of DeepSeek-V3:\n");
    for (int k = 0; k < 5; k++)
        for (int tokens = 1024; tokens <= 8192; tokens *= 8) {
            struct gaps g = {0};
            int R = shapes[k][1], S = shapes[k][0] / R, slot[MAX_SLOTS];
            for (int l = 0; l < LAYERS; l++) {
                double mean[MAX_E] = {0};
                int64_t count[MAX_E];
                for (int w = 0; w < SETS; w++)
                    for (int e = 0; e < 256; e++)
                        mean[e] += w == l % SETS ? 0 : loads[w][l][e];
                greedy(R, S, mean, slot);
                struct place p = {256, R, S, slot};
                draw_batch(loads[l % SETS][l], 256, R * tokens, count);
                one_batch(&p, count, &g);
            }
            printf("  %d/%-2d %4d a rank: mean gap %.1e  worst %.1e  %5.1f us\n", shapes[k][0],
                   R, tokens, g.sum / g.n, g.worst, g.us / g.n);
            cr_expect_leq(g.sum / g.n, 1e-3);
            cr_expect_leq(g.worst, 4e-3);
            expect_time(g.us / g.n, R <= 32 ? 20 : 25, "us a batch");
        }
}

static double excess(int ranks, int slots, const int *slot, const double *load) {
    struct place p = {256, ranks, slots, slot};
    return best_time(&p, load) * ranks - 1;
}

Test(split, a_workload_that_was_held_out_runs_well) {
    read_loads();
    static double train[4 * 256];
    double old_all = 0, new_all = 0;
    printf("held out: planned on 4 sets, run on the fifth, best split; %d layers:\n", LOOKED);
    for (int k = 0; k < 5; k++) {
        double old_sum = 0, new_sum = 0, ms = 0;
        int R = shapes[k][1], S = shapes[k][0] / R;
        for (int held = 0; held < SETS; held++)
            for (int l = 0; l < LAYERS; l += STEP) {
                double mean[256] = {0};
                int slot[MAX_SLOTS], n = 0;
                for (int w = 0; w < SETS; w++)
                    for (int e = 0; w != held && e < 256; e++) {
                        train[n++] = loads[w][l][e];
                        mean[e] += loads[w][l][e];
                    }
                greedy(R, S, mean, slot);
                old_sum += excess(R, S, slot, loads[held][l]);
                struct balance_problem p = {.experts = 256, .ranks = R, .slots_per_rank = S};
                p.workloads = 4;
                p.load = train;
                p.split = BALANCE_BALANCED;
                struct balance_result r;
                double start = cpu_ms();
                cr_assert(balance_plan(&p, slot, NULL, &r));
                ms += cpu_ms() - start;
                new_sum += excess(R, S, slot, loads[held][l]);
            }
        int n = SETS * LOOKED;
        printf("  %d/%d greedy %.4f  planned %.4f  excess %.3f of it  %.2f ms a layer\n",
               shapes[k][0], R, 1 + old_sum / n, 1 + new_sum / n, new_sum / old_sum, ms / n);
        expect_time(ms / n, 5, "ms a layer");
        old_all += old_sum;
        new_all += new_sum;
    }
    printf("  all: excess %.4f of the greedy's\n", new_all / old_all);
    cr_expect_leq(new_all / old_all, 0.45);
}

// Window t of a walk through the sets, five from each to the next.
static void window(int layer, int t, double *load) {
    const double *a = loads[t / 5][layer], *b = loads[(t + 4) / 5][layer];
    for (int e = 0; e < 256; e++)
        load[e] = a[e] + (b[e] - a[e]) * (t % 5) / 5;
}

struct walked {
    double sum, moved, ms;
    int windows, most_moved;
};

// Planned on the first window alone, then on the last two, judged on the next.
static void walk(int layer, int moves, struct walked *k) {
    double load[2 * 256], next[256];
    int slot[288], current[288];
    struct balance_problem p = {.experts = 256, .ranks = 32, .slots_per_rank = 9};
    struct balance_result r;
    p.split = BALANCE_BALANCED;
    p.load = load;
    p.weight = (const double[]){0.5, 1};
    for (int t = 0; t < 20; t++) {
        p.workloads = t ? 2 : 1;
        window(layer, t ? t - 1 : 0, load);
        window(layer, t, load + (t ? 256 : 0));
        window(layer, t + 1, next);
        double start = cpu_ms();
        cr_assert(balance_plan(&p, slot, NULL, &r));
        if (t) {
            k->ms += cpu_ms() - start;
            k->moved += r.moved;
            k->most_moved = r.moved > k->most_moved ? r.moved : k->most_moved;
        }
        memcpy(current, slot, sizeof slot);
        p.current = current;
        p.moves = moves;
        k->sum += 1 + excess(32, 9, slot, next);
        k->windows++;
    }
}

Test(split, one_workload_is_planned_to_a_thousandth) {
    read_loads();
    printf("one workload, best split, mean of %d layers:\n", LOOKED);
    for (int k = 0; k < 5; k++) {
        double sum = 0, worst = 0, ms = 0;
        int slot[MAX_SLOTS], n = 0;
        struct balance_problem p = {.experts = 256, .ranks = shapes[k][1], .workloads = 1};
        p.slots_per_rank = shapes[k][0] / p.ranks;
        p.split = BALANCE_BALANCED;
        for (int l = 0; l < LAYERS; l += STEP, n++) {
            struct balance_result r;
            p.load = loads[l % SETS][l];
            double start = cpu_ms();
            cr_assert(balance_plan(&p, slot, NULL, &r));
            ms += cpu_ms() - start;
            double above = excess(p.ranks, p.slots_per_rank, slot, p.load);
            sum += above;
            worst = fmax(worst, above);
        }
        printf("  %d/%d %.5f  worst %.5f  %.2f ms a layer\n", shapes[k][0], p.ranks,
               1 + sum / n, 1 + worst, ms / n);
        cr_expect_leq(sum / n, k == 3 ? 5e-3 : 1e-3);
    }
}

Test(split, two_moved_slots_follow_the_load) {
    read_loads();
    static const int moves[] = {1, 2, 4, 8};
    static const double most[] = {1.04, 1.03, 1.025, 1.025};
    printf("incremental, 288/32, best split, on the next window; %d layers:\n", LOOKED);
    for (int i = 0; i < 4; i++) {
        struct walked k = {0};
        for (int l = 0; l < LAYERS; l += STEP)
            walk(l, moves[i], &k);
        double planned = k.windows * 19 / 20;
        printf("  at most %d slots a window: %.4f (%.2f moved, %.2f ms)\n", moves[i],
               k.sum / k.windows, k.moved / planned, k.ms / planned);
        cr_expect_leq(k.most_moved, moves[i]);
        cr_expect_leq(k.sum / k.windows, most[i]);
        expect_time(k.ms / planned, 2, "ms a layer");
    }
}
