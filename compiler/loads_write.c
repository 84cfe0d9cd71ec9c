/* Loads out: CSV, our own JSON, SGLang's recorder JSON, a TensorRT-LLM statistics folder. */
#include "loads.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../runtime/tool.h"

const char *const loads_format_names[LOADS_FORMAT_COUNT] = {
#define X(name) #name,
    LOADS_FORMATS(X)
#undef X
};

struct writer {
    struct arena *arena;
    struct diags *diags;
    const struct loads *loads;
    const struct model *model; /* or NULL */
    int num_layers;            /* rows that are written; unrecorded MTP layers come last */
};

static const double *row_of(const struct writer *w, int workload, int row) {
    const struct loads *l = w->loads;
    return l->workloads[workload].count + (size_t)row * (size_t)l->experts;
}

static bool is_recorded(const struct writer *w, int row) {
    for (int i = 0; i < w->loads->num_workloads; i++)
        for (int e = 0; e < w->loads->experts; e++)
            if (row_of(w, i, row)[e] > 0)
                return true;
    return false;
}

/* The fewest digits that read back as the same number. */
static void put_count(struct buf *b, double v) {
    char text[40];
    int digits = 15;
    do
        snprintf(text, sizeof text, "%.*g", digits, v);
    while (strtod(text, NULL) != v && ++digits <= 17);
    buf_add(b, text, strlen(text));
}

static void put_row(struct buf *b, const double *count, int experts) {
    for (int e = 0; e < experts; e++) {
        if (e)
            buf_add(b, ",", 1);
        put_count(b, count[e]);
    }
}

static bool put_file(struct writer *w, const char *path, const struct buf *b) {
    int err = file_write(path, b->data, b->len);
    if (err)
        diag_error(w->diags, (struct loc){0}, "cannot write %s: %s", path, strerror(err));
    return !err;
}

static bool write_csv(struct writer *w, const char *path) {
    struct buf b = {.arena = w->arena};
    for (int i = 0; i < w->num_layers; i++) {
        put_row(&b, row_of(w, 0, i), w->loads->experts);
        buf_add(&b, "\n", 1);
    }
    return put_file(w, path, &b);
}

static bool write_json(struct writer *w, const char *path) {
    const struct loads *l = w->loads;
    const struct workload *load = &l->workloads[0];
    int top_k = w->model ? w->model->num_experts_per_tok : l->experts_per_token;
    struct buf b = {.arena = w->arena};
    buf_printf(&b, "{\"moec_loads\":1,");
    if (w->model) {
        buf_printf(&b, "\"model\":");
        buf_json_string(&b, w->model->name);
        buf_printf(&b, ",");
    }
    if (load->name) {
        buf_printf(&b, "\"name\":");
        buf_json_string(&b, load->name);
        buf_printf(&b, ",");
    }
    if (load->weight != 1) {
        buf_printf(&b, "\"weight\":");
        put_count(&b, load->weight);
        buf_printf(&b, ",");
    }
    if (top_k)
        buf_printf(&b, "\"top_k\":%d,", top_k);
    buf_printf(&b, "\"experts\":%d,\"layers\":[", l->experts);
    for (int i = 0; i < w->num_layers; i++)
        buf_printf(&b, "%s%d", i ? "," : "", l->layers[i]);
    buf_printf(&b, "],\n\"counts\":[\n");
    for (int i = 0; i < w->num_layers; i++) {
        buf_printf(&b, "[");
        put_row(&b, row_of(w, 0, i), l->experts);
        buf_printf(&b, "]%s\n", i + 1 < w->num_layers ? "," : "]}");
    }
    return put_file(w, path, &b);
}

/* SGLang counts every decoder layer by its number: dense ones hold zeros, MTP layers are none. */
static bool write_sglang(struct writer *w, const char *path) {
    const struct loads *l = w->loads;
    int last = w->num_layers - 1;
    int rows = w->model ? w->model->num_hidden_layers : l->layers[last] + 1;
    struct buf b = {.arena = w->arena};
    double *zeros = arena_array(w->arena, double, l->experts);
    if (l->layers[last] >= rows)
        diag_add(w->diags, DIAG_WARNING, (struct loc){0},
                 "%s: SGLang's form has no MTP layers: layer %d is left out", path,
                 l->layers[last]);
    buf_printf(&b, "{\"logical_count\":[\n");
    for (int i = 0; i < l->num_workloads; i++) {
        buf_printf(&b, "[");
        for (int layer = 0; layer < rows; layer++) {
            int row = loads_layer(l, layer);
            buf_printf(&b, "[");
            put_row(&b, row < 0 ? zeros : row_of(w, i, row), l->experts);
            buf_printf(&b, "]%s", layer + 1 < rows ? ",\n" : "");
        }
        buf_printf(&b, "]%s\n", i + 1 < l->num_workloads ? "," : "]}");
    }
    return put_file(w, path, &b);
}

/* ---- TensorRT-LLM ---- */

bool loads_out_dir(struct diags *d, const char *path) {
    int err = dir_make(path), n = 0;
    DIR *dir = err ? NULL : opendir(path);
    if (!dir) {
        diag_error(d, (struct loc){0}, "cannot write %s: %s", path,
                   strerror(err ? err : errno));
        return false;
    }
    for (struct dirent *e; (e = readdir(dir));)
        n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    closedir(dir);
    if (n)
        diag_error(d, (struct loc){0},
                   "%s is not empty: what is in it would be mixed with this", path);
    return !n;
}

/* Rounds where counts are no whole numbers; returns whether any was. */
static bool to_integers(const double *count, int n, int64_t *out) {
    bool rounded = false;
    for (int i = 0; i < n; i++) {
        out[i] = (int64_t)(count[i] + 0.5);
        rounded |= (double)out[i] != count[i];
    }
    return rounded;
}

static bool write_tensors(struct writer *w, const char *path) {
    const struct loads *l = w->loads;
    int n = l->num_workloads * w->num_layers;
    struct moert_tool_tensor *t = arena_array(w->arena, struct moert_tool_tensor, n);
    bool rounded = false;
    for (int i = 0; i < n; i++) {
        int step = i / w->num_layers, row = i % w->num_layers;
        int64_t *data = arena_array(w->arena, int64_t, l->experts);
        rounded |= to_integers(row_of(w, step, row), l->experts, data);
        t[i] = (struct moert_tool_tensor){
            .name = arena_printf(w->arena, "%d_%d", step, l->layers[row]),
            .dtype = "I64",
            .rank = 1,
            .shape = {l->experts},
            .data = data,
            .bytes = sizeof(int64_t) * (size_t)l->experts};
    }
    if (rounded)
        diag_add(w->diags, DIAG_WARNING, (struct loc){0},
                 "%s holds whole tokens: counts were rounded", path);
    const char *file = path_join(w->arena, path, "rank0.safetensors");
    if (moert_tool_save(file, t, n) == MOERT_OK)
        return true;
    diag_error(w->diags, (struct loc){0}, "%s", moert_last_error());
    return false;
}

static bool write_trtllm(struct writer *w, const char *path) {
    const struct loads *l = w->loads;
    int top_k = w->model ? w->model->num_experts_per_tok : l->experts_per_token;
    struct buf b = {.arena = w->arena};
    if (!top_k) {
        diag_error(w->diags, (struct loc){0},
                   "%s: meta_info.json names the experts per token, which are not known here; "
                   "give --top-k or --model",
                   path);
        return false;
    }
    buf_printf(&b, "{\"num_experts\": %d, \"num_experts_per_token\": %d}\n", l->experts, top_k);
    return loads_out_dir(w->diags, path) && write_tensors(w, path) &&
           put_file(w, path_join(w->arena, path, "meta_info.json"), &b);
}

bool loads_write(struct arena *a, struct diags *d, const struct loads *l, const struct model *m,
                 enum loads_format format, const char *path) {
    struct writer w = {a, d, l, m, l->num_layers};
    while (m && w.num_layers > 1 && l->layers[w.num_layers - 1] >= m->num_hidden_layers &&
           !is_recorded(&w, w.num_layers - 1))
        w.num_layers--;
    if (l->num_workloads > 1 && (format == LOADS_csv || format == LOADS_json)) {
        diag_error(d, (struct loc){0}, "%s holds one workload, but there are %d", path,
                   l->num_workloads);
        return false;
    }
    switch (format) {
    case LOADS_csv:
        return write_csv(&w, path);
    case LOADS_json:
        return write_json(&w, path);
    case LOADS_sglang:
        return write_sglang(&w, path);
    default:
        return write_trtllm(&w, path);
    }
}
