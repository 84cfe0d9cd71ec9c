/* What moec's commands and the tests need beside moert.h. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Runs one device call with the device entered. */
#define ENTERED(c, call) \
    do { \
        RT_TRY((c)->ops->enter((c)->device)); \
        moert_result entered_ = (c)->ops->call; \
        (c)->ops->leave((c)->device); \
        return entered_; \
    } while (0)
#define ENTERED_VOID(c, call) \
    do { \
        if ((c)->ops->enter((c)->device) == MOERT_OK) { \
            (c)->ops->call; \
            (c)->ops->leave((c)->device); \
        } \
    } while (0)

/* ---- memory and streams ---- */

moert_result moert_tool_alloc(moert_context *c, size_t bytes, void **out) {
    ENTERED(c, alloc(c->device, bytes, out));
}

void moert_tool_free(moert_context *c, void *p) {
    if (p)
        ENTERED_VOID(c, free(c->device, p));
}

moert_result moert_tool_upload(moert_context *c, void *dst, const void *src, size_t bytes) {
    ENTERED(c, upload(c->device, dst, src, bytes));
}

moert_result moert_tool_download(moert_context *c, void *dst, const void *src, size_t bytes) {
    ENTERED(c, download(c->device, dst, src, bytes));
}

moert_result moert_tool_set(moert_context *c, void *dst, int byte, size_t bytes) {
    ENTERED(c, set(c->device, dst, byte, bytes));
}

moert_result moert_tool_copy(moert_context *c, void *dst, const void *src, size_t bytes,
                             moert_stream s) {
    ENTERED(c, copy(c->device, dst, src, bytes, s));
}

moert_result moert_tool_stream(moert_context *c, moert_stream *out) {
    ENTERED(c, stream(c->device, out));
}

void moert_tool_stream_free(moert_context *c, moert_stream s) {
    ENTERED_VOID(c, stream_free(c->device, s));
}

moert_result moert_tool_sync(moert_context *c, moert_stream s) {
    ENTERED(c, sync(c->device, s));
}

/* ---- graphs and time ---- */

static moert_result capture(moert_context *c, moert_stream s,
                            moert_result (*fn)(void *user, moert_stream s), void *user,
                            void **graph) {
    RT_TRY(c->ops->begin_capture(c->device, s));
    moert_result r = fn(user, s);
    moert_result end = c->ops->end_capture(c->device, s, r == MOERT_OK, graph);
    return r != MOERT_OK ? r : end;
}

moert_result moert_tool_capture(moert_context *c, moert_stream s,
                                moert_result (*fn)(void *user, moert_stream s), void *user,
                                moert_graph **out) {
    void *graph = NULL;
    RT_TRY(c->ops->enter(c->device));
    moert_result r = capture(c, s, fn, user, &graph);
    c->ops->leave(c->device);
    *out = graph;
    return r;
}

moert_result moert_tool_replay(moert_context *c, moert_graph *g, moert_stream s) {
    ENTERED(c, replay(c->device, g, s));
}

void moert_tool_graph_free(moert_context *c, moert_graph *g) {
    if (g)
        ENTERED_VOID(c, graph_free(c->device, g));
}

static moert_result time_call(moert_context *c, moert_stream s,
                              moert_result (*fn)(void *user, moert_stream s), void *user,
                              double *us) {
    RT_TRY(c->ops->mark(c->device, 0, s));
    RT_TRY(fn(user, s));
    RT_TRY(c->ops->mark(c->device, 1, s));
    return c->ops->elapsed(c->device, us);
}

moert_result moert_tool_time(moert_context *c, moert_stream s,
                             moert_result (*fn)(void *user, moert_stream s), void *user,
                             double *us) {
    RT_TRY(c->ops->enter(c->device));
    moert_result r = time_call(c, s, fn, user, us);
    c->ops->leave(c->device);
    return r;
}

/* ---- looking inside ---- */

void moert_tool_device(const moert_context *c, struct moert_tool_device *out) {
    *out = c->info;
}

const struct moe_plan_class *moert_tool_class(const moert_bundle *b, int layer) {
    int i = rt_bundle_find(b, layer);
    return i < 0 ? NULL : &b->classes[b->layers[i].class_index];
}

const int32_t *moert_tool_table(const moert_bundle *b, int i) {
    return i >= 0 && i < (int)b->count[MOE_SECTION_TABLE] ? b->tables + i : NULL;
}

static moert_result download_part(moert_layer *l, int64_t offset, void *out, size_t bytes) {
    return moert_tool_download(l->context, out, l->memory + offset, bytes);
}

/* [E][H] as the layer holds it, then widened in place, last element first. */
static moert_result download_router(moert_layer *l, float *out) {
    size_t n = (size_t)l->c->experts * (size_t)l->c->hidden;
    RT_TRY(download_part(l, l->parts.router, out, n * (l->router_fp32 ? 4 : 2)));
    for (size_t i = n; !l->router_fp32 && i-- > 0;) {
        uint16_t half;
        memcpy(&half, (char *)out + 2 * i, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
    return MOERT_OK;
}

moert_result moert_tool_router(moert_layer *l, float *router, float *bias, float *correction,
                               float *shared_gate) {
    size_t bytes = (size_t)l->c->experts * 4;
    if (!l->loaded)
        return rt_fail(MOERT_INVALID, "layer %d has no weights yet", l->layer);
    if (router)
        RT_TRY(download_router(l, router));
    if (bias && l->c->has_router_bias)
        RT_TRY(download_part(l, l->parts.router_bias, bias, bytes));
    if (correction && l->c->has_correction_bias)
        RT_TRY(download_part(l, l->parts.correction, correction, bytes));
    if (shared_gate && l->c->shared_gate)
        RT_TRY(download_part(l, l->parts.shared_gate, shared_gate, (size_t)l->c->hidden * 4));
    return MOERT_OK;
}

moert_result moert_tool_record(moert_layer *l, int e, void *out) {
    const struct moe_plan_class *c = l->c;
    if (e == -1 && c->shared_inter)
        return download_part(l, l->parts.shared, out, (size_t)c->shared_bytes);
    for (int s = 0; e >= 0 && s < c->slots_per_rank; s++)
        if (l->expert_of_slot[s] == e)
            return download_part(l, l->parts.pool + s * c->slot_bytes, out,
                                 (size_t)c->slot_bytes);
    return rt_fail(MOERT_NOT_FOUND, "layer %d has no expert %d here", l->layer, e);
}

moert_result moert_tool_workspace(moert_context *c, enum moe_ws_id id, void *out,
                                  size_t bytes) {
    int64_t offset[MOE_WS_COUNT], size[MOE_WS_COUNT];
    rt_workspace_layout(c->bundle, offset, size);
    if ((int)id < 0 || id >= MOE_WS_COUNT || (int64_t)bytes > size[id])
        return rt_fail(MOERT_INVALID, "workspace buffer %d has no %zu bytes", (int)id, bytes);
    return moert_tool_download(c, out, c->ws[id], bytes);
}

/* ---- safetensors ---- */

struct moert_tool_file {
    struct rt_checkpoint *checkpoint;
};

moert_result moert_tool_open(const char *path, moert_tool_file **out) {
    moert_tool_file *f = calloc(1, sizeof *f);
    *out = NULL;
    if (!f)
        return rt_no_memory(sizeof *f);
    moert_result r = rt_checkpoint_open(path, &f->checkpoint);
    if (r != MOERT_OK)
        free(f);
    else
        *out = f;
    return r;
}

void moert_tool_close(moert_tool_file *f) {
    if (f)
        rt_checkpoint_close(f->checkpoint);
    free(f);
}

int moert_tool_count(const moert_tool_file *f) {
    return rt_checkpoint_count(f->checkpoint);
}

const char *moert_tool_name(const moert_tool_file *f, int i) {
    return rt_checkpoint_name(f->checkpoint, i);
}

/* Says what is there instead: the first few names. */
static moert_result no_tensor(const moert_tool_file *f, const char *name) {
    char text[512] = "nothing";
    int n = 0, count = rt_checkpoint_count(f->checkpoint);
    for (int i = 0; i < count && i < 4; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%s%.100s", i ? ", " : "",
                      rt_checkpoint_name(f->checkpoint, i));
    if (count > 4)
        snprintf(text + n, sizeof text - (size_t)n, ", ...");
    return rt_fail(MOERT_NOT_FOUND, "there is no tensor %s in the file; it holds %s", name,
                   text);
}

moert_result moert_tool_find(const moert_tool_file *f, const char *name,
                             struct moert_tool_tensor *out) {
    struct rt_tensor t;
    int i = rt_checkpoint_index(f->checkpoint, name);
    if (i < 0)
        return no_tensor(f, name);
    RT_TRY(rt_checkpoint_get(f->checkpoint, i, &t));
    *out = (struct moert_tool_tensor){.name = t.name,
                                      .dtype = t.dtype_name,
                                      .rank = t.rank,
                                      .data = t.data,
                                      .bytes = t.bytes};
    memcpy(out->shape, t.shape, sizeof out->shape);
    return MOERT_OK;
}

/* A tensor's name must need no escape; ours never do. */
static bool is_plain_name(const char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < ' ' || *s == '"' || *s == '\\')
            return false;
    return true;
}

static void print_entry(FILE *out, const struct moert_tool_tensor *t, int64_t begin,
                        bool first) {
    fprintf(out, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", first ? "" : ",", t->name, t->dtype);
    for (int i = 0; i < t->rank; i++)
        fprintf(out, "%s%" PRId64, i ? "," : "", t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", begin,
            begin + (int64_t)t->bytes);
}

/* The header, padded with spaces so that the data begins on 8 bytes. */
static moert_result make_header(const struct moert_tool_tensor *tensors, int n, char **header,
                                size_t *bytes) {
    int64_t at = 0;
    FILE *out = open_memstream(header, bytes);
    if (!out)
        return rt_no_memory(1);
    fputc('{', out);
    for (int i = 0; i < n; i++) {
        print_entry(out, &tensors[i], at, !i);
        at += (int64_t)tensors[i].bytes;
    }
    fputc('}', out);
    for (long end = ftell(out); end % 8; end++)
        fputc(' ', out);
    return fclose(out) ? rt_no_memory(1) : MOERT_OK;
}

static bool write_tensors(FILE *out, const struct moert_tool_tensor *tensors, int n,
                          const char *header, size_t bytes) {
    uint64_t length = bytes;
    bool ok =
        fwrite(&length, sizeof length, 1, out) == 1 && fwrite(header, 1, bytes, out) == bytes;
    for (int i = 0; ok && i < n; i++)
        ok = !tensors[i].bytes ||
             fwrite(tensors[i].data, 1, tensors[i].bytes, out) == tensors[i].bytes;
    return ok && !fflush(out) && !fsync(fileno(out));
}

static moert_result save(const char *path, const char *temp, FILE *out,
                         const struct moert_tool_tensor *tensors, int n) {
    char *header = NULL;
    size_t bytes = 0;
    moert_result r = make_header(tensors, n, &header, &bytes);
    if (r == MOERT_OK && !write_tensors(out, tensors, n, header, bytes))
        r = rt_system("cannot write", temp);
    free(header);
    if (fclose(out) && r == MOERT_OK)
        r = rt_system("cannot write", temp);
    if (r == MOERT_OK && rename(temp, path))
        r = rt_system("cannot write", path);
    if (r != MOERT_OK)
        unlink(temp);
    return r;
}

moert_result moert_tool_save(const char *path, const struct moert_tool_tensor *tensors, int n) {
    char temp[PATH_MAX];
    for (int i = 0; i < n; i++)
        if (!is_plain_name(tensors[i].name) || tensors[i].rank < 0 ||
            tensors[i].rank > RT_MAX_RANK)
            return rt_fail(MOERT_INVALID, "tensor %d cannot be saved: its name or rank", i);
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode)) /* the rename would replace it */
        return rt_fail(MOERT_INVALID, "%s is no regular file", path);
    if (snprintf(temp, sizeof temp, "%s.XXXXXX", path) >= (int)sizeof temp)
        return rt_fail(MOERT_INVALID, "%s: the path is too long", path);
    int fd = mkstemp(temp);
    if (fd < 0)
        return rt_system("cannot write", path);
    mode_t mask = umask(0);
    umask(mask);
    fchmod(fd, 0666 & ~mask);
    FILE *out = fdopen(fd, "wb");
    if (!out) {
        close(fd);
        unlink(temp);
        return rt_no_memory(1);
    }
    return save(path, temp, out, tensors, n);
}
