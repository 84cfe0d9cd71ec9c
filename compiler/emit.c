/* The one hole in the templates, plan.cuh, and one flattened source per layer class. */
#include <stdlib.h>
#include <string.h>

#include "moec.h"

/* ---- plan.cuh ---- */

static const char *const router_values[] = {
#define X(name, spelling) "MOE_ROUTER_" #name,
    MOE_ROUTERS(X)
#undef X
};
static const char *const activation_values[] = {
#define X(name, spelling) "MOE_ACT_" #name,
    MOE_ACTIVATIONS(X)
#undef X
};
static const char *const format_values[] = {
#define X(name, spelling) "MOE_FORMAT_" #name,
    MOE_FORMATS(X)
#undef X
};

/* The scalars of plan.cuh in order, from a class c. H(heading) X(type, name, value, comment);
 * the types' printers are below. */
#define PLAN_CUH(H, X) \
    H("Shape of the layer.") \
    X(int, kHidden, c->hidden, "H") \
    X(int, kInter, c->inter, "I, one expert's intermediate size") \
    X(int, kExperts, c->experts, "E") \
    X(int, kTopK, c->topk, "k") \
    X(int, kSharedInter, c->shared_inter, "SI, 0: no shared expert") \
    H("Routing. kRouter is a MOE_ROUTER_ value.") \
    X(name, kRouter, router_values[c->router], NULL) \
    X(int, kGroups, c->n_group, "n_group") \
    H("Experts. kActivation is a MOE_ACT_ value.") \
    X(name, kActivation, activation_values[c->activation], NULL) \
    X(int, kBias, c->has_bias, "experts have biases") \
    X(int, kInputWeight, c->input_weight, "the weight multiplies the expert's input") \
    H("Slot records. kFormat is a MOE_FORMAT_ value, BF16 or FP8_BLOCK.") \
    X(name, kFormat, format_values[c->record_format], NULL)

#define H(text)
#define X(type, name, value, comment) #name,
const char *const plan_constants[] = {PLAN_CUH(H, X) NULL};
#undef X
#undef H

struct emitter {
    struct buf *out;
    const struct plan *plan;
    const struct moe_plan_class *c;
    const char *const *unbake;
};

static bool is_unbaked(const struct emitter *e, const char *name) {
    for (const char *const *u = e->unbake; u && *u; u++)
        if (!strcmp(*u, name))
            return true;
    return false;
}

static void emit_begin(struct emitter *e, const char *name) {
    const char *how = is_unbaked(e, name) ? "__constant__" : "constexpr";
    buf_printf(e->out, "%s int %s = ", how, name);
}

static void emit_end(struct emitter *e, const char *comment) {
    if (comment)
        buf_printf(e->out, ";  // %s\n", comment);
    else
        buf_printf(e->out, ";\n");
}

static void emit_int(struct emitter *e, const char *name, int value, const char *comment) {
    emit_begin(e, name);
    buf_printf(e->out, "%d", value);
    emit_end(e, comment);
}

static void emit_name(struct emitter *e, const char *name, const char *value,
                      const char *comment) {
    emit_begin(e, name);
    buf_printf(e->out, "%s", value);
    emit_end(e, comment);
}

static void emit_scalars(struct emitter *e) {
    const struct moe_plan_class *c = e->c;
#define H(text) buf_printf(e->out, "\n// %s\n", text);
#define X(type, name, value, comment) emit_##type(e, #name, value, comment);
    PLAN_CUH(H, X)
#undef X
#undef H
}

static void emit_variants(struct emitter *e, int class_index) {
    struct arena *a = e->plan->arena;
    bool *gemm = arena_array(a, bool, num_gemm_variants);
    bool *router = arena_array(a, bool, num_router_variants);
    plan_variants(e->plan, class_index, gemm, router);
    buf_printf(e->out,
               "\n// Variants. GEMM: X(id, BM weight rows, BN token rows, BK, warps over "
               "M, warps over N, stages)\n#define MOE_GEMM_VARIANTS(X)");
    for (int i = 0; i < num_gemm_variants; i++) {
        const struct gemm_variant *v = &gemm_variants[i];
        if (gemm[i])
            buf_printf(e->out, " \\\n    X(%d, %d, %d, %d, %d, %d, %d)", v->id, v->bm, v->bn,
                       v->bk, v->warps_m, v->warps_n, v->stages);
    }
    buf_printf(e->out, "\n\n// Router: X(id, tokens per block, experts per block, K splits)\n"
                       "#define MOE_ROUTER_VARIANTS(X)");
    for (int i = 0; i < num_router_variants; i++) {
        const struct router_variant *v = &router_variants[i];
        if (router[i])
            buf_printf(e->out, " \\\n    X(%d, %d, %d, %d)", v->id, v->tokens, v->experts,
                       v->split);
    }
    buf_printf(e->out, "\n");
}

/* The host's kernels when it is a target: only the host needs the list in the source. */
static const struct moe_plan_target *listed_target(const struct plan *p, int class_index) {
    const struct moe_plan_target *first = NULL;
    for (uint32_t i = 0; i < p->count[MOE_SECTION_TARGET]; i++) {
        const struct moe_plan_target *t = &p->targets[i];
        if (t->class_index != class_index)
            continue;
        if (!first || t->target == MOE_TARGET_HOST)
            first = t;
    }
    return first;
}

/* Kernels in the order of their first launch. */
static void emit_kernels(struct emitter *e, int class_index) {
    const struct plan *p = e->plan;
    const struct moe_plan_target *t = listed_target(p, class_index);
    bool *seen = arena_array(p->arena, bool, p->count[MOE_SECTION_KERNEL]);
    buf_printf(e->out, "\n// Every kernel of the plan. X(name expression)\n"
                       "#define MOE_KERNELS(X)");
    for (int b = 0; t && b < t->num_buckets; b++) {
        const struct moe_plan_bucket *bucket = &p->buckets[t->first_bucket + b];
        for (int l = 0; l < bucket->num_launches; l++) {
            int k = p->launches[bucket->first_launch + l].kernel;
            if (!seen[k])
                buf_printf(e->out, " \\\n    X(%s)", plan_string(p, p->kernels[k].expression));
            seen[k] = true;
        }
    }
    buf_printf(e->out, "\n");
}

void emit_plan_cuh(const struct plan *p, int class_index, const char *const *unbake,
                   struct buf *out) {
    struct emitter e = {out, p, &p->classes[class_index], unbake};
    buf_printf(out, "// %s: layers of one shape.\n#pragma once\n", plan_string(p, e.c->name));
    emit_scalars(&e);
    emit_variants(&e, class_index);
    emit_kernels(&e, class_index);
}

/* ---- flattening ---- */

/* Templates inside moec (embed.S). X(symbol, file) */
#define TEMPLATES(X) \
    X(moe_cu, "moe.cu") \
    X(args_h, "args.h") \
    X(prim_cuh, "prim.cuh") \
    X(router_cuh, "router.cuh") \
    X(slots_cuh, "slots.cuh") \
    X(quant_cuh, "quant.cuh") \
    X(gemm_cuh, "gemm.cuh") \
    X(combine_cuh, "combine.cuh") \
    X(hopper_cuh, "hopper.cuh") \
    X(exchange_cuh, "exchange.cuh") \
    X(random_cuh, "random.cuh")

#define X(symbol, file) extern const char embed_##symbol[], embed_##symbol##_end[];
TEMPLATES(X)
#undef X

enum { PLAN_FILE = 0, ROOT_FILE = 1 }; /* rows of files[] */

struct file {
    const char *name, *text, *end;
    bool done; /* each is included once */
};

static void flatten(struct file *files, int num_files, struct file *f, struct buf *out);

/* The file that a line `#include "name"` names; NULL for any other line. */
static struct file *included(struct file *files, int num_files, const char *line, size_t len) {
    static const char directive[] = "#include \"";
    size_t n = sizeof directive - 1;
    if (len < n || memcmp(line, directive, n))
        return NULL;
    const char *name = line + n, *quote = memchr(name, '"', len - n);
    for (int i = 0; quote && i < num_files; i++)
        if (strlen(files[i].name) == (size_t)(quote - name) &&
            !memcmp(files[i].name, name, (size_t)(quote - name)))
            return &files[i];
    fprintf(stderr, "moec: templates include an unknown file: %.*s\n", (int)len, line);
    abort();
}

/* One line of a file, its end left out. */
static void flatten_line(struct file *files, int num_files, const struct file *f, int number,
                         const char *line, size_t len, struct buf *out) {
    static const char once[] = "#pragma once";
    struct file *inner = included(files, num_files, line, len);
    if (inner && !inner->done) {
        flatten(files, num_files, inner, out);
        buf_printf(out, "#line %d \"templates/%s\"\n", number + 1, f->name);
        return;
    }
    bool dropped = inner || (len == sizeof once - 1 && !memcmp(line, once, len));
    if (!dropped)
        buf_add(out, line, len);
    buf_add(out, "\n", 1);
}

static void flatten(struct file *files, int num_files, struct file *f, struct buf *out) {
    int number = 1;
    f->done = true;
    buf_printf(out, "#line 1 \"templates/%s\"\n", f->name);
    for (const char *line = f->text; line < f->end; number++) {
        const char *end = memchr(line, '\n', (size_t)(f->end - line));
        if (!end)
            end = f->end;
        flatten_line(files, num_files, f, number, line, (size_t)(end - line), out);
        line = end + 1;
    }
}

/* Whether a target of the class has kernels of hopper.cuh. They are made of the class's constants: a
 * source without some of them as such leaves the file out. */
static bool has_hopper(const struct plan *p, int class_index) {
    for (uint32_t t = 0; t < p->count[MOE_SECTION_TARGET]; t++)
        for (int b = 0; b < p->targets[t].num_buckets; b++)
            if (p->targets[t].class_index == class_index &&
                p->variants[p->targets[t].first_bucket + b].experts.w1_rows)
                return true;
    return false;
}

void emit_source(const struct plan *p, int class_index, const char *const *unbake,
                 struct buf *out) {
    struct buf cuh = {p->arena, NULL, 0, 0};
    emit_plan_cuh(p, class_index, unbake, &cuh);
    struct file files[] = {[PLAN_FILE] = {"plan.cuh", cuh.data, cuh.data + cuh.len, false},
#define X(symbol, file) {file, embed_##symbol, embed_##symbol##_end, false},
                           TEMPLATES(X)
#undef X
    };
    int num_files = (int)(sizeof files / sizeof *files);
    buf_printf(out, "// Written by moec %s; do not edit.\n", MOEC_VERSION);
    for (int i = 0; i < num_files; i++)
        if (!strcmp(files[i].name, "hopper.cuh"))
            files[i].done = !has_hopper(p, class_index);
    flatten(files, num_files, &files[ROOT_FILE], out);
}
