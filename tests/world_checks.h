/* A world of ranks in one process and what its results must be: shared by the host's tests and the
 * GPU's. A check returns false and says why in world->why. */
#ifndef WORLD_CHECKS_H
#define WORLD_CHECKS_H

#include "../compiler/moec.h"
#include "../compiler/trial.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { WORLD_SEED = 5 };

/* ---- a plan, its bundle, and a world of ranks that run it ---- */

struct shape {
    const char *name;
    int ranks, hidden, inter, experts, topk;
    int max_tokens;         /* of one rank in one pass */
    const char *model;      /* lines of the model file: router, activation, ... */
    const char *deployment; /* lines of the deployment file: dispatch, num_slots, ... */
};

struct world {
    char why[600];
    moert_device device;
    char path[1100];
    moert_bundle *bundle;
    moert_world *world;
    const struct moe_plan_class *c;
    struct ref_random *random;
    struct ref_layer ref;
    moert_context *context[MOE_MAX_RANKS];
    moert_layer *layer[MOE_MAX_RANKS];
    struct trial trial[MOE_MAX_RANKS];
    int tokens[MOE_MAX_RANKS];
};

static bool world_no(struct world *w, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
static bool world_no(struct world *w, const char *fmt, ...) {
    va_list list;
    va_start(list, fmt);
    vsnprintf(w->why, sizeof w->why, fmt, list);
    va_end(list);
    return false;
}
static bool world_good(struct world *w, moert_result r, const char *what) {
    return r == MOERT_OK || world_no(w, "%s: %s", what, moert_last_error());
}

static const char world_plain[] = "router: {method: softmax_topk, norm_topk_prob: true}\n";

/* Compiles the shape's plan into FOLDER/NAME.moe. */
static bool world_compile(struct world *w, const struct shape *s, const char *folder,
                          const char *target) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct overrides o = {0};
    struct build_options options = {.jobs = 1, .out = w->path};
    struct build_report report;
    snprintf(w->path, sizeof w->path, "%s/%s.moe", folder, s->name);
    char *model = arena_printf(&a, "%s/%s.model.yaml", folder, s->name);
    char *file = arena_printf(&a, "%s/%s.yaml", folder, s->name);
    char *text = arena_printf(
        &a,
        "name: %s\nnum_hidden_layers: 1\nmoe_layers: all\nhidden_size: %d\n"
        "moe_intermediate_size: %d\nnum_experts: %d\nnum_experts_per_tok: %d\n%s",
        s->name, s->hidden, s->inter, s->experts, s->topk, s->model ? s->model : world_plain);
    char *plan = arena_printf(
        &a, "model: %s.model.yaml\ntarget: %s\ncluster: {ranks: %d, nvlink_domain: %d}\n%s",
        s->name, target, s->ranks, s->ranks, s->deployment ? s->deployment : "");
    char *set = arena_printf(&a, "moe_config.max_num_tokens=%d", s->max_tokens * s->ranks);
    const char *sets[] = {set};
    o.set = sets;
    o.num_set = 1;
    bool ok = !dir_make(folder) && !file_write(model, text, strlen(text)) &&
              !file_write(file, plan, strlen(plan));
    struct deployment *dep = ok ? deployment_read(&a, &d, file, &o) : NULL;
    struct plan *p = dep ? plan_make(&a, &d, dep, 1) : NULL;
    ok = p && bundle_build(&a, &d, p, &options, &report);
    diag_print(&d, stderr);
    arena_free(&a);
    return ok || world_no(w, "%s does not compile", s->name);
}

static bool world_context(struct world *w, int rank) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    cfg.device = w->device;
    cfg.host_threads = 1;
    cfg.world = w->world;
    cfg.rank = rank;
    return world_good(w, moert_context_create(w->bundle, &cfg, &w->context[rank]), "context") &&
           world_good(w, moert_layer_create(w->context[rank], 0, &w->layer[rank]), "layer") &&
           world_good(w, moert_layer_random(w->layer[rank], WORLD_SEED), "weights");
}

/* Opens the bundle at w->path as a world; timeout_ms 0: so long that no test waits for it. */
static bool world_open(struct world *w, moert_device device, int timeout_ms) {
    moert_world_config cfg = MOERT_WORLD_CONFIG_INIT;
    w->device = device;
    cfg.timeout_ms = timeout_ms;
    if (!world_good(w, moert_bundle_open(w->path, &w->bundle), w->path))
        return false;
    w->c = moert_tool_class(w->bundle, 0);
    cfg.ranks = w->c->ranks;
    if (!world_good(w, moert_world_local(&cfg, &w->world), "world"))
        return false;
    for (int r = 0; r < cfg.ranks; r++)
        if (!world_context(w, r))
            return false;
    w->random = ref_random_layer(w->c, WORLD_SEED, 0, &w->ref);
    return world_good(w, moert_world_connect(w->world), "connect");
}

static void world_close(struct world *w) {
    for (int r = 0; r < MOE_MAX_RANKS; r++) {
        if (w->trial[r].context)
            trial_close(&w->trial[r]);
        moert_layer_destroy(w->layer[r]);
        moert_context_destroy(w->context[r]);
    }
    ref_random_free(w->random);
    moert_world_destroy(w->world);
    moert_bundle_close(w->bundle);
    memset((char *)w + sizeof w->why, 0, sizeof *w - sizeof w->why);
}

/* Random activations: rank r has counts[r % num] tokens. */
static bool world_draw(struct world *w, const int *counts, int num, moert_dtype x) {
    for (int r = 0; r < w->c->ranks; r++) {
        struct trial *t = &w->trial[r];
        if (t->context)
            trial_close(t);
        w->tokens[r] = counts[r % num];
        if (!world_good(
                w, trial_open(t, w->context[r], w->layer[r], w->c, w->tokens[r], x, MOERT_FP32),
                "buffers"))
            return false;
        trial_random_x(t, (unsigned)(WORLD_SEED + r), 0);
        t->io.rank_tokens = w->tokens;
        if (!world_good(w, trial_upload(t), "upload"))
            return false;
    }
    return true;
}

static bool world_forward(struct world *w) {
    moert_io io[MOE_MAX_RANKS];
    for (int r = 0; r < w->c->ranks; r++)
        io[r] = w->trial[r].io;
    return world_good(w, moert_world_forward(w->world, w->layer, io, NULL), "forward");
}

static bool world_download(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        if (!world_good(w, trial_download(&w->trial[r]), "download"))
            return false;
        else if (trial_overran(&w->trial[r]))
            return world_no(w, "rank %d wrote beyond its tokens", r);
    return true;
}

static bool world_results(struct world *w, enum trial_choice choice, int samples) {
    for (int r = 0; r < w->c->ranks; r++) {
        int sample[64], n = trial_sample(w->tokens[r], samples, sample);
        struct trial_error e;
        char text[200];
        if (!trial_compare(&w->trial[r], &w->ref, choice, sample, n, &e))
            return world_no(w, "out of memory");
        trial_describe(&e, text, sizeof text);
        if (!trial_passes(&e))
            return world_no(w, "rank %d: %s", r, text);
    }
    return true;
}

/* The results of all ranks, to compare runs. */
static float *world_keep(const struct world *w) {
    size_t n = 0, h = (size_t)w->c->hidden;
    for (int r = 0; r < w->c->ranks; r++)
        n += (size_t)w->tokens[r] * h;
    float *all = malloc((n + 1) * sizeof *all), *at = all;
    for (int r = 0; all && r < w->c->ranks; at += (size_t)w->tokens[r++] * h)
        memcpy(at, w->trial[r].out, (size_t)w->tokens[r] * h * 4);
    return all;
}
static bool world_same(struct world *w, const float *kept, const char *what) {
    size_t h = (size_t)w->c->hidden;
    for (int r = 0; r < w->c->ranks; kept += (size_t)w->tokens[r++] * h)
        if (memcmp(kept, w->trial[r].out, (size_t)w->tokens[r] * h * 4))
            return world_no(w, "rank %d: %s differs", r, what);
    return true;
}

#endif
