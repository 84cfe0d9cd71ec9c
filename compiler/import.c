/* Hugging Face config.json -> struct model, for the families of the table below.
 *
 * The arithmetic is each family's published one, the defaults are those of its transformers
 * class. What the file does not say and the family decides is a note; what this build cannot
 * honour is an error at its key; a key that looks as if it changed the layer and that nobody read
 * is a warning. */
#include "moec.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_LAYERS = 4096, MAX_SIZE = 131072 }; /* beyond: model_check's errors */

struct importer {
    struct arena *arena;
    struct diags *diags;
    struct node *root; /* the file */
    struct node *map;  /* the text model: root, or its text_config */
    const struct family *family;
    struct model *m;
};

enum layer_rule {
    LAYERS_ALL,
    LAYERS_DENSE_FIRST, /* first_k_dense_replace, moe_layer_freq, mlp_layer_types */
    LAYERS_SPARSE_STEP, /* decoder_sparse_step, mlp_only_layers */
    LAYERS_INTERLEAVED, /* moe_layers, interleave_moe_layer_step */
    LAYERS_PERIOD,      /* expert_layer_period, expert_layer_offset */
    LAYERS_PATTERN,     /* hybrid_override_pattern, layers_block_type */
    LAYERS_INTERVAL,    /* moe_layer_start_index, _end_index, _interval */
};
enum shared_rule {
    SHARED_NONE,
    SHARED_COUNT, /* a number of experts' widths */
    SHARED_SIZE,  /* a width of its own */
    SHARED_GATED, /* the same, times sigmoid(x . gate) */
    SHARED_SAME,  /* one, as wide as an expert */
};
/* Whether the chosen weights are divided by their sum. */
enum norm_rule { NORM_DEFAULT_FALSE, NORM_DEFAULT_TRUE, NORM_ALWAYS, NORM_NEVER };

/* Figures are the class's defaults; 0 for n_group, topk_group or scale, and -1 for the others: the
 * file must say. */
struct family {
    const char *model_type;
    void (*route)(struct importer *);
    enum layer_rule layers;
    enum shared_rule shared;
    enum norm_rule norm;
    bool wide; /* experts are intermediate_size wide, else moe_intermediate_size */
    bool mtp;  /* MTP layers are layers L, L+1, ... and have experts */
    int n_group, topk_group;
    double scale;
    int first_dense, num_shared;
};

static void route_softmax(struct importer *im);
static void route_topk_softmax(struct importer *im);
static void route_deepseek_v2(struct importer *im);
static void route_deepseek_v3(struct importer *im);
static void route_dots1(struct importer *im);
static void route_nemotron(struct importer *im);
static void route_ernie(struct importer *im);
static void route_hunyuan(struct importer *im);
static void route_llama4(struct importer *im);
static void route_gpt_oss(struct importer *im);
static void route_minimax2(struct importer *im);
static void route_phimoe(struct importer *im);

#define SOFTMAX(layer_rule, shared_rule, norm_rule) \
    .route = route_softmax, .layers = layer_rule, .shared = shared_rule, .norm = norm_rule
#define DEEPSEEK(groups, kept, factor, dense, shared_count) \
    .route = route_deepseek_v3, .layers = LAYERS_DENSE_FIRST, .shared = SHARED_COUNT, \
    .norm = NORM_DEFAULT_TRUE, .n_group = groups, .topk_group = kept, .scale = factor, \
    .first_dense = dense, .num_shared = shared_count

static const struct family families[] = {
    {"deepseek_v2", route_deepseek_v2, LAYERS_DENSE_FIRST, SHARED_COUNT, NORM_DEFAULT_FALSE,
     .n_group = 1, .topk_group = 1, .scale = 1, .num_shared = 2},
    {"deepseek_v3", DEEPSEEK(8, 4, 2.5, 3, 1), .mtp = true},
    {"deepseek_v32", DEEPSEEK(8, 4, 2.5, 3, 1), .mtp = true},
    {"kimi_k2", DEEPSEEK(0, 0, 0, -1, -1), .mtp = true},
    {"glm4_moe", DEEPSEEK(1, 1, 1, 1, 1), .mtp = true},
    {"glm4v_moe_text", DEEPSEEK(1, 1, 1, 1, 1)},
    {"glm4_moe_lite", DEEPSEEK(1, 1, 0, 1, 1), .mtp = true},
    {"glm_moe_dsa", DEEPSEEK(1, 1, 2.5, 3, 1), .mtp = true},
    {"exaone_moe", DEEPSEEK(1, 1, 2.5, 1, 1)},
    {"solar_open", route_deepseek_v3, LAYERS_ALL, SHARED_COUNT, NORM_DEFAULT_TRUE, .n_group = 1,
     .topk_group = 1, .scale = 1, .num_shared = 1},
    {"mimo_v2_flash", route_deepseek_v3, LAYERS_DENSE_FIRST, SHARED_NONE, NORM_DEFAULT_TRUE,
     .n_group = 1, .topk_group = 1, .scale = 1, .first_dense = 1},
    {"dots1", route_dots1, LAYERS_DENSE_FIRST, SHARED_COUNT, NORM_DEFAULT_FALSE, .n_group = 1,
     .topk_group = 1, .scale = 1},
    {"nemotron_h", route_nemotron, LAYERS_PATTERN, SHARED_SIZE, NORM_DEFAULT_TRUE, .n_group = 1,
     .topk_group = 1, .scale = 1},
    {"ernie4_5_moe", route_ernie, LAYERS_INTERVAL, SHARED_COUNT, NORM_ALWAYS, .num_shared = 2},
    {"qwen2_moe", SOFTMAX(LAYERS_SPARSE_STEP, SHARED_GATED, NORM_DEFAULT_FALSE)},
    {"qwen3_moe", SOFTMAX(LAYERS_SPARSE_STEP, SHARED_NONE, NORM_DEFAULT_FALSE)},
    {"qwen3_vl_moe_text", SOFTMAX(LAYERS_SPARSE_STEP, SHARED_NONE, NORM_ALWAYS)},
    {"qwen3_next", SOFTMAX(LAYERS_SPARSE_STEP, SHARED_GATED, NORM_DEFAULT_TRUE)},
    {"qwen3_5_moe_text", SOFTMAX(LAYERS_ALL, SHARED_GATED, NORM_ALWAYS)},
    {"mixtral", SOFTMAX(LAYERS_ALL, SHARED_NONE, NORM_ALWAYS), .wide = true},
    {"minimax", SOFTMAX(LAYERS_ALL, SHARED_NONE, NORM_ALWAYS), .wide = true},
    {"olmoe", SOFTMAX(LAYERS_ALL, SHARED_NONE, NORM_DEFAULT_FALSE), .wide = true},
    {"flex_olmo", SOFTMAX(LAYERS_ALL, SHARED_NONE, NORM_DEFAULT_FALSE), .wide = true},
    {"jamba", SOFTMAX(LAYERS_PERIOD, SHARED_NONE, NORM_NEVER), .wide = true},
    {"hunyuan_v1_moe", route_hunyuan, LAYERS_ALL, SHARED_SAME, NORM_ALWAYS, .wide = true},
    {"granitemoe", route_topk_softmax, LAYERS_ALL, SHARED_NONE, NORM_ALWAYS, .wide = true},
    {"granitemoeshared", route_topk_softmax, LAYERS_ALL, SHARED_SIZE, NORM_ALWAYS,
     .wide = true},
    {"granitemoehybrid", route_topk_softmax, LAYERS_ALL, SHARED_SIZE, NORM_ALWAYS,
     .wide = true},
    {"llama4", route_llama4, LAYERS_INTERLEAVED, SHARED_SAME, NORM_NEVER, .wide = true},
    {"llama4_text", route_llama4, LAYERS_INTERLEAVED, SHARED_SAME, NORM_NEVER, .wide = true},
    {"gpt_oss", route_gpt_oss, LAYERS_ALL, SHARED_NONE, NORM_ALWAYS, .wide = true},
    {"minimax_m2", route_minimax2, LAYERS_ALL, SHARED_NONE, NORM_ALWAYS, .wide = true},
    {"phimoe", route_phimoe, LAYERS_ALL, SHARED_NONE, NORM_NEVER, .wide = true},
};

/* Keys that change the layer in ways this build has not got, when they are set. */
static const struct {
    const char *key, *why;
} refused[] = {
    {"moe_latent_size", "experts in a latent space"},
    {"num_hash_layers", "hash-routed layers"},
    {"zero_expert_num", "zero-computation experts"},
    {"moe_drop_tokens", "dropping tokens beyond an expert's capacity"},
    {"use_mixed_mlp_moe", "a dense MLP beside the experts"},
    {"moe_layer_num_skipped", "skipped layers"},
    {"mlp_bias", "biases in the expert and shared MLPs"},
    {"swiglu_limit", "a clamped SwiGLU"},
    {"moe_apply_router_weight_on_input", "router weights on the expert's input"},
};

/* Training's and other people's keys, which do not change the layer. */
static const char *const harmless[] = {"output_router_logits",
                                       "router_jitter_noise",
                                       "input_jitter_noise",
                                       "seq_aux",
                                       "ep_size",
                                       "moe_capacity",
                                       "moe_gate",
                                       "moe_group",
                                       "moe_dropout_prob",
                                       "moe_shared_expert_overlap",
                                       "moe_random_routing_dropped_token",
                                       "num_mtp_modules",
                                       "mtp_transformer_layers"};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})
#define assume(im, loc, ...) diag_add((im)->diags, DIAG_NOTE, (loc), __VA_ARGS__)

/* ---- reading ---- */

static bool same_value(const struct node *a, const struct node *b) {
    return a->kind != NODE_SCALAR || b->kind != NODE_SCALAR || !strcmp(a->text, b->text);
}

/* The value under any of the names, NULL when there is none or it is null. Two names that disagree
 * are an error. */
static struct node *find_in(struct importer *im, struct node *map, const char *const *names) {
    struct node *found = NULL;
    const char *found_name = NULL;
    for (; *names; names++) {
        struct node *n = map_get(map, *names);
        if (!n || node_is_null(n))
            continue;
        if (found && !same_value(found, n)) {
            diag_error(im->diags, n->loc, "%s contradicts %s", *names, found_name);
            diag_add(im->diags, DIAG_NOTE, found->loc, "%s is set here", found_name);
        } else if (!found) {
            found = n;
            found_name = *names;
        }
    }
    return found;
}

static struct node *find(struct importer *im, const char *const *names) {
    return find_in(im, im->map, names);
}

/* A figure of every layer: an integer, or a list that says the same integer for each. */
static bool read_int(struct importer *im, struct node *n, const char *name, int *out) {
    if (n->kind != NODE_LIST)
        return node_int(im->diags, n, name, INT_MIN, INT_MAX, out);
    if (n->count == 0) {
        diag_error(im->diags, n->loc, "%s: an empty list", name);
        return false;
    }
    for (int i = 0, value; i < n->count; i++) {
        if (!node_int(im->diags, n->items[i], name, INT_MIN, INT_MAX, &value))
            return false;
        if (i > 0 && value != *out) {
            diag_error(im->diags, n->items[i]->loc,
                       "%s: layers that differ in it are not supported", name);
            return false;
        }
        *out = value;
    }
    return true;
}

static void need_int(struct importer *im, const char *const *names, int *out, struct loc *at) {
    struct node *n = find(im, names);
    if (!n)
        diag_error(im->diags, im->map->loc, "missing key '%s'", names[0]);
    else if (read_int(im, n, names[0], out))
        *at = n->loc;
}

/* The value, or the class's default and a note. A default below least: it must be there. */
static void default_int(struct importer *im, const char *const *names, int value, int least,
                        int *out, struct loc *at) {
    struct node *n = find(im, names);
    *at = n ? n->loc : im->map->loc;
    if (n) {
        read_int(im, n, names[0], out);
    } else if (value < least) {
        diag_error(im->diags, im->map->loc, "missing key '%s'", names[0]);
    } else {
        *out = value;
        assume(im, im->map->loc, "assumed %s: %d, the default of %s", names[0], value,
               im->family->model_type);
    }
}

static void default_double(struct importer *im, const char *const *names, double value,
                           double *out) {
    struct node *n = find(im, names);
    if (n) {
        node_double(im->diags, n, names[0], 1e-6, 1e6, out);
    } else if (value == 0) {
        diag_error(im->diags, im->map->loc, "missing key '%s'", names[0]);
    } else {
        *out = value;
        assume(im, im->map->loc, "assumed %s: %g, the default of %s", names[0], value,
               im->family->model_type);
    }
}

/* Set to anything but false or 0. */
static bool is_set(const struct node *n) {
    return n && (n->kind != NODE_SCALAR ||
                 (strcmp(n->text, "false") && strcmp(n->text, "0") && strcmp(n->text, "0.0")));
}

/* ---- which layers ---- */

static void keep_every(bool *moe, int layers, int step, int phase) {
    for (int i = 0; i < layers; i++)
        moe[i] &= i % step == phase;
}

static int read_step(struct importer *im, const char *key, int value) {
    struct loc at;
    int step = 1;
    default_int(im, NAMES(key), value, 1, &step, &at);
    if (step < 1)
        diag_error(im->diags, at, "%s: expected 1 or more, not %d", key, step);
    return step < 1 ? 1 : step;
}

/* A list with one entry per layer. */
static bool per_layer(struct importer *im, const struct node *n, const char *key, int layers) {
    if (!node_kind_is(im->diags, n, key, NODE_LIST))
        return false;
    if (n->count != layers)
        diag_error(im->diags, n->loc, "%s: %d entries for %d layers", key, n->count, layers);
    return n->count == layers;
}

static void layers_of_names(struct importer *im, const struct node *n, const char *key,
                            const char *moe_name, const char *const *others, int num_others,
                            bool *moe) {
    for (int i = 0; i < n->count; i++) {
        const char *text;
        if (!node_string(im->diags, n->items[i], key, &text))
            return;
        bool known = !strcmp(text, moe_name);
        moe[i] &= known;
        for (int j = 0; j < num_others; j++)
            known |= !strcmp(text, others[j]);
        if (!known)
            diag_error(im->diags, n->items[i]->loc, "%s: unknown kind of layer '%.60s'", key,
                       text);
    }
}

/* transformers reads no moe_layer_freq here; the published checkpoints' own code does. */
static void layers_of_freq(struct importer *im, const struct node *n, int layers, bool *moe) {
    int freq;
    if (n->kind == NODE_LIST) {
        if (!per_layer(im, n, "moe_layer_freq", layers))
            return;
        for (int i = 0; i < layers; i++)
            if (node_int(im->diags, n->items[i], "moe_layer_freq", 0, 1, &freq))
                moe[i] &= freq;
    } else if (node_int(im->diags, n, "moe_layer_freq", 1, INT_MAX, &freq)) {
        keep_every(moe, layers, freq, 0);
    }
}

static void layers_dense_first(struct importer *im, int layers, bool *moe) {
    static const char *const dense[] = {"dense"};
    struct node *types = find(im, NAMES("mlp_layer_types"));
    struct node *freq = find(im, NAMES("moe_layer_freq"));
    struct node *first = find(im, NAMES("first_k_dense_replace"));
    int n = 0;
    struct loc at;
    if (types && per_layer(im, types, "mlp_layer_types", layers))
        layers_of_names(im, types, "mlp_layer_types", "sparse", dense, 1, moe);
    if (freq)
        layers_of_freq(im, freq, layers, moe);
    if (types || (freq && freq->kind == NODE_LIST && !first))
        return; /* they say it all */
    default_int(im, NAMES("first_k_dense_replace"), im->family->first_dense, 0, &n, &at);
    for (int i = 0; i < n && i < layers; i++)
        moe[i] = false;
}

static void layers_sparse_step(struct importer *im, int layers, bool *moe) {
    struct node *dense = find(im, NAMES("mlp_only_layers"));
    int step = read_step(im, "decoder_sparse_step", 1), layer;
    keep_every(moe, layers, step, step - 1);
    if (!dense || !node_kind_is(im->diags, dense, "mlp_only_layers", NODE_LIST))
        return;
    for (int i = 0; i < dense->count; i++)
        if (node_int(im->diags, dense->items[i], "mlp_only_layers", 0, layers - 1, &layer))
            moe[layer] = false;
}

static void layers_interleaved(struct importer *im, int layers, bool *moe) {
    struct node *list = find(im, NAMES("moe_layers"));
    struct node *step_node = find(im, NAMES("interleave_moe_layer_step"));
    int layer;
    if (!list || step_node) {
        int step = read_step(im, "interleave_moe_layer_step", 1);
        if (!list)
            keep_every(moe, layers, step, step - 1);
    }
    if (!list || !node_kind_is(im->diags, list, "moe_layers", NODE_LIST))
        return;
    memset(moe, 0, sizeof *moe * (size_t)layers);
    for (int i = 0; i < list->count; i++)
        if (node_int(im->diags, list->items[i], "moe_layers", 0, layers - 1, &layer))
            moe[layer] = true;
}

static void layers_period(struct importer *im, int layers, bool *moe) {
    int period = read_step(im, "expert_layer_period", 2), offset = 0;
    struct loc at;
    default_int(im, NAMES("expert_layer_offset"), 1, 0, &offset, &at);
    keep_every(moe, layers, period, offset);
}

static void layers_interval(struct importer *im, int layers, bool *moe) {
    int step = read_step(im, "moe_layer_interval", 1), first = 0, last = -1;
    struct loc at;
    default_int(im, NAMES("moe_layer_start_index"), 1, 0, &first, &at);
    default_int(im, NAMES("moe_layer_end_index"), -1, -1, &last, &at);
    keep_every(moe, layers, step, step - 1);
    for (int i = 0; i < layers; i++)
        moe[i] &= i >= first && (last == -1 || i <= last);
}

static void layers_pattern(struct importer *im, int layers, bool *moe) {
    static const char *const others[] = {"mamba", "attention", "mlp", "linear_attention",
                                         "full_attention"};
    struct node *list = find(im, NAMES("layers_block_type", "layer_types"));
    struct node *pattern = find(im, NAMES("hybrid_override_pattern"));
    const char *text;
    if (list) {
        if (per_layer(im, list, "layers_block_type", layers))
            layers_of_names(im, list, "layers_block_type", "moe", others, COUNT(others), moe);
        return;
    }
    if (!pattern) {
        diag_error(im->diags, im->map->loc,
                   "missing key 'layers_block_type' or 'hybrid_override_pattern'");
        return;
    }
    if (!node_string(im->diags, pattern, "hybrid_override_pattern", &text))
        return;
    if (strlen(text) != (size_t)layers || text[strspn(text, "ME*-")])
        diag_error(im->diags, pattern->loc,
                   "hybrid_override_pattern: expected %d of the letters M, E, * and -", layers);
    for (int i = 0; i < layers && text[i]; i++)
        moe[i] = text[i] == 'E';
}

/* How many layers a pattern has, for files that leave the number to it. */
static struct node *pattern_length(struct importer *im, int *out) {
    struct node *list = find(im, NAMES("layers_block_type", "layer_types"));
    struct node *pattern = find(im, NAMES("hybrid_override_pattern"));
    if (list && list->kind == NODE_LIST)
        *out = list->count;
    else if (pattern && pattern->kind == NODE_SCALAR)
        *out = (int)strlen(pattern->text);
    else
        return NULL;
    return list ? list : pattern;
}

/* MTP layers get the checkpoint's numbers L, L+1, ... */
static void import_mtp(struct importer *im) {
    struct model *m = im->m;
    struct node *n = find(im, NAMES("num_nextn_predict_layers"));
    int count = 0;
    if (!n || !node_int(im->diags, n, "num_nextn_predict_layers", 0, 16, &count) || !count)
        return;
    if (!im->family->mtp) {
        assume(im, n->loc, "MTP layers are left out: %s keeps them apart from its layers",
               im->family->model_type);
        return;
    }
    m->num_nextn_predict_layers = count;
    m->at.num_nextn_predict_layers = n->loc;
    assume(im, n->loc,
           "assumed experts in the MTP layers, from layer %d on; files saved by transformers "
           "leave these layers out",
           m->num_hidden_layers);
}

static void import_layers(struct importer *im) {
    static void (*const rules[])(struct importer *, int, bool *) = {
        [LAYERS_DENSE_FIRST] = layers_dense_first, [LAYERS_SPARSE_STEP] = layers_sparse_step,
        [LAYERS_INTERLEAVED] = layers_interleaved, [LAYERS_PERIOD] = layers_period,
        [LAYERS_PATTERN] = layers_pattern,         [LAYERS_INTERVAL] = layers_interval};
    struct model *m = im->m;
    const char *const *names = NAMES("num_hidden_layers", "num_layers");
    struct node *n = NULL;
    if (im->family->layers == LAYERS_PATTERN && !find(im, names))
        n = pattern_length(im, &m->num_hidden_layers);
    if (n)
        m->at.num_hidden_layers = n->loc;
    else
        need_int(im, names, &m->num_hidden_layers, &m->at.num_hidden_layers);
    if (m->num_hidden_layers < 1 || m->num_hidden_layers > MAX_LAYERS)
        return; /* reported, or model_check will */
    int layers = m->num_hidden_layers;
    bool *moe = arena_array(im->arena, bool, layers);
    memset(moe, true, sizeof *moe * (size_t)layers);
    if (im->family->layers != LAYERS_ALL)
        rules[im->family->layers](im, layers, moe);
    import_mtp(im);
    m->at.moe_layers = m->at.num_hidden_layers;
    m->moe_layers = arena_array(im->arena, int, layers + m->num_nextn_predict_layers);
    for (int i = 0; i < layers; i++)
        if (moe[i])
            m->moe_layers[m->num_moe_layers++] = i;
    for (int i = 0; i < m->num_nextn_predict_layers; i++)
        m->moe_layers[m->num_moe_layers++] = layers + i;
}

/* ---- routing ---- */

static void import_norm(struct importer *im) {
    enum norm_rule rule = im->family->norm;
    struct node *n = find(im, NAMES("norm_topk_prob", "moe_renormalize"));
    bool fixed = rule == NORM_ALWAYS || rule == NORM_NEVER;
    bool norm = rule == NORM_ALWAYS || rule == NORM_DEFAULT_TRUE, said = norm;
    if (n && !node_bool(im->diags, n, "norm_topk_prob", &said))
        return;
    if (fixed && said != norm)
        diag_error(im->diags, n->loc, "norm_topk_prob: %s %s divides the weights by their sum",
                   im->family->model_type, norm ? "always" : "never");
    if (!fixed && !n)
        assume(im, im->map->loc, "assumed norm_topk_prob: %s, the default of %s",
               norm ? "true" : "false", im->family->model_type);
    im->m->router.norm_topk_prob = said;
}

static void route_softmax(struct importer *im) {
    model_router_defaults(im->m, MOE_ROUTER_SOFTMAX_TOPK);
    import_norm(im);
}

static void route_topk_softmax(struct importer *im) {
    model_router_defaults(im->m, MOE_ROUTER_TOPK_SOFTMAX);
}

/* A key that may only say what the family does; when absent, the family decides. */
static void expect(struct importer *im, const char *const *names, const char *value) {
    struct node *n = find(im, names);
    const char *text;
    if (!n)
        assume(im, im->map->loc, "assumed %s: %s, which %s has", names[0], value,
               im->family->model_type);
    else if (node_string(im->diags, n, names[0], &text) && strcmp(text, value))
        diag_error(im->diags, n->loc, "%s: '%.60s' is not supported in %s, only '%s'", names[0],
                   text, im->family->model_type, value);
}

static void import_groups(struct importer *im) {
    struct model *m = im->m;
    default_int(im, NAMES("n_group", "num_expert_group"), im->family->n_group, 1,
                &m->router.n_group, &m->at.n_group);
    default_int(im, NAMES("topk_group"), im->family->topk_group, 1, &m->router.topk_group,
                &m->at.topk_group);
    if (m->router.n_group < 1 || m->router.topk_group < 1)
        diag_error(im->diags, m->router.n_group < 1 ? m->at.n_group : m->at.topk_group,
                   "n_group and topk_group: expected 1 or more");
}

static void import_scale(struct importer *im) {
    default_double(im, NAMES("routed_scaling_factor", "moe_router_scaling_factor"),
                   im->family->scale, &im->m->router.routed_scaling_factor);
}

/* Everything but the scores. */
static void route_noaux(struct importer *im) {
    model_router_defaults(im->m, MOE_ROUTER_DEEPSEEK_V3);
    expect(im, NAMES("topk_method"), "noaux_tc");
    import_groups(im);
    if (im->m->router.topk_group < im->m->router.n_group)
        assume(im, im->m->at.topk_group,
               "assumed masked_groups: -inf, as DeepSeek's own code; some versions of "
               "transformers have zero");
    import_norm(im);
    import_scale(im);
    im->m->router.correction_bias = true;
}

static void route_deepseek_v3(struct importer *im) {
    expect(im, NAMES("scoring_func", "moe_router_activation_func"), "sigmoid");
    route_noaux(im);
}

/* The released file names the choice where the scores should stand; its code has sigmoids. */
static void route_dots1(struct importer *im) {
    struct node *n = find(im, NAMES("scoring_func"));
    if (n && n->kind == NODE_SCALAR && !strcmp(n->text, "noaux_tc"))
        assume(im, n->loc, "assumed scoring_func: sigmoid, which dots1 has");
    else
        expect(im, NAMES("scoring_func"), "sigmoid");
    route_noaux(im);
}

/* Softmax scores; a group's score is its best expert, not the sum of two. */
static void route_deepseek_v2(struct importer *im) {
    struct model *m = im->m;
    struct node *method = find(im, NAMES("topk_method"));
    const char *text = "greedy";
    model_router_defaults(m, MOE_ROUTER_DEEPSEEK_V3);
    expect(im, NAMES("scoring_func"), "softmax");
    m->router.sigmoid = false;
    if (method && !node_string(im->diags, method, "topk_method", &text))
        return;
    if (!method)
        assume(im, im->map->loc, "assumed topk_method: greedy, the default of deepseek_v2");
    import_groups(im);
    bool grouped = !strcmp(text, "group_limited_greedy");
    if (!grouped && strcmp(text, "greedy"))
        diag_error(im->diags, method->loc,
                   "topk_method: '%.60s' is not supported in deepseek_v2", text);
    m->router.group_best = grouped && m->router.topk_group < m->router.n_group;
    if (!m->router.group_best)
        m->router.n_group = m->router.topk_group = 1; /* they limit nothing */
    import_norm(im);
    if (m->router.norm_topk_prob)
        diag_error(im->diags, find(im, NAMES("norm_topk_prob"))->loc,
                   "norm_topk_prob: true is not supported in deepseek_v2: DeepSeek's code then "
                   "drops the scaling factor, transformers ignores the key");
    import_scale(im);
}

/* DeepSeek's router, experts of two matrices with a squared ReLU between them. */
static void route_nemotron(struct importer *im) {
    struct node *shared = find(im, NAMES("n_shared_experts"));
    int count = 1;
    route_deepseek_v3(im);
    if (shared && read_int(im, shared, "n_shared_experts", &count) && count != 1)
        diag_error(im->diags, shared->loc, "n_shared_experts: nemotron_h has 1, not %d", count);
}

/* Softmax scores, a bias for the choice, weights divided by max(sum, moe_norm_min). */
static void route_ernie(struct importer *im) {
    struct node *bias = find(im, NAMES("use_bias"));
    struct node *balanced = find(im, NAMES("moe_use_aux_free"));
    struct node *least = find(im, NAMES("moe_norm_min"));
    double norm_min = 0;
    model_router_defaults(im->m, MOE_ROUTER_DEEPSEEK_V3);
    im->m->router.sigmoid = false;
    im->m->router.correction_bias = true;
    import_norm(im);
    if (is_set(bias))
        diag_error(im->diags, bias->loc, "use_bias: biases in the experts are not supported");
    if (balanced)
        node_bool(im->diags, balanced, "moe_use_aux_free", &im->m->router.correction_bias);
    if (least && node_double(im->diags, least, "moe_norm_min", 0, 1, &norm_min) &&
        norm_min > 1e-9)
        diag_error(im->diags, least->loc, "moe_norm_min: a sum held above %g is not supported",
                   norm_min);
}

/* Experts and the one shared expert are intermediate_size wide. */
static void route_hunyuan(struct importer *im) {
    struct node *shared = find(im, NAMES("num_shared_expert"));
    struct node *width = find(im, NAMES("moe_intermediate_size"));
    int count = 1, inter = im->m->moe_intermediate_size;
    route_softmax(im);
    if (shared && read_int(im, shared, "num_shared_expert", &count) && count != 1)
        diag_error(im->diags, shared->loc, "num_shared_expert: hunyuan_v1_moe has 1, not %d",
                   count);
    if (width && read_int(im, width, "moe_intermediate_size", &inter) &&
        inter != im->m->moe_intermediate_size)
        diag_error(im->diags, width->loc,
                   "moe_intermediate_size: hunyuan_v1_moe has experts of intermediate_size %d, "
                   "not %d",
                   im->m->moe_intermediate_size, inter);
}

static void route_llama4(struct importer *im) {
    model_router_defaults(im->m, MOE_ROUTER_LLAMA4);
}

static void route_gpt_oss(struct importer *im) {
    model_router_defaults(im->m, MOE_ROUTER_TOPK_SOFTMAX);
    im->m->router.bias = true;
    im->m->weights.bias = true;
}

static void route_minimax2(struct importer *im) {
    struct node *bias = find(im, NAMES("use_routing_bias", "use_moe_router_bias"));
    struct node *shared = find(im, NAMES("shared_intermediate_size"));
    model_router_defaults(im->m, MOE_ROUTER_MINIMAX2);
    expect(im, NAMES("scoring_func"), "sigmoid");
    im->m->router.correction_bias = true;
    if (bias)
        node_bool(im->diags, bias, "use_routing_bias", &im->m->router.correction_bias);
    if (is_set(shared))
        diag_error(im->diags, shared->loc,
                   "shared_intermediate_size: minimax_m2 has no shared expert");
    if (is_set(find(im, NAMES("use_mtp"))))
        assume(im, find(im, NAMES("use_mtp"))->loc,
               "MTP layers are left out: minimax_m2 keeps them apart from its layers");
}

static void route_phimoe(struct importer *im) {
    struct node *n = find(im, NAMES("router_jitter_noise"));
    model_router_defaults(im->m, MOE_ROUTER_SPARSE_MIXER);
    if (n)
        node_double(im->diags, n, "router_jitter_noise", 0, 0.5, &im->m->router.jitter);
    else
        assume(im, im->map->loc, "assumed router_jitter_noise: %g, the default of phimoe",
               im->m->router.jitter);
}

/* ---- experts ---- */

static void import_activation(struct importer *im) {
    static const struct {
        const char *name;
        enum moe_activation act;
    } acts[] = {{"silu", MOE_ACT_SWIGLU},         {"swish", MOE_ACT_SWIGLU},
                {"gelu", MOE_ACT_GEGLU},          {"gelu_pytorch_tanh", MOE_ACT_GEGLU_TANH},
                {"gelu_new", MOE_ACT_GEGLU_TANH}, {"relu2", MOE_ACT_RELU2}};
    bool gated = im->family->route != route_nemotron;
    struct node *n =
        find(im, gated ? NAMES("hidden_act", "hidden_activation") : NAMES("mlp_hidden_act"));
    const char *text = gated ? "silu" : "relu2";
    if (n && !node_string(im->diags, n, "hidden_act", &text))
        return;
    if (!n)
        assume(im, im->map->loc, "assumed %s: %s, the default of %s",
               gated ? "hidden_act" : "mlp_hidden_act", text, im->family->model_type);
    for (int i = 0; i < COUNT(acts); i++)
        if (!strcmp(text, acts[i].name) && (acts[i].act == MOE_ACT_RELU2) == !gated) {
            im->m->activation = acts[i].act;
            return;
        }
    diag_error(im->diags, n->loc, "activation '%.60s' is not supported in %s", text,
               im->family->model_type);
}

/* The file says silu and means a clamped SwiGLU; alpha, and sometimes the limit, are in the
 * family's code alone. */
static void import_swiglu_oai(struct importer *im) {
    struct model *m = im->m;
    struct node *act = find(im, NAMES("hidden_act"));
    m->activation = MOE_ACT_SWIGLU_OAI;
    default_double(im, NAMES("swiglu_alpha"), 1.702, &m->act_alpha);
    default_double(im, NAMES("swiglu_limit"), 7.0, &m->act_limit);
    if (act && strcmp(act->text ? act->text : "", "silu"))
        diag_error(im->diags, act->loc, "hidden_act: gpt_oss has silu");
}

static void import_shared(struct importer *im) {
    struct model *m = im->m;
    int count = 0;
    m->at.shared = im->map->loc;
    switch (im->family->shared) {
    case SHARED_NONE:
        break;
    case SHARED_COUNT:
        default_int(im,
                    NAMES("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
                    im->family->num_shared, 0, &count, &m->at.shared);
        if (count < 0 || count > 64)
            diag_error(im->diags, m->at.shared, "n_shared_experts: %d is outside 0..64", count);
        else if (m->moe_intermediate_size <= MAX_SIZE)
            m->shared.intermediate_size = count * m->moe_intermediate_size;
        break;
    case SHARED_SIZE:
    case SHARED_GATED:
        need_int(im,
                 NAMES("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
                       "shared_intermediate_size"),
                 &m->shared.intermediate_size, &m->at.shared);
        m->shared.gate = im->family->shared == SHARED_GATED && m->shared.intermediate_size;
        break;
    case SHARED_SAME:
        m->shared.intermediate_size = m->moe_intermediate_size;
        m->at.shared = m->at.moe_intermediate_size;
        assume(im, im->map->loc, "assumed one shared expert as wide as an expert, as %s has it",
               im->family->model_type);
        break;
    }
}

/* ---- weights ---- */

static void import_fp8(struct importer *im, struct node *q) {
    struct model *m = im->m;
    struct node *block = find_in(im, q, NAMES("weight_block_size"));
    struct node *fmt = find_in(im, q, NAMES("fmt"));
    const char *text;
    if (fmt && node_string(im->diags, fmt, "fmt", &text) && !strstr(text, "e4m3"))
        diag_error(im->diags, fmt->loc, "fmt: '%.60s' is not supported, only e4m3", text);
    m->weights.format = block ? MOE_FORMAT_FP8_BLOCK : MOE_FORMAT_FP8_TENSOR;
    if (!block || !node_kind_is(im->diags, block, "weight_block_size", NODE_LIST))
        return;
    if (block->count != 2)
        diag_error(im->diags, block->loc, "weight_block_size: expected two sizes, not %d",
                   block->count);
    for (int i = 0; i < 2 && block->count == 2; i++)
        node_int(im->diags, block->items[i], "weight_block_size", 1, MAX_SIZE,
                 &m->weights.block[i]);
}

/* Routed experts that stay unquantised in a quantised checkpoint. */
static void refuse_mixed(struct importer *im, struct node *q) {
    struct node *list = find_in(im, q, NAMES("modules_to_not_convert", "ignored_layers"));
    for (int i = 0; list && list->kind == NODE_LIST && i < list->count; i++) {
        const struct node *n = list->items[i];
        const char *experts = n->kind == NODE_SCALAR ? strstr(n->text, ".experts") : NULL;
        if (experts)
            diag_error(im->diags, n->loc,
                       "modules_to_not_convert: experts of two formats are not supported");
    }
}

static void import_quantisation(struct importer *im, struct node *q) {
    struct node *n;
    const char *method;
    if (!node_kind_is(im->diags, q, "quantization_config", NODE_MAP))
        return;
    im->m->at.weights = q->loc;
    n = find_in(im, q, NAMES("quant_method"));
    if (!n) {
        diag_error(im->diags, q->loc, "missing key 'quant_method'");
        return;
    }
    if (!node_string(im->diags, n, "quant_method", &method))
        return;
    if (!strcmp(method, "fp8"))
        import_fp8(im, q);
    else if (!strcmp(method, "mxfp4"))
        im->m->weights.format = MOE_FORMAT_MXFP4;
    else
        diag_error(im->diags, n->loc,
                   "quant_method: '%.60s' is not supported, only fp8 and mxfp4", method);
    refuse_mixed(im, q);
}

static void import_dtype(struct importer *im) {
    struct node *n = find(im, NAMES("dtype", "torch_dtype"));
    if (!n && im->root != im->map)
        n = find_in(im, im->root, NAMES("dtype", "torch_dtype"));
    if (!n)
        assume(im, im->map->loc, "assumed dtype: bfloat16");
    else if (n->kind != NODE_SCALAR || strcmp(n->text, "bfloat16"))
        assume(im, n->loc, "dtype: expert weights are rounded to bfloat16");
}

static void import_weights(struct importer *im) {
    struct node *q = find(im, NAMES("quantization_config"));
    const char *path = im->root->loc.source ? im->root->loc.source->path : "";
    const char *slash = strrchr(path, '/');
    if (!q && im->root != im->map)
        q = find_in(im, im->root, NAMES("quantization_config"));
    if (q)
        import_quantisation(im, q);
    else
        import_dtype(im);
    if (!strcmp(slash ? slash + 1 : path, "config.json") &&
        !access(path_join(im->arena, path_dir(im->arena, path), "hf_quant_config.json"), F_OK))
        diag_error(im->diags, im->root->loc,
                   "hf_quant_config.json lies beside this file: its formats are not supported");
}

/* ---- the whole ---- */

static void import_sizes(struct importer *im) {
    struct model *m = im->m;
    const char *width = im->family->wide ? "intermediate_size" : "moe_intermediate_size";
    need_int(im, NAMES("hidden_size"), &m->hidden_size, &m->at.hidden_size);
    need_int(im, NAMES(width), &m->moe_intermediate_size, &m->at.moe_intermediate_size);
    need_int(im,
             NAMES("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
             &m->num_experts, &m->at.num_experts);
    need_int(im,
             NAMES("num_experts_per_tok", "num_experts_per_token", "experts_per_token",
                   "top_k_experts", "moe_k", "moe_topk"),
             &m->num_experts_per_tok, &m->at.num_experts_per_tok);
}

static void refuse_features(struct importer *im) {
    for (int i = 0; i < COUNT(refused); i++) {
        struct node *n = map_get(im->map, refused[i].key);
        if (!n || node_is_null(n) || !is_set(n))
            continue;
        if (im->family->route == route_gpt_oss && !strcmp(refused[i].key, "swiglu_limit"))
            continue;
        diag_error(im->diags, n->loc, "%s: not supported: %s", refused[i].key, refused[i].why);
    }
}

static bool looks_like_routing(const char *key) {
    static const char *const marks[] = {"expert",  "moe",  "router", "routing",
                                        "scoring", "topk", "swiglu", "latent"};
    if (!strncmp(key, "index_", 6) || strstr(key, "loss"))
        return false; /* sparse attention's, training's */
    for (int i = 0; i < COUNT(harmless); i++)
        if (!strcmp(key, harmless[i]))
            return false;
    for (int i = 0; i < COUNT(marks); i++)
        if (strstr(key, marks[i]))
            return true;
    return false;
}

static void warn_unread(struct importer *im) {
    for (int i = 0; i < im->map->count; i++)
        if (!im->map->items[i]->used && !node_is_null(im->map->items[i]) &&
            looks_like_routing(im->map->keys[i]->text))
            diag_add(im->diags, DIAG_WARNING, im->map->keys[i]->loc,
                     "%s: not read for %s; if it changes the layer, this model is wrong",
                     im->map->keys[i]->text, im->family->model_type);
}

/* The family of a map's model_type; with an error when complain is set. */
static const struct family *find_family(struct importer *im, struct node *map, bool complain) {
    const char *names[COUNT(families)];
    struct node *n = map_get(map, "model_type");
    const char *type = "";
    if (n && !node_string(im->diags, n, "model_type", &type))
        return NULL;
    for (int i = 0; i < COUNT(families); i++) {
        names[i] = families[i].model_type;
        if (!strcmp(type, names[i]))
            return &families[i];
    }
    if (!complain)
        return NULL;
    if (!n) {
        diag_error(im->diags, map->loc, "missing key 'model_type'");
        return NULL;
    }
    const char *near = nearest(type, names, COUNT(names));
    diag_error(im->diags, n->loc, "model_type: moec has no family '%.60s'%s%s%s", type,
               near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
    struct buf known = {.arena = im->arena};
    for (int i = 0; i < COUNT(names); i++)
        buf_printf(&known, "%s %s", i ? "," : "", names[i]);
    if (!near)
        diag_add(im->diags, DIAG_NOTE, n->loc, "the families are%s", known.data);
    return NULL;
}

/* A multimodal file keeps the text model in text_config. */
static bool choose_map(struct importer *im) {
    struct node *text = map_get(im->root, "text_config");
    im->map = im->root;
    if (text && !node_is_null(text)) {
        if (!node_kind_is(im->diags, text, "text_config", NODE_MAP))
            return false;
        im->map = text;
        if (!map_get(text, "model_type"))
            im->family = find_family(im, im->root, false);
    }
    if (!im->family)
        im->family = find_family(im, im->map, true);
    return im->family != NULL;
}

/* The file's own key whose value stands there, or NULL. */
static const char *key_at(const struct node *map, struct loc at) {
    for (int i = 0; i < map->count; i++)
        if (map->items[i]->loc.line == at.line && map->items[i]->loc.col == at.col)
            return map->keys[i]->text;
    return NULL;
}

/* model_check speaks of a model file's keys; this file may name them otherwise. */
static void name_keys_as_written(struct importer *im, struct diag *from) {
    static const char *const ours[] = {"num_hidden_layers",     "num_experts",
                                       "num_experts_per_tok",   "n_group",
                                       "moe_intermediate_size", "topk_group"};
    for (struct diag *g = from; g; g = g->next) {
        const char *key = key_at(im->map, g->loc);
        size_t len = strcspn(g->text, ": ");
        for (int i = 0; key && i < COUNT(ours); i++)
            if (strlen(ours[i]) == len && !strncmp(g->text, ours[i], len)) {
                g->text = arena_printf(im->arena, "%s%s", key, g->text + len);
                break;
            }
    }
}

/* Checks and, when something is wrong, says it in the file's words. */
static void check_model(struct importer *im) {
    struct diag *last = im->diags->last;
    model_check(im->diags, im->m);
    name_keys_as_written(im, last ? last->next : im->diags->first);
}

struct model *model_import(struct arena *a, struct diags *d, struct node *root,
                           const char *name) {
    int before = d->errors;
    struct importer im = {.arena = a, .diags = d, .root = root};
    if (!node_kind_is(d, root, "config", NODE_MAP) || !choose_map(&im))
        return NULL;
    struct model *m = im.m = arena_array(a, struct model, 1);
    m->name = name ? name : im.family->model_type;
    m->loc = root->loc;
    m->at.router = m->at.n_group = m->at.topk_group = m->at.weights = im.map->loc;
    import_layers(&im);
    import_sizes(&im);
    im.family->route(&im);
    if (im.family->route == route_gpt_oss)
        import_swiglu_oai(&im);
    else
        import_activation(&im);
    import_shared(&im);
    import_weights(&im);
    refuse_features(&im);
    warn_unread(&im);
    if (d->errors == before)
        check_model(&im);
    return d->errors == before ? m : NULL;
}
