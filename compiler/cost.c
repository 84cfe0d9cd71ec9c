/* What a step costs, on paper: one layer on its slowest rank is
 *
 *   max(bytes / bandwidth, FLOP / rate) + combine + launches + exchange
 *
 * times the layers, times the passes that a batch is split into. Only +, -, x and /, so that every
 * machine prints the same. Attention and all else that is no MoE layer is not in it. The figures
 * below were measured on one H200 with the best public kernels, or published by their authors;
 * tests/test_cost.c holds the model against such measurements. */
#include "balance.h"
#include "moec.h"

/* Measured on an H200: a read streams 4.40 of 4.80 TB/s; large dense products reach 779 of 989
 * (bf16) and 1425 of 1979 (fp8) TFLOP/s. */
#define MEMORY_REACHED 0.917
#define BF16_REACHED 0.788
#define FP8_REACHED 0.72
/* Grouped GEMMs against those products, measured on six shapes at 128 to 2048 rows per expert:
 * time x rate / FLOP is 2.0 at 128 rows, 1.62 at 227, 1.41 at 512, 1.28 at 910, 1.21 at 2048, that
 * is 1.17 + 106 / rows: tiles that are not full and a last wave that is not. */
#define GEMM_SLOWDOWN 1.17
#define GEMM_ROWS 106.0
/* The best of these kernels take their bytes at full bandwidth and about 25 us more in every batch
 * that memory bounds; they are five launches, replayed from a graph. */
#define LAUNCH_US 5.0
enum { LAUNCHES = 5, SHARED_LAUNCHES = 2 };

/* One-sided exchange on GB200, 8 ranks, bf16: 31.7 us dispatch and 38.1 combine at 128 tokens, 312
 * and 323 at 2048; 64 ranks: 41.6 and 44.5. That is 0.77 of the link, and per phase 16 us and 0.1
 * per rank. Two-sided FIFOs reach the same 0.77 (153 of 200 GB/s on H800). */
#define NVLINK_REACHED 0.77
#define ONESIDED_US 16.0
#define ONESIDED_RANK_US 0.1
/* NCCL's own alltoall of tiny messages: 11.8 to 13.1 us on 8 ranks, 28 to 35 on 32; taken for its
 * other collectives, too. Crossing to another node: 10 us more. */
#define NCCL_US 6.0
#define NCCL_RANK_US 0.8
#define NIC_US 10.0
/* 64 ranks over 50 GB/s each: 178 us where the wire alone takes 129. */
#define NIC_REACHED 0.72
/* Beside a token's row: its experts, weights and origin. */
enum { META_BYTES = 80, PART_ALIGN = 256 };

static double larger(double a, double b) {
    return a > b ? a : b;
}

static double power(double x, long long n) {
    double r = 1;
    for (; n > 0; n >>= 1, x *= x)
        if (n & 1)
            r *= x;
    return r;
}

/* ---- sizes ---- */

static double matrices(const struct model *m) {
    return m->activation == MOE_ACT_RELU2 ? 2 : 3;
}

static double expert_params(const struct model *m, int inter) {
    return matrices(m) * m->hidden_size * inter;
}

static double aligned(double bytes) {
    long long n = ((long long)bytes + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;
    return (double)n;
}

static double blocks(int n) {
    return (n + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK;
}

/* The scales of an expert's two weights. */
static double scale_bytes(const struct model *m, int inter) {
    double each = 4 * blocks(inter) * blocks(m->hidden_size);
    return aligned(each * (matrices(m) - 1)) + aligned(each);
}

/* The record of runtime/bundle.h: weights that are whole parts, their scales, then the biases. */
double cost_slot_bytes(const struct cost_setup *s) {
    const struct model *m = s->model;
    double bytes = (s->fp8 ? 1 : 2) * expert_params(m, m->moe_intermediate_size);
    if (s->fp8)
        bytes += scale_bytes(m, m->moe_intermediate_size);
    if (m->weights.bias)
        bytes += aligned(4 * (matrices(m) - 1) * m->moe_intermediate_size) +
                 aligned(4.0 * m->hidden_size);
    return bytes;
}

static int passes(const struct cost_setup *s, int tokens) {
    long long all = (long long)tokens * s->ranks;
    return all > s->max_num_tokens ? (int)((all + s->max_num_tokens - 1) / s->max_num_tokens)
                                   : 1;
}

static double dispatch_record(const struct cost_setup *s) {
    int h = s->model->hidden_size;
    return META_BYTES + (s->fp8 ? h + 4 * blocks(h) : 2.0 * h);
}

/* Of a row between its two products: bf16; or fp32, e4m3 and scales. */
static double hidden_bytes(const struct cost_setup *s, int inter) {
    return s->fp8 ? 5.0 * inter + 4 * blocks(inter) : 2.0 * inter;
}

/* Of ranks that differ, the one whose memory has the least left beside its slots. */
static double tightest_rank(const struct cost_setup *s, double *slots) {
    const struct cluster *c = s->cluster;
    double layers = s->model->num_moe_layers, slot = cost_slot_bytes(s) * layers, has = 0;
    for (int r = 0; r < c->ranks; r++) {
        double n = c->rank_slots ? c->rank_slots[r] : s->slots_per_rank;
        double gb = c->rank_memory_gb ? c->rank_memory_gb[r] : c->memory_gb;
        if (r && gb * 1e9 - n * slot >= has - *slots * slot)
            continue;
        has = gb * 1e9;
        *slots = n;
    }
    return has;
}

void cost_memory(const struct cost_setup *s, struct cost_memory *out) {
    const struct model *m = s->model;
    bool differ =
        s->ranks == s->cluster->ranks && (s->cluster->rank_slots || s->cluster->rank_memory_gb);
    double slots = s->slots_per_rank;
    out->capacity = differ ? tightest_rank(s, &slots) : s->cluster->memory_gb * 1e9;
    double tokens = (double)((s->max_num_tokens + s->ranks - 1) / s->ranks);
    double rows = tokens * m->num_experts_per_tok, width = s->fp8 ? 1 : 2;
    double layer = cost_slot_bytes(s) * slots +
                   width * expert_params(m, m->shared.intermediate_size) +
                   4.0 * m->num_experts * m->hidden_size;
    out->weights = layer * m->num_moe_layers;
    double x = s->fp8 ? m->hidden_size + 4 * blocks(m->hidden_size) : 2.0 * m->hidden_size;
    out->workspace = tokens * x +
                     rows * (2.0 * m->hidden_size + hidden_bytes(s, m->moe_intermediate_size)) +
                     tokens * hidden_bytes(s, m->shared.intermediate_size);
    out->exchange =
        s->ranks == 1 ? 0 : s->ranks * tokens * dispatch_record(s) + 2 * rows * m->hidden_size;
}

/* ---- which experts a batch hits ---- */

/* Rows and hit slots of the busiest rank when all experts are alike: each token names k of E, which
 * lie in the filled slots, and the busiest rank has no empty one. */
static void hit_alike(const struct cost_setup *s, int tokens, struct cost *out) {
    double slots = s->slots_per_rank, all = (double)tokens * s->ranks;
    double chance = (double)s->model->num_experts_per_tok / s->filled_slots;
    out->imbalance = s->imbalance * slots * s->ranks / s->filled_slots;
    out->rows = tokens * s->model->num_experts_per_tok * out->imbalance;
    out->hit = slots * (1 - power(1 - chance, (long long)all));
}

/* Tokens of the batch that slot i gets, as a share of all ranks' tokens; at most 1. */
static double slot_chance(const struct cost_setup *s, int i, double sum, const int *replicas) {
    int e = s->expert_of_slot[i];
    if (e < 0)
        return 0;
    double p = sum > 0 ? s->load[e] / sum : 1.0 / s->model->num_experts;
    p *= s->model->num_experts_per_tok;
    p = p < 1 ? p : 1;
    return p * (s->share_of_slot ? s->share_of_slot[i] : 1.0 / replicas[e]);
}

void cost_ranks(const struct cost_setup *s, int tokens, double *rows, double *hit) {
    int experts = s->model->num_experts, slots = s->slots_per_rank;
    int replicas[MAX_COST_EXPERTS] = {0};
    double sum = 0, all = (double)tokens * s->ranks, load_sum = 0;
    for (int i = 0; i < s->ranks * slots; i++)
        if (s->expert_of_slot[i] >= 0)
            replicas[s->expert_of_slot[i]]++;
    for (int e = 0; s->load && e < experts; e++)
        sum += s->load[e];
    for (int r = 0; s->rank_load && r < s->ranks; r++)
        load_sum += s->rank_load[r];
    for (int r = 0; r < s->ranks; r++) {
        rows[r] = hit[r] = 0;
        for (int i = r * slots; i < (r + 1) * slots; i++) {
            double p = slot_chance(s, i, sum, replicas);
            rows[r] += all * p;
            hit[r] += 1 - power(1 - p, (long long)all);
        }
        if (load_sum > 0)
            rows[r] = all * s->model->num_experts_per_tok * s->rank_load[r] / load_sum;
    }
}

/* ---- GEMMs ---- */

static double bandwidth(const struct cost_setup *s) { /* bytes per us */
    return s->cluster->memory_tbps * MEMORY_REACHED * 1e6;
}

/* FLOP per us. A GPU without fp8 of its own multiplies it as fp16. */
static double rate(const struct cost_setup *s) {
    return s->fp8 && s->cluster->fp8_tflops > 0 ? s->cluster->fp8_tflops * FP8_REACHED * 1e6
                                                : s->cluster->bf16_tflops * BF16_REACHED * 1e6;
}

/* The GEMMs of `tokens` own tokens, out->rows routed rows over out->hit experts: bytes, FLOP and
 * both times. */
static void gemms(const struct cost_setup *s, int tokens, struct cost *out) {
    const struct model *m = s->model;
    double params = expert_params(m, m->moe_intermediate_size);
    double shared = expert_params(m, m->shared.intermediate_size);
    double router = (double)m->num_experts * m->hidden_size, width = s->fp8 ? 1 : 2;
    /* Every hit expert wastes what GEMM_ROWS says, as if it had that many rows more. */
    double waste = GEMM_ROWS / GEMM_SLOWDOWN * (out->hit * params + (tokens > 0) * shared);
    out->weight_bytes = width * (out->hit * params + shared) + 4 * router;
    out->activation_bytes = (width + 2) * (out->rows + tokens) * m->hidden_size;
    out->flop = 2 * (out->rows * params + tokens * (shared + router));
    out->memory_us = (out->weight_bytes + out->activation_bytes) / bandwidth(s);
    out->compute_us = GEMM_SLOWDOWN * (out->flop + 2 * waste) / rate(s);
    out->gemm_us = larger(out->memory_us, out->compute_us);
}

/* The rank whose GEMMs take longest. */
static void slowest_rank(const struct cost_setup *s, int tokens, struct cost *out) {
    if (!s->expert_of_slot) {
        hit_alike(s, tokens, out);
        gemms(s, tokens, out);
        return;
    }
    double rows[MAX_COST_RANKS], hit[MAX_COST_RANKS], most = 0, sum = 0;
    struct cost rank = *out;
    cost_ranks(s, tokens, rows, hit);
    for (int r = 0; r < s->ranks; r++) {
        rank.rows = rows[r];
        rank.hit = hit[r];
        gemms(s, tokens, &rank);
        most = larger(most, rows[r]);
        sum += rows[r];
        if (r == 0 || rank.gemm_us > out->gemm_us)
            *out = rank;
    }
    out->imbalance = sum > 0 ? most * s->ranks / sum : 1;
}

/* ---- exchange ---- */

/* The chance that none of a token's k experts is among `held` of `candidates`. */
static double miss(double candidates, double held, int k) {
    double p = 1;
    for (int i = 0; i < k; i++) {
        double left = candidates - held - i;
        p *= left > 0 ? left / (candidates - i) : 0;
    }
    return p;
}

static double choose(int n, int k) {
    double c = 1;
    if (k < 0 || k > n)
        return 0;
    for (int i = 0; i < k; i++)
        c = c * (n - i) / (i + 1);
    return c;
}

/* Group-limited routing, whole groups in order on the ranks: a rank holds n_group / ranks groups
 * or a part of one. */
static double reach_grouped(const struct cost_setup *s) {
    const struct model *m = s->model;
    int n = m->router.n_group, kept = m->router.topk_group, k = m->num_experts_per_tok;
    double candidates = (double)m->num_experts * kept / n, p = 0;
    if (s->ranks >= n)
        return (double)kept / n * (1 - miss(candidates, (double)m->num_experts / s->ranks, k));
    for (int j = 0, g = n / s->ranks; j <= g; j++)
        p += choose(g, j) * choose(n - g, kept - j) / choose(n, kept) *
             (1 - miss(candidates, (double)m->num_experts * j / n, k));
    return p;
}

static bool in_order(const struct cost_setup *s) {
    int n = s->model->num_experts;
    for (int i = 0; s->expert_of_slot && i < s->ranks * s->slots_per_rank; i++)
        if (s->expert_of_slot[i] != (i < n ? i : -1))
            return false;
    return s->expert_of_slot || s->filled_slots == n;
}

double cost_distinct(const struct cost_setup *s) {
    const struct model *m = s->model;
    int n = m->router.n_group;
    bool whole = n > 1 && (s->ranks % n == 0 || n % s->ranks == 0);
    if (whole && m->router.topk_group < n && in_order(s))
        return s->ranks * reach_grouped(s);
    double held = (double)m->num_experts / s->ranks;
    return s->ranks * (1 - miss(m->num_experts, held, m->num_experts_per_tok));
}

/* Ranks that reach each other by NVLink. */
static int domain(const struct cost_setup *s) {
    return s->cluster->nvlink_domain < s->ranks ? s->cluster->nvlink_domain : s->ranks;
}

static double nccl_us(const struct cost_setup *s) {
    return NCCL_US + NCCL_RANK_US * s->ranks + (domain(s) < s->ranks ? NIC_US : 0);
}

/* Bytes over both links at the same time; GB/s are 1e3 bytes per us. */
static double links_us(const struct cost_setup *s, double nvlink, double nic) {
    double a = nvlink > 0 ? nvlink / (s->cluster->nvlink_gbps * NVLINK_REACHED * 1e3) : 0;
    double b = nic > 0 ? nic / (s->cluster->nic_gbps * NIC_REACHED * 1e3) : 0;
    return larger(a, b);
}

/* A token goes once to each of its ranks and comes back once per expert, since combine sums in
 * top-k order; the busiest rank receives and returns `imbalance` times the mean. */
static double exchange_us(const struct cost_setup *s, enum moe_exchange how, double tokens,
                          double imbalance) {
    const struct model *m = s->model;
    double back = 2.0 * m->hidden_size, there = dispatch_record(s), r = s->ranks, d = domain(s);
    double routed = cost_distinct(s) * there + m->num_experts_per_tok * back;
    double moved = tokens * imbalance * routed / r; /* per peer */
    double gathered = tokens * (there + back);
    switch (how) {
    case MOE_EXCHANGE_ONESIDED:
        return d < r
                   ? -1
                   : 2 * (ONESIDED_US + ONESIDED_RANK_US * r) + links_us(s, moved * (r - 1), 0);
    case MOE_EXCHANGE_ALLGATHER: /* every token once to every domain, then to each of its ranks */
        return 2 * nccl_us(s) + links_us(s, gathered * (r - 1), gathered * (r - d) / d);
    case MOE_EXCHANGE_ALLTOALL: /* counts, tokens, results */
        return 3 * nccl_us(s) + links_us(s, moved * (d - 1), moved * (r - d));
    case MOE_EXCHANGE_COUNT:
        break;
    }
    return -1;
}

/* ---- all of it ---- */

static void one_layer(const struct cost_setup *s, struct cost *out) {
    const struct model *m = s->model;
    slowest_rank(s, out->tokens, out);
    for (int i = 0; i < MOE_EXCHANGE_COUNT; i++)
        out->exchange_us[i] =
            s->ranks > 1 ? exchange_us(s, (enum moe_exchange)i, out->tokens, out->imbalance)
                         : -1;
    out->combine_us =
        2.0 * out->tokens * (m->num_experts_per_tok + 1) * m->hidden_size / bandwidth(s);
    out->launch_us =
        LAUNCH_US * (LAUNCHES + (m->shared.intermediate_size ? SHARED_LAUNCHES : 0));
}

static int cheapest(const struct cost *c) {
    int best = -1;
    for (int i = 0; i < MOE_EXCHANGE_COUNT; i++)
        if (c->exchange_us[i] >= 0 && (best < 0 || c->exchange_us[i] < c->exchange_us[best]))
            best = i;
    return best;
}

void cost_layers(const struct cost_setup *layers, int n, int tokens, struct cost *out) {
    *out = (struct cost){.passes = passes(layers, tokens)};
    out->tokens = (tokens + out->passes - 1) / out->passes;
    double all = 0;
    for (int l = 0; l < n; l++)
        all += layers[l].weight;
    for (int l = 0; l < n; l++) {
        struct cost one = {.tokens = out->tokens};
        double part = layers[l].weight / all;
        one_layer(&layers[l], &one);
#define X(name) out->name += one.name * part;
        COST_FIGURES(X)
#undef X
        for (int i = 0; i < MOE_EXCHANGE_COUNT; i++)
            out->exchange_us[i] += one.exchange_us[i] * part;
    }
    cost_exchange(out, cheapest(out));
}

void cost_exchange(struct cost *c, int exchange) {
    c->exchange = exchange;
    c->pass_us = c->gemm_us + c->combine_us + c->launch_us +
                 (exchange < 0 ? 0 : c->exchange_us[exchange]);
    c->layer_us = c->pass_us * c->passes;
}

double *cost_load(struct arena *a, const struct loads *l, int layer) {
    double *mean = arena_array(a, double, l->experts), all = 0;
    int row = loads_layer(l, layer);
    for (int w = 0; row >= 0 && w < l->num_workloads; w++) {
        const double *count = l->workloads[w].count + (size_t)row * (size_t)l->experts;
        double sum = 0, weight = l->workloads[w].weight;
        for (int e = 0; e < l->experts; e++)
            sum += count[e];
        for (int e = 0; e < l->experts && sum > 0; e++)
            mean[e] += weight * count[e] / sum;
        all += sum > 0 ? weight : 0;
    }
    for (int e = 0; e < l->experts && all > 0; e++)
        mean[e] /= all;
    return all > 0 ? mean : NULL;
}

double cost_link_us(const struct cluster *c, int ranks, double bytes) {
    struct cost_setup s = {.cluster = c, .ranks = ranks};
    if (ranks == 1 || bytes == 0)
        return 0;
    return domain(&s) < ranks ? NIC_US + links_us(&s, 0, bytes) : links_us(&s, bytes, 0);
}

double cost_migration_us(const struct cost_setup *s, double slots) {
    return cost_link_us(s->cluster, s->ranks, slots * cost_slot_bytes(s));
}

const char *cost_lacks(const struct cost_setup *s) {
    const struct cluster *c = s->cluster;
    if (c->memory_tbps == 0)
        return "memory_tbps";
    if (c->bf16_tflops == 0 && !(s->fp8 && c->fp8_tflops > 0))
        return s->fp8 ? "fp8_tflops" : "bf16_tflops";
    if (s->ranks > 1 && domain(s) > 1 && c->nvlink_gbps == 0)
        return "nvlink_gbps";
    if (s->ranks > domain(s) && c->nic_gbps == 0)
        return "nic_gbps";
    return NULL;
}

void cost_setup(struct cost_setup *s, const struct deployment *dep) {
    const struct model *m = dep->model;
    int ranks = dep->cluster->ranks, slots = dep->num_slots ? dep->num_slots : m->num_experts;
    *s = (struct cost_setup){.model = m,
                             .cluster = dep->cluster,
                             .ranks = ranks,
                             .slots_per_rank = (slots + ranks - 1) / ranks,
                             .filled_slots = slots,
                             .max_num_tokens = dep->max_num_tokens,
                             .fp8 = model_record_format(m) == MOE_FORMAT_FP8_BLOCK,
                             .imbalance = 1,
                             .weight = 1};
}

/* The tokens of one workload's layer, or NULL when there are none. */
static const double *row_of(const struct loads *l, int workload, int layer) {
    int row = loads_layer(l, layer);
    if (row < 0)
        return NULL;
    const double *count = l->workloads[workload].count + (size_t)row * (size_t)l->experts;
    for (int e = 0; e < l->experts; e++)
        if (count[e] > 0)
            return count;
    return NULL;
}

/* What the ranks get of a layer's tokens under the dispatcher. */
static const double *judge(struct arena *a, const struct cost_placement *p,
                           const struct cost_setup *s) {
    static const enum balance_split split[] = {[DISPATCH_ROUNDROBIN] = BALANCE_EVEN,
                                               [DISPATCH_EVEN] = BALANCE_EVEN,
                                               [DISPATCH_SHARE] = BALANCE_SHARE,
                                               [DISPATCH_BALANCED] = BALANCE_BALANCED};
    const double one = 1;
    double *rank_load = arena_array(a, double, s->ranks);
    struct balance_result r;
    struct balance_problem b = {.experts = s->model->num_experts,
                                .ranks = s->ranks,
                                .slots_per_rank = s->slots_per_rank,
                                .workloads = 1,
                                .load = s->load,
                                .weight = &one,
                                .speed = s->ranks == s->cluster->ranks ? s->cluster->rank_speed
                                                                       : NULL,
                                .split = split[p->dispatch]};
    balance_judge(&b, s->expert_of_slot, s->share_of_slot, &r, rank_load);
    return rank_load;
}

int cost_placed(struct arena *a, const struct cost_setup *base, const struct cost_placement *p,
                struct cost_setup **out) {
    int workloads = p->loads ? p->loads->num_workloads : 1, n = 0;
    *out = arena_array(a, struct cost_setup, p->num_layers * workloads);
    for (int i = 0; i < p->num_layers; i++)
        for (int w = 0; w < workloads; w++) {
            struct cost_setup *s = &(*out)[n];
            *s = *base;
            s->ranks = p->ranks;
            s->slots_per_rank = p->slots_per_rank;
            s->expert_of_slot = p->expert_of_slot[i];
            s->share_of_slot = p->share_of_slot ? p->share_of_slot[i] : NULL;
            s->load = p->loads ? row_of(p->loads, w, p->layers[i]) : NULL;
            s->weight = p->loads ? p->loads->workloads[w].weight : 1;
            if (s->load)
                s->rank_load = judge(a, p, s);
            n += s->weight > 0;
        }
    return n;
}
