/* The model file: read, checked, written. Keys are Hugging Face's where they exist.
 *
 * Readers take any integer, model_check holds the limits: a config.json meets the same rules,
 * and each error stands at the key it speaks of (struct model's at). */
#include "moec.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define SPELLING(name, text, ...) text,
const char *const router_names[MOE_ROUTER_COUNT] = {MOE_ROUTERS(SPELLING)};
const char *const activation_names[MOE_ACT_COUNT] = {MOE_ACTIVATIONS(SPELLING)};
const char *const format_names[MOE_FORMAT_COUNT] = {MOE_FORMATS(SPELLING)};
const char *const target_names[MOE_TARGET_COUNT] = {MOE_TARGETS(SPELLING)};
const char *const stage_names[MOE_STAGE_COUNT] = {MOE_STAGES(SPELLING)};
const char *const exchange_names[MOE_EXCHANGE_COUNT] = {MOE_EXCHANGES(SPELLING)};
#undef SPELLING

enum {
    MAX_LAYERS = 4096,
    MAX_NEXTN = 16,
    MAX_SIZE = 131072,
    MAX_EXPERTS = 1024,
    MAX_TOPK = 32,
};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* Keys of the router map beside `method`, and the methods that honour them. */
#define M(name) (1u << MOE_ROUTER_##name)
#define ROUTER_KEYS(X) \
    X(n_group, M(DEEPSEEK_V3)) \
    X(topk_group, M(DEEPSEEK_V3)) \
    X(norm_topk_prob, M(SOFTMAX_TOPK) | M(DEEPSEEK_V3)) \
    X(routed_scaling_factor, M(DEEPSEEK_V3)) \
    X(bias, M(TOPK_SOFTMAX)) \
    X(correction_bias, M(DEEPSEEK_V3) | M(MINIMAX2)) \
    X(scoring, M(DEEPSEEK_V3)) \
    X(masked_groups, M(DEEPSEEK_V3)) \
    X(group_score, M(DEEPSEEK_V3)) \
    X(jitter_eps, M(SPARSE_MIXER)) \
    X(experts, M(STATIC)) \
    X(logits_dtype, ~(M(STATIC) | M(BALANCED)))

enum router_key {
#define X(name, methods) KEY_##name,
    ROUTER_KEYS(X)
#undef X
        ROUTER_KEY_COUNT
};
static const struct {
    const char *name;
    unsigned methods;
} router_keys[ROUTER_KEY_COUNT] = {
#define X(name, methods) {#name, methods},
    ROUTER_KEYS(X)
#undef X
};

static const char *const scoring_names[] = {"softmax", "sigmoid"};
static const char *const mask_names[] = {"-inf", "zero"};
static const char *const group_names[] = {"best_two", "best"};
static const char *const dtype_names[] = {"float32", "bfloat16"};
static const char *const approximate_names[] = {"none", "tanh"};

static bool takes(enum moe_router method, enum router_key key) {
    return router_keys[key].methods >> method & 1;
}

/* ---- read ---- */

struct reader {
    struct arena *arena;
    struct diags *diags;
    struct model *m;
};

/* A key that must be there; an error at the map when it is not. */
static struct node *need(struct reader *r, struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    if (!n)
        diag_error(r->diags, map->loc, "missing key '%s'", key);
    return n;
}

static void need_int(struct reader *r, struct node *map, const char *key, int min, int *out,
                     struct loc *at) {
    struct node *n = need(r, map, key);
    if (n && node_int(r->diags, n, key, min, INT_MAX, out))
        *at = n->loc;
}

/* Optional values: *out stays as it is when the key is absent. */
static void opt_int(struct reader *r, struct node *map, const char *key, int min, int *out,
                    struct loc *at) {
    struct node *n = map_get(map, key);
    if (n && node_int(r->diags, n, key, min, INT_MAX, out))
        *at = n->loc;
}

static void opt_bool(struct reader *r, struct node *map, const char *key, bool *out) {
    struct node *n = map_get(map, key);
    if (n)
        node_bool(r->diags, n, key, out);
}

static void opt_double(struct reader *r, struct node *map, const char *key, double min,
                       double max, double *out) {
    struct node *n = map_get(map, key);
    if (n)
        node_double(r->diags, n, key, min, max, out);
}

/* One of two names; true for the second. */
static void opt_choice(struct reader *r, struct node *map, const char *key,
                       const char *const names[2], bool *out) {
    struct node *n = map_get(map, key);
    int choice = *out;
    if (n && node_enum(r->diags, n, key, names, 2, &choice))
        *out = choice;
}

/* Names become file names. */
static bool name_is_plain(const char *s) {
    static const char legal[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return *s && *s != '.' && *s != '-' && strlen(s) < 128 && s[strspn(s, legal)] == '\0';
}

static void read_name(struct reader *r, struct node *root) {
    struct node *n = need(r, root, "name");
    if (!n || !node_string(r->diags, n, "name", &r->m->name))
        return;
    if (!name_is_plain(r->m->name))
        diag_error(r->diags, n->loc,
                   "name: expected letters, digits, '.', '_' and '-', beginning with a letter, "
                   "a digit or '_'");
}

/* "A-B" or "A"; false when it is neither. */
static bool parse_range(const char *s, long *first, long *last) {
    char *end;
    if (*s < '0' || *s > '9')
        return false;
    *first = *last = strtol(s, &end, 10);
    if (*end == '-' && end[1] >= '0' && end[1] <= '9')
        *last = strtol(end + 1, &end, 10);
    return *end == '\0';
}

/* Decoder layers first, first+step, ..., last. */
static void set_layers(struct reader *r, long first, long last, int step) {
    for (long i = first; i <= last; i += step)
        r->m->moe_layers[r->m->num_moe_layers++] = (int)i;
}

static void read_layer_words(struct reader *r, const struct node *n) {
    int layers = r->m->num_hidden_layers;
    long first, last;
    if (!strcmp(n->text, "all"))
        set_layers(r, 0, layers - 1, 1);
    else if (!strcmp(n->text, "odd"))
        set_layers(r, 1, layers - 1, 2);
    else if (!strcmp(n->text, "even"))
        set_layers(r, 0, layers - 1, 2);
    else if (!parse_range(n->text, &first, &last))
        diag_error(r->diags, n->loc,
                   "moe_layers must be a range such as 3-60, a list, all, odd or even, "
                   "but is %.40s",
                   n->text);
    else if (first > last || last >= layers)
        diag_error(r->diags, n->loc, "moe_layers: %.40s is no range within 0-%d", n->text,
                   layers - 1);
    else
        set_layers(r, first, last, 1);
}

static void read_layer_list(struct reader *r, const struct node *list) {
    struct model *m = r->m;
    for (int i = 0; i < list->count; i++) {
        const struct node *n = list->items[i];
        int layer;
        if (!node_int(r->diags, n, "moe_layers", 0, m->num_hidden_layers - 1, &layer))
            return;
        if (m->num_moe_layers && layer <= m->moe_layers[m->num_moe_layers - 1]) {
            diag_error(r->diags, n->loc, "moe_layers: %d does not ascend", layer);
            return;
        }
        m->moe_layers[m->num_moe_layers++] = layer;
    }
}

/* moe_layers speaks of decoder layers; MTP layers follow from num_nextn_predict_layers. */
static void read_layers(struct reader *r, struct node *root) {
    struct model *m = r->m;
    struct node *n = map_get(root, "moe_layers");
    need_int(r, root, "num_hidden_layers", 1, &m->num_hidden_layers, &m->at.num_hidden_layers);
    opt_int(r, root, "num_nextn_predict_layers", 0, &m->num_nextn_predict_layers,
            &m->at.num_nextn_predict_layers);
    m->at.moe_layers = n ? n->loc : root->loc;
    if (m->num_hidden_layers < 1 || m->num_hidden_layers > MAX_LAYERS ||
        m->num_nextn_predict_layers > MAX_NEXTN)
        return; /* reported, or model_check will */
    int total = m->num_hidden_layers + m->num_nextn_predict_layers;
    m->moe_layers = arena_array(r->arena, int, total);
    if (!n)
        set_layers(r, 0, m->num_hidden_layers - 1, 1);
    else if (n->kind == NODE_LIST)
        read_layer_list(r, n);
    else if (node_kind_is(r->diags, n, "moe_layers", NODE_SCALAR))
        read_layer_words(r, n);
    set_layers(r, m->num_hidden_layers, total - 1, 1);
}

static void read_static_experts(struct reader *r, struct node *n) {
    struct model *m = r->m;
    if (!n || !node_kind_is(r->diags, n, "experts", NODE_LIST))
        return;
    if (n->count > MAX_TOPK || n->count != m->num_experts_per_tok) {
        diag_error(r->diags, n->loc, "experts: %d ids, but num_experts_per_tok is %d", n->count,
                   m->num_experts_per_tok);
        return;
    }
    m->router.experts = arena_array(r->arena, int, n->count);
    for (int i = 0; i < n->count; i++) {
        if (!node_int(r->diags, n->items[i], "experts", 0, m->num_experts - 1,
                      &m->router.experts[i]))
            return;
        for (int j = 0; j < i; j++)
            if (m->router.experts[i] == m->router.experts[j])
                diag_error(r->diags, n->items[i]->loc, "experts: %d twice",
                           m->router.experts[i]);
    }
}

/* A key the method cannot honour: an error that says who can. */
static void refuse_router_key(struct reader *r, struct node *map, int i,
                              enum moe_router method) {
    const char *name = map->keys[i]->text;
    int key = 0;
    while (key < ROUTER_KEY_COUNT && strcmp(name, router_keys[key].name))
        key++;
    if (key == ROUTER_KEY_COUNT || takes(method, key))
        return; /* map_unused finds the unknown ones */
    struct buf who = {.arena = r->arena};
    for (int other = 0; other < MOE_ROUTER_COUNT; other++)
        if (takes(other, key))
            buf_printf(&who, "%s%s", who.len ? ", " : "", router_names[other]);
    map->items[i]->used = true;
    diag_error(r->diags, map->keys[i]->loc, "router: method %s has no %s (it belongs to %s)",
               router_names[method], name, who.data);
}

static void read_router_values(struct reader *r, struct node *n) {
    struct model *m = r->m;
    opt_int(r, n, "n_group", 1, &m->router.n_group, &m->at.n_group);
    opt_int(r, n, "topk_group", 1, &m->router.topk_group, &m->at.topk_group);
    opt_bool(r, n, "norm_topk_prob", &m->router.norm_topk_prob);
    opt_double(r, n, "routed_scaling_factor", 1e-6, 1e6, &m->router.routed_scaling_factor);
    opt_bool(r, n, "bias", &m->router.bias);
    opt_bool(r, n, "correction_bias", &m->router.correction_bias);
    opt_choice(r, n, "scoring", scoring_names, &m->router.sigmoid);
    opt_choice(r, n, "masked_groups", mask_names, &m->router.mask_zero);
    opt_choice(r, n, "group_score", group_names, &m->router.group_best);
    opt_choice(r, n, "logits_dtype", dtype_names, &m->router.logits_bf16);
    opt_double(r, n, "jitter_eps", 0, 0.5, &m->router.jitter);
}

static void read_router(struct reader *r, struct node *root) {
    struct model *m = r->m;
    struct node *n = need(r, root, "router");
    int method;
    if (!n || !node_kind_is(r->diags, n, "router", NODE_MAP))
        return;
    struct node *name = need(r, n, "method");
    m->at.router = n->loc;
    if (!name || !node_enum(r->diags, name, "method", router_names, MOE_ROUTER_COUNT, &method))
        return;
    m->at.router = name->loc;
    model_router_defaults(m, method);
    for (int i = 0; i < n->count; i++)
        refuse_router_key(r, n, i, method);
    if (takes(method, KEY_n_group) && !map_get(n, "topk_group"))
        m->at.topk_group = n->loc;
    read_router_values(r, n);
    if (method == MOE_ROUTER_STATIC)
        read_static_experts(r, need(r, n, "experts"));
    const char *legal[ROUTER_KEY_COUNT + 1] = {"method"};
    int count = 1;
    for (int key = 0; key < ROUTER_KEY_COUNT; key++)
        if (takes(method, key))
            legal[count++] = router_keys[key].name;
    map_unused(r->diags, n, "router", legal, count);
}

void model_router_defaults(struct model *m, enum moe_router method) {
    m->router.method = method;
    m->router.n_group = m->router.topk_group = 1;
    m->router.routed_scaling_factor = 1;
    m->router.sigmoid = method == MOE_ROUTER_DEEPSEEK_V3 || method == MOE_ROUTER_LLAMA4 ||
                        method == MOE_ROUTER_MINIMAX2;
    m->router.norm_topk_prob = method == MOE_ROUTER_MINIMAX2;
    m->router.jitter = method == MOE_ROUTER_SPARSE_MIXER ? 0.01 : 0;
}

static void read_activation_map(struct reader *r, struct node *n, int act) {
    struct model *m = r->m;
    if (act == MOE_ACT_SWIGLU_OAI) {
        static const char *const legal[] = {"name", "alpha", "limit"};
        opt_double(r, n, "alpha", 1e-6, 1e6, &m->act_alpha);
        opt_double(r, n, "limit", 1e-6, 1e6, &m->act_limit);
        map_unused(r->diags, n, "activation", legal, COUNT(legal));
    } else if (act == MOE_ACT_GEGLU) {
        static const char *const legal[] = {"name", "approximate"};
        bool tanh = false;
        opt_choice(r, n, "approximate", approximate_names, &tanh);
        m->activation = tanh ? MOE_ACT_GEGLU_TANH : MOE_ACT_GEGLU;
        map_unused(r->diags, n, "activation", legal, COUNT(legal));
    } else {
        static const char *const legal[] = {"name"};
        map_unused(r->diags, n, "activation", legal, COUNT(legal));
    }
}

static void read_activation(struct reader *r, struct node *root) {
    struct model *m = r->m;
    struct node *n = map_get(root, "activation");
    int act = MOE_ACT_SWIGLU;
    struct node *name = n && n->kind == NODE_MAP ? need(r, n, "name") : n;
    if (name && !node_enum(r->diags, name, "activation", activation_names, MOE_ACT_COUNT, &act))
        return;
    m->activation = act;
    if (act == MOE_ACT_SWIGLU_OAI) {
        m->act_alpha = 1.702;
        m->act_limit = 7;
    }
    if (n && n->kind == NODE_MAP && name)
        read_activation_map(r, n, act);
}

static void read_shared(struct reader *r, struct node *root) {
    static const char *const legal[] = {"intermediate_size", "gate"};
    struct node *n = map_get(root, "shared_experts");
    if (!n || !node_kind_is(r->diags, n, "shared_experts", NODE_MAP))
        return;
    need_int(r, n, "intermediate_size", 1, &r->m->shared.intermediate_size, &r->m->at.shared);
    opt_bool(r, n, "gate", &r->m->shared.gate);
    map_unused(r->diags, n, "shared_experts", legal, COUNT(legal));
}

static void read_block(struct reader *r, struct node *weights) {
    struct node *n = map_get(weights, "block");
    if (r->m->weights.format != MOE_FORMAT_FP8_BLOCK) {
        if (n)
            diag_error(r->diags, n->loc, "weights: format %s has no block (it belongs to %s)",
                       format_names[r->m->weights.format], format_names[MOE_FORMAT_FP8_BLOCK]);
        return;
    }
    if (!n)
        diag_error(r->diags, weights->loc, "missing key 'block', such as [128, 128]");
    if (!n || !node_kind_is(r->diags, n, "block", NODE_LIST))
        return;
    if (n->count != 2) {
        diag_error(r->diags, n->loc, "block: expected two sizes, not %d", n->count);
        return;
    }
    for (int i = 0; i < 2; i++)
        node_int(r->diags, n->items[i], "block", 1, MAX_SIZE, &r->m->weights.block[i]);
}

enum moe_format model_record_format(const struct model *m) {
    bool whole = m->weights.format == MOE_FORMAT_FP8_TENSOR;
    bool blocks = m->weights.format == MOE_FORMAT_FP8_BLOCK &&
                  m->weights.block[0] == MOE_SCALE_BLOCK &&
                  m->weights.block[1] == MOE_SCALE_BLOCK;
    return whole || blocks ? MOE_FORMAT_FP8_BLOCK : MOE_FORMAT_BF16;
}

static void read_weights(struct reader *r, struct node *root) {
    static const char *const legal[] = {"format", "block", "bias"};
    struct node *n = map_get(root, "weights");
    int format = MOE_FORMAT_BF16;
    if (!n || !node_kind_is(r->diags, n, "weights", NODE_MAP))
        return;
    struct node *name = map_get(n, "format");
    r->m->at.weights = n->loc;
    if (name && !node_enum(r->diags, name, "format", format_names, MOE_FORMAT_COUNT, &format))
        return;
    r->m->weights.format = format;
    opt_bool(r, n, "bias", &r->m->weights.bias);
    read_block(r, n);
    map_unused(r->diags, n, "weights", legal, COUNT(legal));
}

struct model *model_parse(struct arena *a, struct diags *d, struct node *root) {
    static const char *const legal[] = {
        "name",        "num_hidden_layers",   "num_nextn_predict_layers",
        "moe_layers",  "hidden_size",         "moe_intermediate_size",
        "num_experts", "num_experts_per_tok", "router",
        "activation",  "shared_experts",      "weights"};
    int before = d->errors;
    if (!node_kind_is(d, root, "model", NODE_MAP))
        return NULL;
    struct model *m = arena_array(a, struct model, 1);
    struct reader r = {a, d, m};
    m->loc = root->loc;
    read_name(&r, root);
    read_layers(&r, root);
    need_int(&r, root, "hidden_size", 1, &m->hidden_size, &m->at.hidden_size);
    need_int(&r, root, "moe_intermediate_size", 1, &m->moe_intermediate_size,
             &m->at.moe_intermediate_size);
    need_int(&r, root, "num_experts", 1, &m->num_experts, &m->at.num_experts);
    need_int(&r, root, "num_experts_per_tok", 1, &m->num_experts_per_tok,
             &m->at.num_experts_per_tok);
    read_router(&r, root);
    read_activation(&r, root);
    read_shared(&r, root);
    read_weights(&r, root);
    map_unused(d, root, "model", legal, COUNT(legal));
    if (d->errors == before)
        model_check(d, m);
    return d->errors == before ? m : NULL;
}

/* ---- check ---- */

static void check_range(struct diags *d, struct loc at, const char *key, int value, int min,
                        int max) {
    if (value < min || value > max)
        diag_error(d, at, "%s: %d is outside %d..%d", key, value, min, max);
}

/* Tensor cores work on 16 elements at a time, MXFP4 scales cover 32. */
static void check_size(struct diags *d, const struct model *m, struct loc at, const char *key,
                       int value) {
    int step = m->weights.format == MOE_FORMAT_MXFP4 ? 32 : 16;
    if (value < 1 || value > MAX_SIZE)
        check_range(d, at, key, value, 1, MAX_SIZE);
    else if (value < step)
        diag_error(d, at, "%s: %d is not divisible by %d", key, value, step);
    else if (value % step)
        diag_error(d, at, "%s: %d is not divisible by %d (the nearest are %d and %d)", key,
                   value, step, value / step * step, value / step * step + step);
}

static void check_groups(struct diags *d, const struct model *m) {
    int groups = m->router.n_group, kept = m->router.topk_group, experts = m->num_experts;
    if (groups > experts || experts % groups) {
        diag_error(d, m->at.n_group, "n_group: %d groups do not divide %d experts", groups,
                   experts);
    } else if (kept > groups) {
        diag_error(d, m->at.topk_group, "topk_group: %d of %d groups cannot be kept", kept,
                   groups);
        diag_add(d, DIAG_NOTE, m->at.n_group, "n_group is %d", groups);
    } else if (groups > 1 && experts / groups < 2 && !m->router.group_best) {
        diag_error(d, m->at.n_group,
                   "n_group: a group's score is the sum of its best two, but a group has only "
                   "one expert");
    } else if (m->num_experts_per_tok > experts / groups * kept) {
        diag_error(d, m->at.num_experts_per_tok,
                   "num_experts_per_tok: %d exceeds the %d experts of %d kept groups",
                   m->num_experts_per_tok, experts / groups * kept, kept);
        diag_add(d, DIAG_NOTE, m->at.topk_group, "topk_group is %d of %d groups", kept, groups);
    }
}

static void check_routing(struct diags *d, const struct model *m) {
    int before = d->errors;
    check_range(d, m->at.num_experts, "num_experts", m->num_experts, 1, MAX_EXPERTS);
    check_range(d, m->at.num_experts_per_tok, "num_experts_per_tok", m->num_experts_per_tok, 1,
                MAX_TOPK);
    if (d->errors != before)
        return;
    if (m->num_experts_per_tok > m->num_experts) {
        diag_error(d, m->at.num_experts_per_tok, "num_experts_per_tok: %d exceeds num_experts",
                   m->num_experts_per_tok);
        diag_add(d, DIAG_NOTE, m->at.num_experts, "num_experts is %d", m->num_experts);
    } else if (m->router.method == MOE_ROUTER_SPARSE_MIXER && m->num_experts_per_tok != 2) {
        diag_error(d, m->at.num_experts_per_tok,
                   "num_experts_per_tok: router sparse_mixer chooses 2 experts, not %d",
                   m->num_experts_per_tok);
        diag_add(d, DIAG_NOTE, m->at.router, "the router is set here");
    } else {
        check_groups(d, m);
    }
}

bool model_check(struct diags *d, const struct model *m) {
    int before = d->errors;
    check_range(d, m->at.num_hidden_layers, "num_hidden_layers", m->num_hidden_layers, 1,
                MAX_LAYERS);
    check_range(d, m->at.num_nextn_predict_layers, "num_nextn_predict_layers",
                m->num_nextn_predict_layers, 0, MAX_NEXTN);
    if (d->errors == before && m->num_moe_layers == 0)
        diag_error(d, m->at.moe_layers, "moe_layers: no layer has experts");
    check_size(d, m, m->at.hidden_size, "hidden_size", m->hidden_size);
    check_size(d, m, m->at.moe_intermediate_size, "moe_intermediate_size",
               m->moe_intermediate_size);
    if (m->shared.intermediate_size)
        check_size(d, m, m->at.shared, "shared_experts: intermediate_size",
                   m->shared.intermediate_size);
    check_routing(d, m);
    return d->errors == before;
}

/* ---- write ---- */

/* The shortest decimal that reads back as the same double. */
static void write_double(struct buf *out, double value) {
    char text[32];
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    buf_printf(out, strpbrk(text, ".e") ? "%s" : "%s.0", text);
}

/* Decoder layers ascend by one, or by two from 0 or 1 to the end, or are listed. */
static void write_layers(struct buf *out, const struct model *m) {
    const int *layer = m->moe_layers;
    int n = m->num_moe_layers - m->num_nextn_predict_layers, last = m->num_hidden_layers - 1;
    bool by_one = n > 0, by_two = n > 1 && layer[0] < 2 && layer[n - 1] + 2 > last;
    for (int i = 1; i < n; i++) {
        by_one &= layer[i] == layer[i - 1] + 1;
        by_two &= layer[i] == layer[i - 1] + 2;
    }
    buf_printf(out, "moe_layers: ");
    if (by_one && n == last + 1)
        buf_printf(out, "all\n");
    else if (by_one)
        buf_printf(out, "%d-%d\n", layer[0], layer[n - 1]);
    else if (by_two)
        buf_printf(out, "%s\n", layer[0] ? "odd" : "even");
    else {
        for (int i = 0; i < n; i++)
            buf_printf(out, "%s%d", i ? ", " : "[", layer[i]);
        buf_printf(out, n ? "]\n" : "[]\n");
    }
}

static const char *yes_no(bool b) {
    return b ? "true" : "false";
}

/* Values that differ from the method's own. */
static void write_router(struct buf *out, const struct model *m) {
    struct model plain = {0};
    model_router_defaults(&plain, m->router.method);
    enum moe_router method = m->router.method;
    buf_printf(out, "router: {method: %s", router_names[method]);
    if (m->router.n_group != plain.router.n_group)
        buf_printf(out, ", n_group: %d, topk_group: %d", m->router.n_group,
                   m->router.topk_group);
    if (takes(method, KEY_norm_topk_prob))
        buf_printf(out, ", norm_topk_prob: %s", yes_no(m->router.norm_topk_prob));
    if (m->router.routed_scaling_factor != plain.router.routed_scaling_factor) {
        buf_printf(out, ", routed_scaling_factor: ");
        write_double(out, m->router.routed_scaling_factor);
    }
    if (m->router.bias)
        buf_printf(out, ", bias: true");
    if (m->router.correction_bias)
        buf_printf(out, ", correction_bias: true");
    if (m->router.sigmoid != plain.router.sigmoid)
        buf_printf(out, ", scoring: %s", scoring_names[m->router.sigmoid]);
    if (m->router.mask_zero)
        buf_printf(out, ", masked_groups: zero");
    if (m->router.group_best)
        buf_printf(out, ", group_score: best");
    if (takes(method, KEY_jitter_eps)) {
        buf_printf(out, ", jitter_eps: ");
        write_double(out, m->router.jitter);
    }
    for (int i = 0; method == MOE_ROUTER_STATIC && i < m->num_experts_per_tok; i++)
        buf_printf(out, "%s%d%s", i ? ", " : ", experts: [", m->router.experts[i],
                   i + 1 == m->num_experts_per_tok ? "]" : "");
    if (m->router.logits_bf16)
        buf_printf(out, ", logits_dtype: bfloat16");
    buf_printf(out, "}\n");
}

static void write_activation(struct buf *out, const struct model *m) {
    if (m->activation == MOE_ACT_GEGLU_TANH) {
        buf_printf(out, "activation: {name: geglu, approximate: tanh}\n");
    } else if (m->activation == MOE_ACT_SWIGLU_OAI) {
        buf_printf(out, "activation: {name: swiglu_oai, alpha: ");
        write_double(out, m->act_alpha);
        buf_printf(out, ", limit: ");
        write_double(out, m->act_limit);
        buf_printf(out, "}\n");
    } else {
        buf_printf(out, "activation: %s\n", activation_names[m->activation]);
    }
}

static void write_weights(struct buf *out, const struct model *m) {
    buf_printf(out, "weights: {format: %s", format_names[m->weights.format]);
    if (m->weights.format == MOE_FORMAT_FP8_BLOCK)
        buf_printf(out, ", block: [%d, %d]", m->weights.block[0], m->weights.block[1]);
    buf_printf(out, m->weights.bias ? ", bias: true}\n" : "}\n");
}

void model_write(struct buf *out, const struct model *m) {
    buf_printf(out, "name: %s\nnum_hidden_layers: %d\n", m->name, m->num_hidden_layers);
    if (m->num_nextn_predict_layers)
        buf_printf(out, "num_nextn_predict_layers: %d\n", m->num_nextn_predict_layers);
    write_layers(out, m);
    buf_printf(out,
               "hidden_size: %d\nmoe_intermediate_size: %d\nnum_experts: %d\n"
               "num_experts_per_tok: %d\n",
               m->hidden_size, m->moe_intermediate_size, m->num_experts,
               m->num_experts_per_tok);
    write_router(out, m);
    write_activation(out, m);
    if (m->shared.intermediate_size)
        buf_printf(out, "shared_experts: {intermediate_size: %d%s}\n",
                   m->shared.intermediate_size, m->shared.gate ? ", gate: true" : "");
    write_weights(out, m);
}

/* ---- either kind of file ---- */

bool model_is_config(struct node *root) {
    for (int i = 0; root->kind == NODE_MAP && i < root->count; i++)
        if (!strcmp(root->keys[i]->text, "model_type") ||
            !strcmp(root->keys[i]->text, "architectures"))
            return true;
    return false;
}

const char *model_config_name(struct arena *a, const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = arena_strdup(a, slash ? slash + 1 : path);
    if (!strcmp(name, "config.json")) {
        name = path_dir(a, path);
        if (strrchr(name, '/'))
            name = strrchr(name, '/') + 1;
    } else if (strrchr(name, '.')) {
        *strrchr(name, '.') = '\0';
    }
    for (char *c = name; *c; c++)
        *c = *c >= 'A' && *c <= 'Z' ? (char)(*c - 'A' + 'a') : *c;
    return name_is_plain(name) ? name : NULL;
}

struct model *model_read(struct arena *a, struct diags *d, const char *path) {
    struct node *root = yaml_read(a, d, path);
    if (!root)
        return NULL;
    return model_is_config(root) ? model_import(a, d, root, model_config_name(a, path))
                                 : model_parse(a, d, root);
}
