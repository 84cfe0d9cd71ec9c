/* Model files and config.json. tests/configs/X.json is a config as family X writes it; what it must
 * become is plans/models/X.yaml, or else tests/configs/X.yaml, notes included; MOEC_GOLDEN=1 rewrites
 * the latter. */
#include "../compiler/moec.h"

#include <criterion/criterion.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>

static struct arena arena;
static struct diags diags;

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
}

static void tear_down(void) {
    arena_free(&arena);
}

TestSuite(models, .init = set_up, .fini = tear_down);

/* ---- helpers ---- */

static const char *all_diags(void) {
    struct buf b = {.arena = &arena};
    buf_printf(&b, "%s", "");
    for (const struct diag *g = diags.first; g; g = g->next)
        buf_printf(&b, "%d:%d %s\n", g->loc.line, g->loc.col, g->text);
    return b.data;
}

static struct model *parse(const char *text) {
    diags = (struct diags){.arena = &arena};
    struct node *root = yaml_parse(&arena, &diags, "m.yaml", text, strlen(text));
    cr_assert(root, "%s", all_diags());
    return model_is_config(root) ? model_import(&arena, &diags, root, "m")
                                 : model_parse(&arena, &diags, root);
}

static struct model *accept(const char *text) {
    struct model *m = parse(text);
    cr_assert(m, "refused:\n%s\n%s", text, all_diags());
    return m;
}

/* The first error must be at line:col and contain what. */
static void refuse(const char *text, int line, int col, const char *what) {
    struct model *m = parse(text);
    const struct diag *g = diags.first;
    while (g && g->severity != DIAG_ERROR)
        g = g->next;
    cr_assert(!m && g, "accepted:\n%s", text);
    cr_expect(strstr(g->text, what) && g->loc.line == line && g->loc.col == col,
              "expected %d:%d ... %s, got\n%s", line, col, what, all_diags());
}

static const char *written(const struct model *m) {
    struct buf b = {.arena = &arena};
    model_write(&b, m);
    return b.data;
}

static void expect_layers(const struct model *m, int n, const int *layers) {
    cr_assert_eq(m->num_moe_layers, n);
    for (int i = 0; i < n; i++)
        cr_expect_eq(m->moe_layers[i], layers[i]);
}
#define LAYERS(m, ...) \
    expect_layers(m, sizeof((int[]){__VA_ARGS__}) / sizeof(int), (int[]){__VA_ARGS__})

/* A model file of 64 experts; rest replaces the router line and may add others. */
static const char *model_text(const char *rest) {
    return arena_printf(&arena,
                        "name: m\nnum_hidden_layers: 8\nhidden_size: 256\n"
                        "moe_intermediate_size: 128\nnum_experts: 64\n"
                        "num_experts_per_tok: 4\n%s\n",
                        rest);
}

/* A config.json of one line per key, in the order given, after the common ones. */
static const char *config_text(const char *type, const char *rest) {
    return arena_printf(&arena,
                        "{\"model_type\": \"%s\",\n\"hidden_size\": 256,\n\"hidden_act\": "
                        "\"silu\",\n\"torch_dtype\": \"bfloat16\",\n"
                        "\"num_hidden_layers\": 8,\n%s}\n",
                        type, rest);
}
#define QWEN \
    "\"moe_intermediate_size\": 128, \"num_experts\": 64, \"num_experts_per_tok\": 4, " \
    "\"norm_topk_prob\": true, \"decoder_sparse_step\": 1"
#define DEEPSEEK \
    "\"moe_intermediate_size\": 128, \"n_routed_experts\": 64, \"num_experts_per_tok\": 4, " \
    "\"n_shared_experts\": 1, \"norm_topk_prob\": true, \"routed_scaling_factor\": 2.5"
#define DEEPSEEK_GROUPS DEEPSEEK ", \"n_group\": 8, \"topk_group\": 4"
#define MIXTRAL \
    "\"intermediate_size\": 128, \"num_local_experts\": 8, \"num_experts_per_tok\": 2"

/* ---- files ---- */

static void for_each(const char *pattern, int least, void (*check)(const char *path)) {
    glob_t g;
    cr_assert_eq(glob(pattern, 0, NULL, &g), 0);
    cr_assert_geq((int)g.gl_pathc, least);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        diags = (struct diags){.arena = &arena};
        check(g.gl_pathv[i]);
    }
    globfree(&g);
}

static void is_silent_and_round_trips(const char *path) {
    struct model *m = model_read(&arena, &diags, path);
    cr_assert(m && !diags.first, "%s:\n%s", path, all_diags());
    const char *slash = strrchr(path, '/');
    cr_expect_str_eq(arena_printf(&arena, "%s.yaml", m->name), slash + 1);
    const char *text = written(m);
    cr_expect_str_eq(written(accept(text)), text);
}

Test(models, shipped_files_read_without_a_word_and_round_trip) {
    for_each("plans/models/*.yaml", 17, is_silent_and_round_trips);
}

static const char *without_comments(const char *path) {
    struct buf b = {.arena = &arena};
    char *text, *save = NULL;
    size_t len;
    cr_assert_eq(file_read(&arena, path, 1 << 20, &text, &len), 0, "%s", path);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        if (*line != '#')
            buf_printf(&b, "%s\n", line);
    return b.data;
}

static const char *notes_and_text(const struct model *m) {
    struct buf b = {.arena = &arena};
    for (const struct diag *g = diags.first; g; g = g->next)
        buf_printf(&b, "# %s: %s\n", g->severity == DIAG_WARNING ? "warning" : "note", g->text);
    model_write(&b, m);
    return b.data;
}

static void becomes_what_it_must(const char *path) {
    const char *slash = strrchr(path, '/');
    int stem = (int)strlen(slash) - 5;
    const char *shipped = arena_printf(&arena, "plans/models%.*s.yaml", stem, slash);
    const char *golden = arena_printf(&arena, "tests/configs%.*s.yaml", stem, slash);
    char *text;
    size_t len;
    struct model *m = model_read(&arena, &diags, path);
    cr_assert(m, "%s:\n%s", path, all_diags());
    if (!file_read(&arena, shipped, 1 << 20, &text, &len)) {
        cr_expect_str_eq(written(m), without_comments(shipped), "%s", path);
        return;
    }
    const char *got = notes_and_text(m);
    if (getenv("MOEC_GOLDEN"))
        cr_assert_eq(file_write(golden, got, strlen(got)), 0);
    cr_assert_eq(file_read(&arena, golden, 1 << 20, &text, &len), 0, "%s", golden);
    cr_expect_str_eq(got, text, "%s", path);
}

Test(models, every_config_becomes_what_it_must) {
    for_each("tests/configs/*.json", 37, becomes_what_it_must);
}

Test(models, figures_of_deepseek_v3) {
    struct model *m = model_read(&arena, &diags, "plans/models/deepseek-v3.yaml");
    cr_assert(m);
    cr_expect_eq(m->num_moe_layers, 59);
    cr_expect_eq(m->moe_layers[0], 3);
    cr_expect_eq(m->moe_layers[58], 61);
    cr_expect_eq(m->hidden_size, 7168);
    cr_expect_eq(m->moe_intermediate_size, 2048);
    cr_expect_eq(m->num_experts, 256);
    cr_expect_eq(m->num_experts_per_tok, 8);
    cr_expect_eq(m->router.method, MOE_ROUTER_DEEPSEEK_V3);
    cr_expect_eq(m->router.n_group, 8);
    cr_expect_eq(m->router.topk_group, 4);
    cr_expect_eq(m->router.routed_scaling_factor, 2.5);
    cr_expect(m->router.norm_topk_prob && m->router.correction_bias && m->router.sigmoid);
    cr_expect(!m->router.mask_zero && !m->router.bias && !m->router.logits_bf16);
    cr_expect_eq(m->shared.intermediate_size, 2048);
    cr_expect(!m->shared.gate);
    cr_expect_eq(m->weights.format, MOE_FORMAT_FP8_BLOCK);
    cr_expect(m->weights.block[0] == 128 && m->weights.block[1] == 128 && !m->weights.bias);
}

/* ---- model files ---- */

Test(models, every_field_survives_writing) {
    static const char *const texts[] = {
        "router: {method: deepseek_v3, n_group: 8, topk_group: 3, norm_topk_prob: true, "
        "routed_scaling_factor: 0.1, correction_bias: true, scoring: softmax, masked_groups: "
        "zero, group_score: best, "
        "logits_dtype: bfloat16}\nactivation: {name: geglu, approximate: tanh}\n"
        "shared_experts: {intermediate_size: 48, gate: true}\nnum_nextn_predict_layers: 2\n"
        "moe_layers: [0, 3, 4]\nweights: {format: fp8_block, block: [64, 32], bias: true}",
        "router: {method: topk_softmax, bias: true}\nmoe_layers: odd\n"
        "activation: {name: swiglu_oai, alpha: 1.5, limit: 0.30000000000000004}\n"
        "weights: {format: mxfp4}",
        "router: {method: minimax2, correction_bias: true}\nmoe_layers: even\n"
        "activation: relu2\nweights: {format: fp8_tensor}",
        "router: {method: softmax_topk, norm_topk_prob: true}\nmoe_layers: 2-6\n"
        "activation: geglu",
        "router: {method: static, experts: [7, 0, 63, 5]}\nmoe_layers: 4",
        "router: {method: llama4, logits_dtype: bfloat16}\nmoe_layers: all",
        "router: {method: balanced}",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct model *m = accept(model_text(texts[i]));
        struct model *n = accept(written(m));
        cr_expect_str_eq(n->name, m->name);
        cr_expect_eq(n->num_hidden_layers, m->num_hidden_layers);
        cr_expect_eq(n->num_nextn_predict_layers, m->num_nextn_predict_layers);
        expect_layers(n, m->num_moe_layers, m->moe_layers);
        cr_expect_eq(n->hidden_size, m->hidden_size);
        cr_expect_eq(n->moe_intermediate_size, m->moe_intermediate_size);
        cr_expect_eq(n->num_experts, m->num_experts);
        cr_expect_eq(n->num_experts_per_tok, m->num_experts_per_tok);
        cr_expect_eq(n->router.method, m->router.method);
        cr_expect_eq(n->router.n_group, m->router.n_group);
        cr_expect_eq(n->router.topk_group, m->router.topk_group);
        cr_expect_eq(n->router.norm_topk_prob, m->router.norm_topk_prob);
        cr_expect_eq(n->router.routed_scaling_factor, m->router.routed_scaling_factor);
        cr_expect_eq(n->router.bias, m->router.bias);
        cr_expect_eq(n->router.correction_bias, m->router.correction_bias);
        cr_expect_eq(n->router.sigmoid, m->router.sigmoid);
        cr_expect_eq(n->router.mask_zero, m->router.mask_zero);
        cr_expect_eq(n->router.group_best, m->router.group_best);
        cr_expect_eq(n->router.logits_bf16, m->router.logits_bf16);
        cr_expect_eq(n->router.jitter, m->router.jitter);
        for (int j = 0; m->router.experts && j < 4; j++)
            cr_expect_eq(n->router.experts[j], m->router.experts[j]);
        cr_expect_eq(n->activation, m->activation);
        cr_expect_eq(n->act_alpha, m->act_alpha);
        cr_expect_eq(n->act_limit, m->act_limit);
        cr_expect_eq(n->shared.intermediate_size, m->shared.intermediate_size);
        cr_expect_eq(n->shared.gate, m->shared.gate);
        cr_expect_eq(n->weights.format, m->weights.format);
        cr_expect_eq(n->weights.block[0], m->weights.block[0]);
        cr_expect_eq(n->weights.block[1], m->weights.block[1]);
        cr_expect_eq(n->weights.bias, m->weights.bias);
    }
}

Test(models, every_field_is_read_as_written) {
    struct model *m = accept(model_text(
        "router: {method: deepseek_v3, n_group: 8, topk_group: 3, norm_topk_prob: true, "
        "routed_scaling_factor: 0.1, correction_bias: true, scoring: softmax, "
        "masked_groups: zero, group_score: best, logits_dtype: bfloat16}\n"
        "activation: {name: geglu, approximate: tanh}\n"
        "shared_experts: {intermediate_size: 48, gate: true}\nnum_nextn_predict_layers: 2\n"
        "moe_layers: [0, 3, 4]\nweights: {format: fp8_block, block: [64, 32], bias: true}"));
    LAYERS(m, 0, 3, 4, 8, 9);
    cr_expect(m->router.n_group == 8 && m->router.topk_group == 3);
    cr_expect(m->router.norm_topk_prob && m->router.correction_bias && !m->router.sigmoid);
    cr_expect(m->router.mask_zero && m->router.group_best && m->router.logits_bf16);
    cr_expect_eq(m->router.routed_scaling_factor, 0.1);
    cr_expect_eq(m->activation, MOE_ACT_GEGLU_TANH);
    cr_expect(m->shared.intermediate_size == 48 && m->shared.gate);
    cr_expect(m->weights.block[0] == 64 && m->weights.block[1] == 32 && m->weights.bias);
}

Test(models, layers_are_ranges_lists_and_words) {
    LAYERS(accept(model_text("router: {method: balanced}")), 0, 1, 2, 3, 4, 5, 6, 7);
    LAYERS(accept(model_text("router: {method: balanced}\nmoe_layers: odd")), 1, 3, 5, 7);
    LAYERS(accept(model_text("router: {method: balanced}\nmoe_layers: even")), 0, 2, 4, 6);
    LAYERS(accept(model_text("router: {method: balanced}\nmoe_layers: 6-7")), 6, 7);
    LAYERS(accept(model_text("router: {method: balanced}\nmoe_layers: [1, 5]\n"
                             "num_nextn_predict_layers: 1")),
           1, 5, 8);
}

Test(models, methods_decide_what_is_not_said) {
    static const struct {
        const char *router;
        bool sigmoid, norm;
        double jitter;
    } cases[] = {{"{method: softmax_topk}", false, false, 0},
                 {"{method: topk_softmax}", false, false, 0},
                 {"{method: deepseek_v3}", true, false, 0},
                 {"{method: llama4}", true, false, 0},
                 {"{method: minimax2}", true, true, 0},
                 {"{method: balanced}", false, false, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model *m =
            accept(model_text(arena_printf(&arena, "router: %s", cases[i].router)));
        cr_expect_eq(m->router.sigmoid, cases[i].sigmoid, "%s", cases[i].router);
        cr_expect_eq(m->router.norm_topk_prob, cases[i].norm, "%s", cases[i].router);
        cr_expect_eq(m->router.jitter, cases[i].jitter, "%s", cases[i].router);
        cr_expect(m->router.n_group == 1 && m->router.topk_group == 1);
        cr_expect_eq(m->router.routed_scaling_factor, 1);
        cr_expect_eq(m->activation, MOE_ACT_SWIGLU);
        cr_expect_eq(m->weights.format, MOE_FORMAT_BF16);
    }
}

/* Every key of the router map against every method. */
Test(models, keys_a_method_cannot_honour_are_errors) {
    static const struct {
        const char *key, *value, *methods;
    } keys[] = {
        {"n_group", "2", "deepseek_v3"},
        {"topk_group", "1", "deepseek_v3"},
        {"norm_topk_prob", "true", "softmax_topk deepseek_v3"},
        {"routed_scaling_factor", "2.0", "deepseek_v3"},
        {"bias", "true", "topk_softmax"},
        {"correction_bias", "true", "deepseek_v3 minimax2"},
        {"scoring", "softmax", "deepseek_v3"},
        {"masked_groups", "zero", "deepseek_v3"},
        {"group_score", "best", "deepseek_v3"},
        {"jitter_eps", "0.02", "sparse_mixer"},
        {"experts", "[0, 1]", "static"},
        {"logits_dtype", "bfloat16",
         "softmax_topk topk_softmax deepseek_v3 llama4 minimax2 sparse_mixer"},
    };
    for (int method = 0; method < MOE_ROUTER_COUNT; method++)
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
            bool fixed = method == MOE_ROUTER_STATIC && strcmp(keys[i].key, "experts");
            const char *text = arena_printf(
                &arena,
                "name: m\nnum_hidden_layers: 8\nhidden_size: 256\nmoe_intermediate_size: 128\n"
                "num_experts: 64\nnum_experts_per_tok: 2\nrouter: {%s: %s, method: %s%s}\n",
                keys[i].key, keys[i].value, router_names[method],
                fixed ? ", experts: [0, 1]" : "");
            if (strstr(keys[i].methods, router_names[method]))
                accept(text);
            else
                refuse(text, 7, 10,
                       arena_printf(&arena, "method %s has no %s", router_names[method],
                                    keys[i].key));
        }
}

Test(models, bad_routers_are_errors) {
    refuse(model_text("router: {n_group: 2}"), 7, 9, "missing key 'method'");
    refuse(model_text("router: {method: softmax_topq}"), 7, 18, "softmax_topk");
    refuse(model_text("router: softmax_topk"), 7, 9, "map");
    refuse(model_text("router: {method: deepseek_v3, n_groups: 2}"), 7, 31, "n_group");
    refuse(model_text("router: {method: deepseek_v3, n_group: 3}"), 7, 40, "do not divide 64");
    refuse(model_text("router: {method: deepseek_v3, n_group: 64, topk_group: 32}"), 7, 40,
           "only one expert");
    refuse(model_text("router: {method: deepseek_v3, n_group: 4, topk_group: 5}"), 7, 55,
           "5 of 4");
    refuse(model_text("router: {method: deepseek_v3, n_group: 32, topk_group: 1}"), 6, 22,
           "exceeds the 2 experts");
    refuse(model_text("router: {method: deepseek_v3, scoring: tanh}"), 7, 40, "scoring");
    refuse(model_text("router: {method: deepseek_v3, routed_scaling_factor: 0}"), 7, 54,
           "routed_scaling_factor");
    refuse(model_text("router: {method: sparse_mixer}"), 6, 22, "chooses 2");
    refuse(model_text("router: {method: static}"), 7, 9, "missing key 'experts'");
    refuse(model_text("router: {method: static, experts: [1, 2, 3]}"), 7, 35, "3 ids");
    refuse(model_text("router: {method: static, experts: [1, 2, 3, 64]}"), 7, 45, "experts");
    refuse(model_text("router: {method: static, experts: [1, 2, 3, 1]}"), 7, 45, "1 twice");
}

Test(models, bad_files_are_errors) {
    refuse("[1]\n", 1, 1, "map");
    refuse("name: m\n", 1, 1, "missing key 'num_hidden_layers'");
    refuse(model_text("router: {method: llama4}\nexpert_bias: true"), 8, 1, "expert_bias");
    refuse(model_text("router: {method: llama4}\nmoe_layer: odd"), 8, 1, "moe_layers");
    refuse(model_text("router: {method: llama4}\nmoe_layers: 5-8"), 8, 13, "0-7");
    refuse(model_text("router: {method: llama4}\nmoe_layers: 5-4"), 8, 13, "no range");
    refuse(model_text("router: {method: llama4}\nmoe_layers: 4294967296-4294967297"), 8, 13,
           "no range");
    refuse(model_text("router: {method: llama4}\nmoe_layers: old"), 8, 13, "but is old");
    refuse(model_text("router: {method: llama4}\nmoe_layers: {}"), 8, 13, "moe_layers");
    refuse(model_text("router: {method: llama4}\nmoe_layers: []"), 8, 13, "no layer");
    refuse(model_text("router: {method: llama4}\nmoe_layers: [1, 1]"), 8, 17, "ascend");
    refuse(model_text("router: {method: llama4}\nmoe_layers: [1, 8]"), 8, 17, "moe_layers");
    refuse(model_text("router: {method: llama4}\nnum_nextn_predict_layers: 17"), 8, 27,
           "0..16");
    refuse(model_text("router: {method: llama4}\nactivation: swigloo"), 8, 13, "swiglu");
    refuse(model_text("router: {method: llama4}\nactivation: {alpha: 1.0}"), 8, 13, "'name'");
    refuse(model_text("router: {method: llama4}\nactivation: {name: swiglu, limit: 7.0}"), 8,
           28, "limit");
    refuse(model_text("router: {method: llama4}\nactivation: {name: swiglu_oai, limit: -1.0}"),
           8, 39, "limit");
    refuse(model_text("router: {method: llama4}\nactivation: {name: geglu, approximate: erf}"),
           8, 40, "approximate");
    refuse(model_text("router: {method: llama4}\nshared_experts: {gate: true}"), 8, 17,
           "intermediate_size");
    refuse(model_text("router: {method: llama4}\nshared_experts: {intermediate_size: 40}"), 8,
           37, "divisible by 16");
    refuse(model_text("router: {method: llama4}\nweights: {format: fp8_block}"), 8, 10,
           "block");
    refuse(model_text("router: {method: llama4}\nweights: {format: fp8_block, block: [128]}"),
           8, 37, "two sizes");
    refuse(model_text("router: {method: llama4}\nweights: {format: bf16, block: [128, 128]}"),
           8, 32, "bf16 has no block");
    refuse(model_text("router: {method: llama4}\nweights: {format: int4}"), 8, 19, "format");
}

Test(models, limits_are_errors) {
    static const struct {
        const char *hidden, *inter, *experts, *topk;
        int line, col;
        const char *what;
    } cases[] = {
        {"250", "128", "8", "2", 3, 14, "divisible by 16 (the nearest are 240 and 256)"},
        {"256", "100", "8", "2", 4, 24, "divisible by 16"},
        {"131088", "128", "8", "2", 3, 14, "outside 1..131072"},
        {"256", "128", "1025", "2", 5, 14, "outside 1..1024"},
        {"256", "128", "64", "33", 6, 22, "outside 1..32"},
        {"256", "128", "8", "9", 6, 22, "exceeds num_experts"},
        {"256", "128", "0", "1", 5, 14, "at least 1"},
        {"99999999999", "128", "8", "2", 3, 14, "hidden_size"},
        {"256.0", "128", "8", "2", 3, 14, "whole number"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refuse(arena_printf(&arena,
                            "name: m\nnum_hidden_layers: 8\nhidden_size: %s\n"
                            "moe_intermediate_size: %s\nnum_experts: %s\n"
                            "num_experts_per_tok: %s\nrouter: {method: softmax_topk}\n",
                            cases[i].hidden, cases[i].inter, cases[i].experts, cases[i].topk),
               cases[i].line, cases[i].col, cases[i].what);
    refuse(model_text("router: {method: llama4}\nweights: {format: mxfp4}\n"
                      "shared_experts: {intermediate_size: 48}"),
           9, 37, "divisible by 32");
}

Test(models, names_that_are_no_file_names_are_errors) {
    static const char *const names[] = {"a/b", "..", "-o", "''", "'a b'", "ä"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        refuse(arena_printf(&arena,
                            "name: %s\nnum_hidden_layers: 8\nhidden_size: 256\n"
                            "moe_intermediate_size: 128\nnum_experts: 64\n"
                            "num_experts_per_tok: 4\nrouter: {method: balanced}\n",
                            names[i]),
               1, 7, "name");
}

/* ---- config.json ---- */

Test(models, a_config_is_told_by_its_content) {
    struct node *root = yaml_parse(&arena, &diags, "a", "{\"architectures\": []}", 21);
    cr_expect(root && model_is_config(root));
    root = yaml_parse(&arena, &diags, "a", "name: model_type", 16);
    cr_expect(root && !model_is_config(root));
    root = yaml_parse(&arena, &diags, "a", "[model_type]", 12);
    cr_expect(root && !model_is_config(root));
}

Test(models, configs_are_named_by_file_or_folder) {
    cr_expect_str_eq(model_config_name(&arena, "x/Qwen3-30B-A3B/config.json"), "qwen3-30b-a3b");
    cr_expect_str_eq(model_config_name(&arena, "Mixtral.json"), "mixtral");
    cr_expect_null(model_config_name(&arena, "config.json"));
    cr_expect_null(model_config_name(&arena, "a b.json"));
    cr_expect_str_eq(accept("{\"model_type\": \"mixtral\", \"hidden_size\": 256, "
                            "\"num_hidden_layers\": 8, " MIXTRAL "}")
                         ->name,
                     "m");
}

Test(models, aliases_mean_the_same) {
    static const char *const texts[] = {
        "\"num_local_experts\": 8, \"num_experts_per_tok\": 2",
        "\"num_experts\": 8, \"num_experts_per_token\": 2",
        "\"n_routed_experts\": 8, \"experts_per_token\": 2",
        "\"moe_num_experts\": 8, \"top_k_experts\": 2",
        "\"num_experts\": [8, 8], \"moe_topk\": [2, 2]",
        "\"num_experts\": 8, \"num_local_experts\": 8, \"moe_k\": 2",
    };
    const char *first = NULL;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        const char *keys = arena_printf(&arena, "\"intermediate_size\": 128, %s", texts[i]);
        const char *text = written(accept(config_text("mixtral", keys)));
        cr_expect_str_eq(text, first = first ? first : text);
    }
    refuse(config_text("mixtral", MIXTRAL ",\n\"num_experts\": 8,\n\"n_routed_experts\": 9"), 8,
           21, "contradicts");
    refuse(config_text("mixtral", "\"intermediate_size\": 128, \"num_experts\": 8,\n"
                                  "\"moe_topk\": [2, 2, 3]"),
           7, 20, "differ");
}

Test(models, errors_name_the_keys_of_the_config) {
    refuse(config_text("mixtral", "\"intermediate_size\": 128,\n\"num_local_experts\": 2000, "
                                  "\"num_experts_per_tok\": 2"),
           7, 22, "num_local_experts: 2000 is outside");
    refuse(config_text("hunyuan_v1_moe", "\"intermediate_size\": 128, \"num_experts\": 64,\n"
                                         "\"moe_topk\": 70"),
           7, 13, "moe_topk: 70");
    refuse(config_text("mixtral", "\"num_local_experts\": 8, \"num_experts_per_tok\": 2,\n"
                                  "\"intermediate_size\": 40"),
           7, 22, "intermediate_size: 40");
    cr_expect(!strstr(all_diags(), "moe_intermediate_size"), "%s", all_diags());
}

Test(models, layer_patterns) {
    LAYERS(accept(config_text("deepseek_v3", DEEPSEEK_GROUPS ", \"first_k_dense_replace\": 6")),
           6, 7);
    LAYERS(accept(config_text("deepseek_v3", DEEPSEEK_GROUPS
                              ", \"first_k_dense_replace\": 1, \"moe_layer_freq\": 3")),
           3, 6);
    LAYERS(accept(config_text("deepseek_v3", DEEPSEEK_GROUPS
                              ", \"moe_layer_freq\": [0, 1, 0, 0, 0, 0, 1, 1]")),
           1, 6, 7);
    LAYERS(accept(config_text("deepseek_v3",
                              DEEPSEEK_GROUPS ", \"first_k_dense_replace\": 2, "
                                              "\"moe_layer_freq\": [1, 1, 0, 0, 0, 0, 1, 1]")),
           6, 7);
    LAYERS(accept(config_text("deepseek_v3",
                              DEEPSEEK_GROUPS ", \"mlp_layer_types\": [\"dense\", \"sparse\", "
                                              "\"dense\", \"dense\", \"dense\", \"dense\", "
                                              "\"dense\", \"sparse\"]")),
           1, 7);
    LAYERS(accept(config_text("qwen3_moe", QWEN)), 0, 1, 2, 3, 4, 5, 6, 7);
    LAYERS(accept(config_text("qwen3_moe",
                              "\"moe_intermediate_size\": 128, \"num_experts\": 64, "
                              "\"num_experts_per_tok\": 4, \"norm_topk_prob\": true, "
                              "\"decoder_sparse_step\": 3, \"mlp_only_layers\": [2]")),
           5);
    LAYERS(accept(config_text("llama4_text", MIXTRAL ", \"interleave_moe_layer_step\": 4")), 3,
           7);
    LAYERS(accept(config_text("llama4_text", MIXTRAL ", \"moe_layers\": [0, 5]")), 0, 5);
    LAYERS(accept(config_text("jamba", MIXTRAL ", \"expert_layer_period\": 4, "
                                               "\"expert_layer_offset\": 2")),
           2, 6);
    LAYERS(
        accept(config_text("deepseek_v3", DEEPSEEK_GROUPS ", \"first_k_dense_replace\": 7, "
                                                          "\"num_nextn_predict_layers\": 2")),
        7, 8, 9);
}

Test(models, bad_layer_patterns_are_errors) {
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"moe_layer_freq\": [0, 1]"), 7, 19,
           "2 entries for 8 layers");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"moe_layer_freq\": 0"), 7, 19,
           "moe_layer_freq");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"first_k_dense_replace\": 8"), 5, 22,
           "no layer");
    refuse(config_text("qwen3_moe", "\"mlp_only_layers\": [8],\n" QWEN), 6, 21,
           "mlp_only_layers");
    refuse(config_text("jamba", MIXTRAL ",\n\"expert_layer_period\": 0"), 7, 24, "1 or more");
    refuse(config_text("nemotron_h",
                       DEEPSEEK_GROUPS ", \"moe_shared_expert_intermediate_size\": 128,\n"
                                       "\"hybrid_override_pattern\": \"MEMEMEMX\""),
           7, 28, "letters");
}

Test(models, nested_text_config) {
    struct model *m =
        accept("{\"model_type\": \"llama4\", \"hidden_size\": 1, \"torch_dtype\": "
               "\"bfloat16\", \"text_config\": {\"model_type\": \"llama4_text\", "
               "\"hidden_act\": \"silu\", \"hidden_size\": 256, "
               "\"num_hidden_layers\": 8, \"interleave_moe_layer_step\": 1, " MIXTRAL "}}");
    cr_expect_eq(m->hidden_size, 256);
    cr_expect_eq(m->shared.intermediate_size, 128);
    m = accept("{\"model_type\": \"some_vision_model\", \"text_config\": {\"model_type\": "
               "\"mixtral\", \"hidden_size\": 256, \"num_hidden_layers\": 8, " MIXTRAL "}}");
    cr_expect_eq(m->hidden_size, 256);
    m = accept("{\"model_type\": \"mixtral\", \"text_config\": {\"hidden_size\": 256, "
               "\"num_hidden_layers\": 8, " MIXTRAL "}}");
    cr_expect_eq(m->hidden_size, 256);
}

Test(models, activations) {
    static const struct {
        const char *name;
        enum moe_activation act;
    } cases[] = {{"silu", MOE_ACT_SWIGLU},
                 {"swish", MOE_ACT_SWIGLU},
                 {"gelu", MOE_ACT_GEGLU},
                 {"gelu_pytorch_tanh", MOE_ACT_GEGLU_TANH},
                 {"gelu_new", MOE_ACT_GEGLU_TANH}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_expect_eq(
            accept(arena_printf(&arena,
                                "{\"model_type\": \"mixtral\", \"hidden_size\": 256, "
                                "\"num_hidden_layers\": 8, \"hidden_act\": \"%s\", %s}",
                                cases[i].name, MIXTRAL))
                ->activation,
            cases[i].act);
    refuse("{\"model_type\": \"mixtral\", \"hidden_size\": 256, \"num_hidden_layers\": 8,\n"
           "\"hidden_act\": \"relu2\", " MIXTRAL "}",
           2, 15, "'relu2' is not supported in mixtral");
}

Test(models, quantisation) {
    struct model *m =
        accept(config_text("mixtral", MIXTRAL ", \"quantization_config\": {\"quant_method\": "
                                              "\"fp8\", \"weight_block_size\": [128, 64]}"));
    cr_expect_eq(m->weights.format, MOE_FORMAT_FP8_BLOCK);
    cr_expect(m->weights.block[0] == 128 && m->weights.block[1] == 64);
    m = accept(config_text("mixtral", MIXTRAL ", \"quantization_config\": {\"quant_method\": "
                                              "\"fp8\", \"weight_block_size\": null}"));
    cr_expect_eq(m->weights.format, MOE_FORMAT_FP8_TENSOR);
    refuse(config_text("mixtral", MIXTRAL ",\n\"quantization_config\": {\"quant_method\": "
                                          "\"compressed-tensors\"}"),
           7, 41, "'compressed-tensors' is not supported");
    refuse(config_text("mixtral", MIXTRAL ",\n\"quantization_config\": {\"quant_method\": "
                                          "\"fp8\", \"fmt\": \"e5m2\"}"),
           7, 55, "e5m2");
    refuse(config_text("mixtral", MIXTRAL ",\n\"quantization_config\": {\"bits\": 4}"), 7, 24,
           "quant_method");
    refuse(config_text("mixtral",
                       MIXTRAL ",\n\"quantization_config\": {\"quant_method\": \"fp8\",\n"
                               "\"modules_to_not_convert\": [\"lm_head\", "
                               "\"model.layers.0.mlp.experts\"]}"),
           8, 39, "two formats");
}

/* What a family has and this build has not must never pass in silence. */
Test(models, what_cannot_be_honoured_is_an_error) {
    refuse(config_text("mixtral2", MIXTRAL), 1, 16, "did you mean 'mixtral'");
    refuse(config_text("gemma4_text", MIXTRAL), 1, 16, "no family 'gemma4_text'");
    refuse("{\"architectures\": [\"X\"], \"hidden_size\": 256}", 1, 1,
           "missing key 'model_type'");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"scoring_func\": \"sqrtsoftplus\""),
           7, 17, "'sqrtsoftplus' is not supported");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"topk_method\": \"greedy\""), 7, 16,
           "'greedy' is not supported");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"moe_latent_size\": 64"), 7, 20,
           "latent space");
    refuse(config_text("deepseek_v3", DEEPSEEK_GROUPS ",\n\"num_hash_layers\": 3"), 7, 20,
           "hash-routed");
    refuse(config_text("mixtral", MIXTRAL ",\n\"swiglu_limit\": 10.0"), 7, 17, "clamped");
    refuse(config_text("kimi_k2", DEEPSEEK ", \"first_k_dense_replace\": 1"), 1, 1,
           "'n_group'");
    refuse(config_text("deepseek_v2", "\"moe_intermediate_size\": 128, \"n_routed_experts\": "
                                      "64, \"num_experts_per_tok\": 4,\n"
                                      "\"norm_topk_prob\": true"),
           7, 19, "transformers ignores");
    refuse(config_text("qwen3_vl_moe_text",
                       "\"moe_intermediate_size\": 128, \"num_experts\": 64, "
                       "\"num_experts_per_tok\": 4,\n\"norm_topk_prob\": false"),
           7, 19, "always divides");
    refuse(config_text("ernie4_5_moe",
                       "\"moe_intermediate_size\": 128, \"moe_num_experts\": 64, "
                       "\"moe_k\": 4,\n\"use_bias\": true"),
           7, 13, "biases");
    refuse(config_text("hunyuan_v1_moe", "\"intermediate_size\": 128, \"num_experts\": 64, "
                                         "\"moe_topk\": 4,\n\"moe_drop_tokens\": true"),
           7, 20, "capacity");
    refuse(config_text("hunyuan_v1_moe", "\"intermediate_size\": 128, \"num_experts\": 64, "
                                         "\"moe_topk\": 4,\n\"num_shared_expert\": 2"),
           7, 22, "has 1, not 2");
    refuse(config_text("minimax_m2", MIXTRAL ",\n\"shared_intermediate_size\": 64"), 7, 29,
           "no shared expert");
    refuse(config_text("phimoe", "\"intermediate_size\": 128, \"num_local_experts\": 8,\n"
                                 "\"num_experts_per_tok\": 3"),
           7, 24, "chooses 2");
    refuse(config_text("qwen3_moe", "\"num_experts\": 64,\n\"num_experts_per_tok\": 4"), 1, 1,
           "'moe_intermediate_size'");
}

Test(models, groups_that_limit_nothing_are_honoured) {
    struct model *m = accept(config_text(
        "deepseek_v2", "\"moe_intermediate_size\": 128, \"n_routed_experts\": 64, "
                       "\"num_experts_per_tok\": 4, \"norm_topk_prob\": false, "
                       "\"routed_scaling_factor\": 16.0, \"n_group\": 8, \"topk_group\": 8, "
                       "\"topk_method\": \"group_limited_greedy\""));
    cr_expect(m->router.n_group == 1 && m->router.topk_group == 1 && !m->router.sigmoid);
    cr_expect_eq(m->router.routed_scaling_factor, 16);
    cr_expect(!m->router.group_best);
}

Test(models, groups_of_deepseek_v2_are_scored_by_their_best) {
    static const char *const methods[] = {"greedy", "group_limited_greedy"};
    for (int limited = 0; limited < 2; limited++) {
        struct model *m = accept(config_text(
            "deepseek_v2",
            arena_printf(&arena,
                         "\"moe_intermediate_size\": 128, \"n_routed_experts\": 160, "
                         "\"num_experts_per_tok\": 6, \"norm_topk_prob\": false, "
                         "\"routed_scaling_factor\": 16.0, \"n_group\": 8, \"topk_group\": 3, "
                         "\"topk_method\": \"%s\"",
                         methods[limited])));
        cr_expect_eq(m->router.group_best, limited);
        cr_expect_eq(m->router.n_group, limited ? 8 : 1);
        cr_expect_eq(m->router.topk_group, limited ? 3 : 1);
    }
}

static int count(enum severity s) {
    int n = 0;
    for (const struct diag *g = diags.first; g; g = g->next)
        n += g->severity == s;
    return n;
}

Test(models, what_is_assumed_is_said) {
    accept(config_text("mixtral", MIXTRAL));
    cr_expect_eq(count(DIAG_NOTE), 0, "%s", all_diags());
    accept(config_text("olmoe", MIXTRAL));
    cr_expect(strstr(all_diags(), "1:1 assumed norm_topk_prob: false, the default of olmoe"));
    cr_expect_eq(count(DIAG_NOTE), 1, "%s", all_diags());
    accept(
        "{\"model_type\": \"mixtral\", \"hidden_size\": 256, \"num_hidden_layers\": 8, " MIXTRAL
        "}");
    cr_expect(strstr(all_diags(), "assumed hidden_act: silu"));
    cr_expect(strstr(all_diags(), "assumed dtype: bfloat16"));
}

Test(models, keys_that_look_like_routing_and_are_not_read_draw_a_warning) {
    accept(config_text("mixtral", MIXTRAL ", \"router_aux_loss_coef\": 0.1, \"ep_size\": 1,\n"
                                          "\"expert_choice\": true"));
    cr_expect_eq(count(DIAG_WARNING), 1, "%s", all_diags());
    cr_expect(strstr(all_diags(), "7:1 expert_choice: not read for mixtral"));
}

Test(models, a_foreign_quantisation_file_beside_the_config_is_an_error) {
    char folder[] = "/tmp/moec-models-XXXXXX";
    cr_assert(mkdtemp(folder));
    const char *config = arena_printf(&arena, "%s/config.json", folder);
    const char *text = config_text("mixtral", MIXTRAL);
    cr_assert_eq(file_write(config, text, strlen(text)), 0);
    cr_expect(model_read(&arena, &diags, config), "%s", all_diags());
    cr_assert_eq(file_write(arena_printf(&arena, "%s/hf_quant_config.json", folder), "{}", 2),
                 0);
    cr_expect_null(model_read(&arena, &diags, config));
    cr_expect(strstr(all_diags(), "hf_quant_config.json"));
    dir_remove(folder);
}

/* ---- moec import ---- */

static int import(const char *a, const char *b, const char *c) {
    char *argv[] = {"import", (char *)a, (char *)b, (char *)c, NULL};
    int argc = 1;
    while (argv[argc])
        argc++;
    cr_assert(freopen("/dev/null", "w", stdout) && freopen("/dev/null", "w", stderr));
    return cmd_import(argc, argv);
}

Test(models, import_writes_a_file_that_reads_back_silently) {
    char path[] = "/tmp/moec-import-XXXXXX";
    cr_assert_geq(mkstemp(path), 0);
    cr_expect_eq(import("tests/configs/glm-4.5.json", "-o", path), 0);
    struct model *m = model_read(&arena, &diags, path);
    cr_assert(m && !diags.first, "%s", all_diags());
    cr_expect_str_eq(written(m), without_comments("plans/models/glm-4.5.yaml"));
    remove(path);
}

Test(models, import_writes_nothing_on_an_error) {
    char folder[] = "/tmp/moec-import-XXXXXX";
    cr_assert(mkdtemp(folder));
    const char *out = arena_printf(&arena, "%s/out.yaml", folder);
    const char *bad = arena_printf(&arena, "%s/bad.json", folder);
    char *text;
    size_t len;
    cr_assert_eq(file_write(bad, "{\"model_type\": \"mixtral\"}", 25), 0);
    cr_expect_eq(import(bad, "-o", out), 1);
    cr_expect_neq(file_read(&arena, out, 1 << 20, &text, &len), 0);
    cr_expect_eq(import("plans/models/mixtral-8x7b.yaml", "-o", out), 1);
    cr_expect_eq(import("/nowhere/config.json", "-o", out), 1);
    cr_expect_eq(import("tests/configs/mixtral-8x7b.json", "-o", "/nowhere/out.yaml"), 1);
    dir_remove(folder);
}

Test(models, import_says_how_it_is_used) {
    cr_expect_eq(import("--help", NULL, NULL), 0);
    cr_expect_eq(import(NULL, NULL, NULL), 2);
    cr_expect_eq(import("a.json", "b.json", NULL), 2);
    cr_expect_eq(import("a.json", "-o", NULL), 2);
    cr_expect_eq(import("a.json", "--what", NULL), 2);
}
