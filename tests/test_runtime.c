/* The runtime: bundles that are not what they say, checkpoints of every family, and the launch
 * path on the host with a source that records what it is asked to run. */
#define _GNU_SOURCE
#include "../compiler/moec.h"
#include "../runtime/internal.h"

#include <criterion/criterion.h>

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define OK(call) \
    do { \
        moert_result ok_ = (call); \
        cr_assert(ok_ == MOERT_OK, "%s: %d: %s", #call, (int)ok_, moert_last_error()); \
    } while (0)
/* The call fails with a result and says something. */
#define FAILS(call, result, text) \
    do { \
        moert_result got_ = (call); \
        cr_assert(got_ == (result), "%s: %d, not %d: %s", #call, (int)got_, (int)(result), \
                  got_ ? moert_last_error() : "no error"); \
        cr_assert(strstr(moert_last_error(), text), "%s: \"%s\" does not say \"%s\"", #call, \
                  moert_last_error(), text); \
    } while (0)

/* ---- files ---- */

static char folder[64];

static void make_folder(void) {
    strcpy(folder, "/tmp/moert-test-XXXXXX");
    cr_assert(mkdtemp(folder));
    setenv("XDG_CACHE_HOME", folder, 1);
}

static void remove_folder(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    cr_assert(system(command) == 0);
}

static const char *in_folder(const char *name) {
    static char path[4][512];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, 512, "%s/%s", folder, name);
    return p;
}

static void write_file(const char *name, const void *data, size_t bytes) {
    FILE *f = fopen(in_folder(name), "wb");
    cr_assert(f && fwrite(data, 1, bytes, f) == bytes && !fclose(f), "%s", name);
}

static size_t read_whole(const char *path, char *out, size_t size) {
    FILE *f = fopen(path, "rb");
    cr_assert(f, "%s", path);
    size_t n = fread(out, 1, size, f);
    fclose(f);
    return n;
}

/* ---- a bundle written by hand ---- */

/* Runs nothing: writes each call as 8 ints behind a count into ws[SYNC]; fills for moe_random. */
static const char recorder[] =
    "#include \"templates/args.h\"\n"
    "#include <string.h>\n"
    "extern \"C\" int moe_host_launch(const char *name, const unsigned grid[3], unsigned "
    "block,\n"
    "    unsigned smem, const struct moe_args *a, int threads, char *error, unsigned bytes) {\n"
    "  if (!strcmp(name, \"fill\")) {\n"
    "    for (long long i = 0; i < a->fill_count; i++) {\n"
    "      float v = moe_random_value(a->seed, i) * a->fill_scale; unsigned u;\n"
    "      memcpy(&u, &v, 4);\n"
    "      if (a->fill_kind) ((float *)a->fill)[i] = v;\n"
    "      else ((unsigned short *)a->fill)[i] = (u + 0x7fff + (u >> 16 & 1)) >> 16; }\n"
    "    return 0; }\n"
    "  if (!strcmp(name, \"fail\")) { strncpy(error, \"as asked\", bytes); return 1; }\n"
    "  int *log = (int *)a->ws[MOE_WS_SYNC], *r = log + 8 + 8 * log[0]++;\n"
    "  r[0] = name[0]; r[1] = grid[0]; r[2] = grid[1]; r[3] = grid[2];\n"
    "  r[4] = a->num_tokens; r[5] = a->flags; r[6] = threads;\n"
    "  r[7] = a->logits_in && name[0] == 'b' ? *(const int *)a->logits_in\n"
    "       : a->topk_idx ? *a->topk_idx : -1;\n"
    "  return block == 64 && smem == 128 ? 0 : 1;\n"
    "}\n";

enum { H = 32, I = 16, E = 4, K = 2, SI = 32, MAX_T = 8, SYNC_BYTES = 8192 };

static struct moe_plan_class small_class(void) {
    struct moe_plan_class c = {.hidden = H,
                               .inter = I,
                               .experts = E,
                               .topk = K,
                               .ranks = 1,
                               .slots_per_rank = E + 1,
                               .max_replicas = 1,
                               .max_tokens = MAX_T,
                               .router = MOE_ROUTER_SOFTMAX_TOPK,
                               .n_group = 1,
                               .topk_group = 1,
                               .scale = 1,
                               .static_table = -1,
                               .activation = MOE_ACT_SWIGLU,
                               .pack_version = MOE_PACK_VERSION};
    return c;
}

/* A record's weights from 0 on; gives where they end. offset: of w2, s1, s2. */
static int64_t lay_out_weights(const struct moe_plan_class *c, int inter, int64_t *offset[3]) {
    int rows = c->activation == MOE_ACT_RELU2 ? inter : 2 * inter;
    int blocks = ((inter + 127) / 128) * ((c->hidden + 127) / 128);
    bool fp8 = c->record_format == MOE_FORMAT_FP8_BLOCK;
    int64_t end = *offset[0] = RT_ALIGN(rows * c->hidden * (fp8 ? 1 : 2));
    end += RT_ALIGN(c->hidden * inter * (fp8 ? 1 : 2));
    if (fp8) {
        *offset[1] = end;
        *offset[2] = end += RT_ALIGN(4 * blocks * rows / inter);
        end += RT_ALIGN(4 * blocks);
    }
    return end;
}

/* Record offsets as bundle.h has them. */
static void lay_out(struct moe_plan_class *c) {
    int rows = c->activation == MOE_ACT_RELU2 ? c->inter : 2 * c->inter;
    int64_t *offset[] = {&c->w2_offset, &c->s1_offset, &c->s2_offset};
    int64_t *shared[] = {&c->shared_w2_offset, &c->shared_s1_offset, &c->shared_s2_offset};
    c->w1_offset = 0;
    c->slot_bytes = lay_out_weights(c, c->inter, offset);
    if (c->has_bias) {
        c->b1_offset = c->slot_bytes;
        c->b2_offset = c->b1_offset + RT_ALIGN(rows * 4);
        c->slot_bytes = c->b2_offset + RT_ALIGN(c->hidden * 4);
    }
    if (c->shared_inter)
        c->shared_bytes = lay_out_weights(c, c->shared_inter, shared);
}

/* plan.bin as one struct: the sections follow the header in order. */
struct image {
    struct moe_plan_header header;
    struct moe_plan_class classes[1];
    struct moe_plan_layer layers[2];
    int32_t tables[4 * (E + 1)]; /* two of experts, two of shares */
    struct moe_plan_target targets[1];
    struct moe_plan_kernel kernels[8];
    struct moe_plan_buffer buffers[MOE_WS_COUNT];
    struct moe_plan_bucket buckets[2];
    struct moe_plan_launch launches[16];
    char strings[256];
    struct moe_plan_balance balance[1];
    struct moe_plan_pin pins[1];
    struct moe_plan_forbidden forbidden[1];
    double weights[2];
    struct moe_plan_map maps[1];       /* counted only where a test has a GPU's kernel */
    struct moe_plan_rank ranks[E + 1]; /* counted only where a test describes ranks */
};

static uint32_t add_string(struct image *m, const char *s) {
    uint32_t at = 1;
    while (m->strings[at])
        at += (uint32_t)strlen(m->strings + at) + 1;
    strcpy(m->strings + at, s);
    return at;
}

static void add_launch(struct image *m, int *n, int kernel, int stage, int condition, int grid,
                       int p0, int p1, int p2) {
    m->launches[(*n)++] = (struct moe_plan_launch){.kernel = kernel,
                                                   .stage = stage,
                                                   .condition = condition,
                                                   .grid = grid,
                                                   .p = {p0, p1, p2}};
}

/* Kernels a..g, one per stage or condition, and fill; bucket 0 to 2 tokens, bucket 1 to 8. */
static void add_launches(struct image *m, int ranks) {
    static const char *const names[] = {"a", "b", "c", "d", "e", "f", "g", "fill"};
    int n = 0;
    for (int i = 0; i < 8; i++)
        m->kernels[i] =
            (struct moe_plan_kernel){add_string(m, names[i]), 0, 0, MOE_TARGET_HOST, 64, 128};
    for (int b = 0; b < 2; b++) {
        int first = n;
        add_launch(m, &n, 0, MOE_STAGE_ROUTE, 0, MOE_GRID_TOKENS, 2, 3, 1);
        add_launch(m, &n, 1, MOE_STAGE_ROUTE_LOGITS, 0, MOE_GRID_FIXED, 5, 1, 1);
        add_launch(m, &n, 2, MOE_STAGE_PREPARE, MOE_COND_IF_X_FP32, MOE_GRID_TOKENS, 1, 1, 1);
        add_launch(m, &n, 3, MOE_STAGE_PREPARE, 0, MOE_GRID_ENTRIES, 3, 1, 1);
        add_launch(m, &n, 4, MOE_STAGE_EXPERTS, 0, MOE_GRID_PERSISTENT, 0, b ? 0 : 3, 0);
        add_launch(m, &n, b ? 6 : 5, MOE_STAGE_COMBINE, 0, MOE_GRID_FIXED, 1, 1, 2);
        add_launch(m, &n, 7, MOE_STAGE_FILL, 0, MOE_GRID_FILL, 4, 0, 0);
        m->buckets[b] = (struct moe_plan_bucket){b ? MAX_T : 2, first, n - first,
                                                 ranks == 1 ? -1 : MOE_EXCHANGE_ALLTOALL};
    }
    m->targets[0] = (struct moe_plan_target){MOE_TARGET_HOST, 0, 0, 2};
}

static struct image *make_image(struct moe_plan_class c) {
    struct image *m = calloc(1, sizeof *m);
    cr_assert(m);
    lay_out(&c);
    c.name = add_string(m, "class0");
    c.source = add_string(m, "class0.cu");
    c.num_buffers = MOE_WS_COUNT;
    c.collective = c.ranks > 1;
    m->classes[0] = c;
    for (int l = 0; l < 2; l++) {
        m->layers[l] =
            (struct moe_plan_layer){l ? 7 : 3, 0, l * (E + 1), (2 + l) * (E + 1), 1.25, 1.5, 1};
        for (int s = 0; s <= E; s++) {
            m->tables[l * (E + 1) + s] = s == E ? -1 : l ? E - 1 - s : s;
            m->tables[(2 + l) * (E + 1) + s] = s == E ? 0 : MOE_SHARE_ONE;
        }
    }
    m->balance[0] = (struct moe_plan_balance){.dispatch = MOE_DISPATCH_SHARE, .move_budget = 4};
    for (int r = 0; r <= E; r++)
        m->ranks[r] = (struct moe_plan_rank){r ? 1 : 0.5, r < E, 0};
    m->weights[0] = 1;
    m->weights[1] = 0.5;
    m->pins[0] = (struct moe_plan_pin){7, 1, E - 2, 0};
    m->forbidden[0] = (struct moe_plan_forbidden){3, 0, 4, 0};
    for (int w = 0; w < MOE_WS_COUNT; w++)
        m->buffers[w] = (struct moe_plan_buffer){w, w == MOE_WS_SYNC, SYNC_BYTES};
    add_launches(m, c.ranks);
    struct moe_plan_header *h = &m->header;
    memcpy(h->magic, MOE_PLAN_MAGIC, 8);
    *h = (struct moe_plan_header){.version = MOE_PLAN_VERSION,
                                  .header_bytes = sizeof *h,
                                  .total_bytes = sizeof *m,
                                  .args_id = MOE_ARGS_ID,
                                  .args_version = MOE_ARGS_VERSION,
                                  .args_bytes = sizeof(struct moe_args),
                                  .num_sections = MOE_SECTION_COUNT};
    memcpy(h->magic, MOE_PLAN_MAGIC, 8);
#define SECTION(name, field) \
    h->sections[MOE_SECTION_##name] = (struct moe_plan_section){ \
        sizeof m->field / sizeof *m->field, sizeof *m->field, offsetof(struct image, field)};
    SECTION(CLASS, classes)
    SECTION(LAYER, layers)
    SECTION(TABLE, tables)
    SECTION(TARGET, targets)
    SECTION(KERNEL, kernels)
    SECTION(BUFFER, buffers)
    SECTION(BUCKET, buckets)
    SECTION(LAUNCH, launches)
    SECTION(STRINGS, strings)
    SECTION(BALANCE, balance)
    SECTION(PIN, pins)
    SECTION(FORBIDDEN, forbidden)
    SECTION(WEIGHT, weights)
    SECTION(RANK, ranks)
    SECTION(MAP, maps)
    h->sections[MOE_SECTION_MAP].count = 0;
    h->sections[MOE_SECTION_RANK].count = 0;
    if (c.ranks == 1) /* whose experts have nowhere else to be */
        h->sections[MOE_SECTION_FORBIDDEN].count = 0;
    return m;
}

static void write_manifest(const struct image *m, const char *source) {
    char text[2048], hash[3][65];
    static const char yaml[] = "name: test\n";
    rt_hash_hex(source, strlen(source), hash[0]);
    rt_hash_hex(m, sizeof *m, hash[1]);
    rt_hash_hex(yaml, strlen(yaml), hash[2]);
    write_file("class0.cu", source, strlen(source));
    write_file("plan.bin", m, sizeof *m);
    write_file("plan.yaml", yaml, strlen(yaml));
    int n =
        snprintf(text, sizeof text,
                 "moec-bundle 1\ncompiler 0.1.0\nnvrtc none\nplan %s\n"
                 "file %s %zu class0.cu\nfile %s %zu plan.bin\nfile %s %zu plan.yaml\n",
                 hash[2], hash[0], strlen(source), hash[1], sizeof *m, hash[2], strlen(yaml));
    write_file("MANIFEST", text, (size_t)n);
}

static moert_bundle *open_image(struct moe_plan_class c) {
    struct image *m = make_image(c);
    moert_bundle *b;
    write_manifest(m, recorder);
    free(m);
    OK(moert_bundle_open(folder, &b));
    return b;
}

/* ---- errors and structs that cross the border ---- */

Test(runtime, every_result_has_a_text) {
    for (int r = MOERT_OK; r <= MOERT_CUDA; r++)
        for (int s = MOERT_OK; s < r; s++)
            cr_assert_str_neq(moert_result_text((moert_result)r),
                              moert_result_text((moert_result)s));
    cr_assert_str_eq(moert_result_text((moert_result)99), "unknown result");
    cr_assert_eq(moert_version(), MOERT_VERSION_CODE);
}

Test(runtime, structs_of_other_versions) {
    struct {
        size_t size;
        int a, b;
    } known, old = {sizeof(size_t) + sizeof(int), 5, 6};
    struct {
        size_t size;
        int a, b, c, d;
    } newer = {sizeof newer, 7, 8, 0, 0};
    known.b = 9;
    OK(rt_config(&known, sizeof known, &old, "thing"));
    cr_assert(known.a == 5 && known.b == 9 && known.size == sizeof known);
    OK(rt_config(&known, sizeof known, &newer, "thing"));
    cr_assert(known.a == 7 && known.b == 8);
    newer.d = 1;
    FAILS(rt_config(&known, sizeof known, &newer, "thing"), MOERT_VERSION, "does not know");
    newer.size = 0;
    FAILS(rt_config(&known, sizeof known, &newer, "thing"), MOERT_INVALID, "_INIT");
    newer.size = 1 << 20;
    FAILS(rt_config(&known, sizeof known, &newer, "thing"), MOERT_INVALID, "_INIT");
    FAILS(rt_config(&known, sizeof known, NULL, "thing"), MOERT_INVALID, "NULL");
}

/* ---- bundles ---- */

Test(runtime, bundle_opens, .init = make_folder, .fini = remove_folder) {
    moert_bundle *b = open_image(small_class());
    cr_assert_eq(moert_bundle_num_layers(b), 2);
    cr_assert(moert_bundle_layer(b, 0) == 3 && moert_bundle_layer(b, 1) == 7);
    cr_assert(moert_bundle_layer(b, 2) == -1 && moert_bundle_layer(b, -1) == -1);
    moert_layer_info info = MOERT_LAYER_INFO_INIT;
    OK(moert_bundle_layer_info(b, 7, &info));
    cr_assert(info.hidden == H && info.inter == I && info.experts == E && info.topk == K);
    cr_assert(info.slots_per_rank == E + 1 && info.max_tokens == MAX_T && info.layer == 7);
    cr_assert_geq(info.weight_bytes, (size_t)((E + 1) * 3 * H * I * 2 + E * H * 4));
    FAILS(moert_bundle_layer_info(b, 4, &info), MOERT_NOT_FOUND, "no layer 4");
    cr_assert_eq(moert_workspace_bytes(b), (size_t)MOE_WS_COUNT * SYNC_BYTES);
    cr_assert(moert_tool_class(b, 3)->hidden == H && !moert_tool_class(b, 4));
    cr_assert(*moert_tool_table(b, 1) == 1 && !moert_tool_table(b, 100));
    moert_bundle_close(b);
    moert_bundle_close(NULL);
    FAILS(moert_bundle_open(in_folder("none"), &b), MOERT_NOT_FOUND, "none");
    FAILS(moert_bundle_open(NULL, &b), MOERT_INVALID, "dir");
}

Test(runtime, damaged_files_are_found, .init = make_folder, .fini = remove_folder) {
    moert_bundle_close(open_image(small_class()));
    static const char *const names[] = {"class0.cu", "plan.bin", "plan.yaml"};
    static char data[16384];
    moert_bundle *b;
    for (int i = 0; i < 3; i++) {
        size_t n = read_whole(in_folder(names[i]), data, sizeof data);
        data[n / 2] ^= 1;
        write_file(names[i], data, n);
        FAILS(moert_bundle_open(folder, &b), MOERT_CORRUPT, "hash");
        data[n / 2] ^= 1;
        write_file(names[i], data, n - 1);
        FAILS(moert_bundle_open(folder, &b), MOERT_CORRUPT, "MANIFEST says");
        cr_assert(!unlink(in_folder(names[i])));
        FAILS(moert_bundle_open(folder, &b), MOERT_NOT_FOUND, names[i]);
        cr_assert(!symlink("/etc/hostname", in_folder(names[i])));
        FAILS(moert_bundle_open(folder, &b), MOERT_CORRUPT, "symbolic link");
        cr_assert(!unlink(in_folder(names[i])));
        cr_assert(!mkfifo(in_folder(names[i]), 0600));
        FAILS(moert_bundle_open(folder, &b), MOERT_CORRUPT, "not a regular file");
        cr_assert(!unlink(in_folder(names[i])));
        write_file(names[i], data, n);
    }
    OK(moert_bundle_open(folder, &b));
    moert_bundle_close(b);
}

/* The manifest with one text replaced does not open, and the error says why. */
static void bad_manifest(const char *from, const char *to, moert_result result,
                         const char *why) {
    char old[4096], new[8192];
    moert_bundle *b;
    size_t n = read_whole(in_folder("MANIFEST"), old, sizeof old - 1);
    old[n] = 0;
    char *at = strstr(old, from);
    cr_assert(at, "%s", from);
    snprintf(new, sizeof new, "%.*s%s%s", (int)(at - old), old, to, at + strlen(from));
    write_file("MANIFEST", new, strlen(new));
    FAILS(moert_bundle_open(folder, &b), result, why);
    write_file("MANIFEST", old, n);
}

Test(runtime, manifest_is_read_strictly, .init = make_folder, .fini = remove_folder) {
    moert_bundle_close(open_image(small_class()));
    bad_manifest("moec-bundle 1", "moec-bundle 2", MOERT_VERSION, "format version 2");
    bad_manifest("moec-bundle 1", "zip", MOERT_CORRUPT, "not a bundle's");
    bad_manifest("compiler ", "compile ", MOERT_CORRUPT, "MANIFEST:2");
    bad_manifest("nvrtc none\n", "", MOERT_CORRUPT, "MANIFEST:3");
    bad_manifest("plan ", "plan 0", MOERT_CORRUPT, "MANIFEST:4");
    bad_manifest("plan.yaml\n", "plan.yaml", MOERT_CORRUPT, "newline");
    bad_manifest(" class0.cu", " ../class0.cu", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest(" class0.cu", " /class0.cu", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest(" class0.cu", " a/./class0.cu", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest(" class0.cu", " a//class0.cu", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest(" class0.cu", " ", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest(" class0.cu", " q/class0.cu", MOERT_CORRUPT, "ascending");
    bad_manifest(" class0.cu", " a/class0.cu", MOERT_NOT_FOUND, "a/class0.cu");
    bad_manifest("plan.bin", "plan.bix", MOERT_NOT_FOUND, "plan.bix");
    bad_manifest("file ", "file x", MOERT_CORRUPT, "MANIFEST:5");
    bad_manifest("plan.yaml\n", "plan.yaml\n\n", MOERT_CORRUPT, "MANIFEST:8");
    cr_assert(!unlink(in_folder("MANIFEST")));
    moert_bundle *b;
    FAILS(moert_bundle_open(folder, &b), MOERT_NOT_FOUND, "MANIFEST");
}

/* rt_plan_check on an image in memory. */
static moert_result check_image(struct image *m, size_t bytes) {
    unsigned char *exact = malloc(bytes ? bytes : 1); /* its end is the sanitizer's border */
    cr_assert(exact);
    memcpy(exact, m, bytes);
    struct rt_file files[] = {{.path = "class0.cu"},
                              {.path = "plan.bin", .data = exact, .bytes = bytes}};
    moert_bundle b = {.files = files, .num_files = 2};
    moert_result r = rt_plan_check(&b, &files[1]);
    free(exact);
    return r;
}

Test(runtime, no_byte_of_a_plan_crashes) {
    struct moe_plan_class c = small_class();
    c.has_bias = c.shared_gate = 1;
    c.shared_inter = SI;
    struct image *m = make_image(c);
    unsigned char *bytes = (unsigned char *)m;
    static const unsigned char masks[] = {0x01, 0x80, 0xff, 0x10};
    int refused = 0, accepted = 0;
    OK(check_image(m, sizeof *m));
    for (size_t i = 0; i < sizeof *m; i++)
        for (int k = 0; k < 4; k++) {
            bytes[i] ^= masks[k];
            *(check_image(m, sizeof *m) == MOERT_OK ? &accepted : &refused) += 1;
            bytes[i] ^= masks[k];
        }
    for (size_t n = 0; n < sizeof *m; n++)
        cr_assert_neq(check_image(m, n), MOERT_OK);
    cr_assert(refused > 2000 && accepted > 100, "%d refused, %d accepted", refused, accepted);
    free(m);
}

/* One change to a sound plan, and what the check says of it. */
#define CHANGED(change, result, text) \
    do { \
        struct image *m = make_image(small_class()); \
        struct moe_plan_class *c = m->classes; \
        (void)c; \
        change; \
        FAILS(check_image(m, sizeof *m), result, text); \
        free(m); \
    } while (0)

Test(runtime, plan_header_is_checked) {
    CHANGED(m->header.magic[0] = 'X', MOERT_CORRUPT, "magic");
    CHANGED(m->header.version++, MOERT_VERSION, "version 7");
    CHANGED(m->header.args_version++, MOERT_VERSION, "build the bundle again");
    CHANGED(m->header.args_bytes--, MOERT_VERSION, "build the bundle again");
    CHANGED(m->header.args_id = 9, MOERT_VERSION, "argument 9");
    CHANGED(m->header.total_bytes++, MOERT_CORRUPT, "says it has");
    CHANGED(m->header.num_sections++, MOERT_CORRUPT, "sections");
    CHANGED(m->header.sections[1].stride++, MOERT_CORRUPT, "LAYER has records");
    CHANGED(m->header.sections[1].offset += 4, MOERT_CORRUPT, "LAYER lies outside");
    CHANGED(m->header.sections[1].count = 1u << 31, MOERT_CORRUPT, "LAYER lies outside");
    CHANGED(m->header.sections[1].offset = m->header.sections[2].offset, MOERT_CORRUPT,
            "overlap");
    CHANGED(m->strings[255] = 'x', MOERT_CORRUPT, "NUL");
    CHANGED(m->strings[0] = 'x', MOERT_CORRUPT, "NUL");
}

Test(runtime, plan_classes_are_checked) {
    CHANGED(c->name = 0, MOERT_CORRUPT, "no name");
    CHANGED(c->source = 1, MOERT_CORRUPT, "source");
    CHANGED(c->source = 256, MOERT_CORRUPT, "source");
    CHANGED(c->hidden = 40, MOERT_CORRUPT, "hidden size 40");
    CHANGED(c->inter = 0, MOERT_CORRUPT, "intermediate size 0");
    CHANGED(c->topk = E + 1, MOERT_CORRUPT, "top-k 5");
    CHANGED(c->slots_per_rank = E - 1, MOERT_CORRUPT, "slots");
    CHANGED(c->ranks = 1 << 30, MOERT_CORRUPT, "ranks");
    CHANGED(c->max_replicas = 0, MOERT_CORRUPT, "replicas");
    CHANGED(c->max_tokens = 0, MOERT_CORRUPT, "max_tokens 0");
    CHANGED(c->activation = MOE_ACT_COUNT, MOERT_CORRUPT, "activation");
    CHANGED(c->act_limit = NAN, MOERT_CORRUPT, "activation");
    CHANGED(c->shared_gate = 1, MOERT_CORRUPT, "shared expert");
    CHANGED(c->weights_format = -1, MOERT_CORRUPT, "weight format");
    CHANGED(c->router = MOE_ROUTER_COUNT, MOERT_CORRUPT, "router");
    CHANGED(c->router = MOE_ROUTER_STATIC, MOERT_CORRUPT, "without its experts");
    CHANGED((c->n_group = 3, c->topk_group = 1), MOERT_CORRUPT, "1 of 3 groups");
    CHANGED((c->n_group = 2, c->topk_group = 0), MOERT_CORRUPT, "0 of 2 groups");
    CHANGED((c->n_group = E, c->topk_group = K - 1), MOERT_CORRUPT, "groups");
    CHANGED(c->static_table = 9, MOERT_CORRUPT, "static");
    CHANGED(c->static_table = 4, MOERT_CORRUPT, "static expert -1");
    CHANGED(c->pack_version = 2, MOERT_VERSION, "pack version 2; this library packs 1");
    CHANGED(c->record_format = MOE_FORMAT_FP8_TENSOR, MOERT_CORRUPT, "weight format");
    CHANGED(c->record_format = MOE_FORMAT_FP8_BLOCK, MOERT_VERSION,
            "pack version 1; this library packs 2");
    CHANGED((c->record_format = MOE_FORMAT_FP8_BLOCK, c->pack_version = 2), MOERT_CORRUPT,
            "slot record");
    CHANGED(c->s1_offset = 256, MOERT_CORRUPT, "slot record");
    CHANGED(c->w2_offset -= 256, MOERT_CORRUPT, "slot record");
    CHANGED(c->w2_offset += 8, MOERT_CORRUPT, "slot record");
    CHANGED(c->b1_offset = 256, MOERT_CORRUPT, "slot record");
    CHANGED(c->slot_bytes -= 256, MOERT_CORRUPT, "slot record");
    CHANGED(c->slot_bytes += 8, MOERT_CORRUPT, "slot record");
    CHANGED(c->slot_bytes = INT64_MAX - 255, MOERT_CORRUPT, "slot record");
    CHANGED(c->shared_w2_offset = 256, MOERT_CORRUPT, "shared expert's record");
    CHANGED(c->num_buffers++, MOERT_CORRUPT, "buffers");
    CHANGED(c->first_buffer = -1, MOERT_CORRUPT, "buffers");
    CHANGED(m->buffers[3].ws = 2, MOERT_CORRUPT, "buffer 3");
    CHANGED(m->buffers[3].ws = MOE_WS_COUNT, MOERT_CORRUPT, "buffer 3");
    CHANGED(m->buffers[MOE_WS_Y].bytes = MAX_T * K * H * 2 - 1, MOERT_CORRUPT, "workspace");
    CHANGED(m->buffers[MOE_WS_Y].bytes = INT64_MAX, MOERT_CORRUPT, "workspace");
    CHANGED(m->buffers[MOE_WS_COUNTS].bytes = (E + 1) * 4 - 1, MOERT_CORRUPT, "workspace");
}

/* The same for a plan of Hopper's, whose kernel e has a tensor map of its experts' first weights. */
#define MAP_CHANGED(change, text) \
    do { \
        struct image *m = make_image(small_class()); \
        m->targets[0].target = MOE_TARGET_SM_90A; \
        for (int i_ = 0; i_ < 8; i_++) \
            m->kernels[i_].target = MOE_TARGET_SM_90A; \
        m->kernels[4].num_maps = 1; \
        m->header.sections[MOE_SECTION_MAP].count = 1; \
        m->maps[0] = (struct moe_plan_map){.base = MOE_MAP_POOL, \
                                           .columns = 16, \
                                           .rows = 4, \
                                           .slots = 1, \
                                           .box_rows = 64, \
                                           .element = 2, \
                                           .slot_stride = m->classes[0].slot_bytes}; \
        OK(check_image(m, sizeof *m)); \
        change; \
        FAILS(check_image(m, sizeof *m), MOERT_CORRUPT, text); \
        free(m); \
    } while (0)

Test(runtime, plan_tensor_maps_are_checked) {
    MAP_CHANGED(m->kernels[4].num_maps = 2, "kernel e: tensor maps");
    MAP_CHANGED(m->kernels[4].num_maps = -1, "kernel e: tensor maps");
    MAP_CHANGED(m->kernels[4].first_map = 1, "kernel e: tensor maps");
    MAP_CHANGED(m->kernels[4].cluster = 9, "cluster of 9");
    MAP_CHANGED(m->kernels[4].cluster = -1, "cluster of -1");
    MAP_CHANGED(m->maps[0].base = MOE_MAP_BASE_COUNT, "tensor map 0");
    MAP_CHANGED(m->maps[0].base = MOE_MAP_SHARED, "tensor map 0");
    MAP_CHANGED(m->maps[0].slots = E + 2, "tensor map 0");
    MAP_CHANGED(m->maps[0].slots = 0, "tensor map 0");
    MAP_CHANGED(m->maps[0].slot_stride -= 16, "tensor map 0");
    MAP_CHANGED(m->maps[0].columns = 12, "tensor map 0");
    MAP_CHANGED(m->maps[0].columns = 1 << 20, "tensor map 0");
    MAP_CHANGED(m->maps[0].rows = 1 << 20, "tensor map 0");
    MAP_CHANGED(m->maps[0].rows = 0, "tensor map 0");
    MAP_CHANGED(m->maps[0].box_rows = 257, "tensor map 0");
    MAP_CHANGED(m->maps[0].element = 3, "tensor map 0");
    MAP_CHANGED(m->maps[0].offset = 8, "tensor map 0");
    MAP_CHANGED(m->maps[0].offset = m->maps[0].slot_stride, "tensor map 0");
    MAP_CHANGED(m->launches[0].flags = 2, "launch 0");
    CHANGED(m->kernels[4].cluster = 2, MOERT_CORRUPT, "cluster of 2");
    CHANGED((m->header.sections[MOE_SECTION_MAP].count = 1, m->kernels[4].num_maps = 1),
            MOERT_CORRUPT, "tensor maps");
}

Test(runtime, plan_layers_and_launches_are_checked) {
    CHANGED(m->layers[1].layer = 3, MOERT_CORRUPT, "ascending");
    CHANGED(m->layers[0].layer = -1, MOERT_CORRUPT, "ascending");
    CHANGED(m->layers[1].class_index = 1, MOERT_CORRUPT, "class 1");
    CHANGED(m->layers[1].expert_of_slot = 16, MOERT_CORRUPT, "table of experts");
    CHANGED(m->layers[1].expert_of_slot = -1, MOERT_CORRUPT, "table of experts");
    CHANGED(m->tables[0] = E, MOERT_CORRUPT, "slot 0: expert 4");
    CHANGED(m->tables[0] = 1, MOERT_CORRUPT, "0 replicas");
    CHANGED(m->tables[4] = 1, MOERT_CORRUPT, "2 replicas");
    CHANGED(m->targets[0].target = MOE_TARGET_COUNT, MOERT_CORRUPT, "target 0");
    CHANGED(m->targets[0].class_index = 1, MOERT_CORRUPT, "target 0");
    CHANGED(m->targets[0].num_buckets = 3, MOERT_CORRUPT, "buckets");
    CHANGED(m->targets[0].num_buckets = 0, MOERT_CORRUPT, "buckets");
    CHANGED(m->targets[0].num_buckets = 1, MOERT_CORRUPT, "buckets end at 2");
    CHANGED(m->buckets[1].max_tokens = 2, MOERT_CORRUPT, "ascending");
    CHANGED(m->buckets[1].num_launches = 10, MOERT_CORRUPT, "launches");
    CHANGED(m->buckets[0].exchange = m->classes[0].ranks == 1 ? 0 : -1, MOERT_CORRUPT,
            "exchange");
    CHANGED(m->buckets[1].exchange = MOE_EXCHANGE_COUNT, MOERT_CORRUPT, "exchange 3");
    CHANGED(m->launches[0].kernel = 8, MOERT_CORRUPT, "kernel 8");
    CHANGED(m->launches[0].stage = MOE_STAGE_COUNT, MOERT_CORRUPT, "stage");
    CHANGED(m->launches[0].condition = MOE_COND_COUNT, MOERT_CORRUPT, "condition");
    CHANGED(m->launches[0].grid = MOE_GRID_COUNT, MOERT_CORRUPT, "grid");
    CHANGED(m->launches[0].p[0] = 0, MOERT_CORRUPT, "launch 0");
    CHANGED(m->launches[0].p[1] = 65536, MOERT_CORRUPT, "launch 0");
    CHANGED(m->kernels[2].block = 1025, MOERT_CORRUPT, "1025 threads");
    CHANGED(m->kernels[2].smem = 232449, MOERT_CORRUPT, "shared memory");
    CHANGED(m->kernels[2].target = MOE_TARGET_SM_80, MOERT_CORRUPT, "kernel 2");
    CHANGED(m->kernels[2].expression = 0, MOERT_CORRUPT, "names");
    CHANGED(m->kernels[2].symbol = 256, MOERT_CORRUPT, "names");
    CHANGED(m->kernels[2].symbol = 1, MOERT_CORRUPT, "symbol and file");
    CHANGED(m->kernels[2].file = 1, MOERT_CORRUPT, "symbol and file");
}

/* The sound plan on five ranks of one slot each, where an expert can be kept off a rank. */
#define SPREAD_CHANGED(change, text) \
    do { \
        struct moe_plan_class spread = small_class(); \
        spread.ranks = E + 1; \
        spread.slots_per_rank = 1; \
        struct image *m = make_image(spread); \
        OK(check_image(m, sizeof *m)); \
        change; \
        FAILS(check_image(m, sizeof *m), MOERT_CORRUPT, text); \
        free(m); \
    } while (0)

Test(runtime, plan_shares_and_constraints_are_checked) {
    CHANGED(m->layers[1].share_of_slot = 16, MOERT_CORRUPT, "layer 7: table of shares");
    CHANGED(m->layers[1].share_of_slot = -1, MOERT_CORRUPT, "layer 7: table of shares");
    CHANGED(m->tables[10]--, MOERT_CORRUPT, "layer 3: the shares of expert 0 add up to 65535");
    CHANGED(m->tables[10]++, MOERT_CORRUPT, "layer 3, slot 0: share 65537");
    CHANGED(m->tables[10] = -1, MOERT_CORRUPT, "layer 3, slot 0: share -1");
    CHANGED(m->tables[14] = 1, MOERT_CORRUPT, "layer 3, slot 4: share 1"); /* an empty slot */
    CHANGED(m->layers[0].imbalance = NAN, MOERT_CORRUPT, "layer 3: imbalance");
    CHANGED(m->layers[0].imbalance_even = -1, MOERT_CORRUPT, "layer 3: imbalance");
    CHANGED(m->layers[1].bound = INFINITY, MOERT_CORRUPT, "layer 7: imbalance");
    CHANGED(m->header.sections[MOE_SECTION_BALANCE].count = 0, MOERT_CORRUPT, "0 records");
    CHANGED(m->balance[0].dispatch = MOE_DISPATCH_COUNT, MOERT_CORRUPT, "dispatch 4");
    CHANGED(m->balance[0].dispatch = -1, MOERT_CORRUPT, "dispatch -1");
    CHANGED(m->balance[0].layer_updates_per_iter = -1, MOERT_CORRUPT, "-1 updates");
    CHANGED(m->balance[0].move_budget = -2, MOERT_CORRUPT, "-2 moves");
    CHANGED(m->weights[1] = -0.5, MOERT_CORRUPT, "weight 1");
    CHANGED(m->weights[0] = NAN, MOERT_CORRUPT, "weight 0");
    CHANGED(m->pins[0].layer = 4, MOERT_CORRUPT, "pin 0: layer 4");
    CHANGED(m->pins[0].expert = E, MOERT_CORRUPT, "pin 0: layer 7, expert 4");
    CHANGED(m->pins[0].expert = -1, MOERT_CORRUPT, "pin 0: layer 7, expert -1");
    CHANGED(m->pins[0].slot = E + 1, MOERT_CORRUPT, "pin 0: slot 5");
    CHANGED(m->pins[0].slot = -1, MOERT_CORRUPT, "pin 0: slot -1");
    CHANGED(m->pins[0].slot = 0, MOERT_CORRUPT, "slot 0 of layer 7 does not hold expert 2");
    SPREAD_CHANGED(m->classes[0].collective = 0, "a collective that its class has no room for");
    SPREAD_CHANGED(m->forbidden[0].layer = 4, "forbidden 0: layer 4");
    SPREAD_CHANGED(m->forbidden[0].expert = E, "forbidden 0: layer 3, expert 4");
    SPREAD_CHANGED(m->forbidden[0].rank = E + 1, "forbidden 0: rank 5");
    SPREAD_CHANGED(m->forbidden[0].rank = -1, "forbidden 0: rank -1");
    SPREAD_CHANGED(m->forbidden[0].rank = 0, "rank 0 of layer 3 holds expert 0");
}

/* Five ranks of one slot, the last of which may not be used, like the plan's last slot. */
#define RANKS_CHANGED(change, text) \
    SPREAD_CHANGED(m->header.sections[MOE_SECTION_RANK].count = E + 1; \
                   OK(check_image(m, sizeof *m)); change, text)

Test(runtime, plan_limits_are_checked) {
    RANKS_CHANGED(m->header.sections[MOE_SECTION_RANK].count = E,
                  "layer 3: 4 ranks are described, of 5");
    RANKS_CHANGED(m->ranks[1].speed = NAN, "rank 1: speed");
    RANKS_CHANGED(m->ranks[1].speed = 0, "rank 1: speed");
    RANKS_CHANGED(m->ranks[2].slots = 2, "rank 2: 2 slots of 1");
    RANKS_CHANGED(m->ranks[2].slots = -1, "rank 2: -1 slots of 1");
    RANKS_CHANGED(m->ranks[2].slots = 0, "layer 3: slot 0 of rank 2 holds expert 2, but only");
    SPREAD_CHANGED(m->balance[0].groups = -1, "limits of");
    SPREAD_CHANGED(m->balance[0].cross_node_slots = 1, "limits of");
    SPREAD_CHANGED(m->balance[0].max_per_node = 1, "limits of");
    SPREAD_CHANGED(m->balance[0].max_replicas = -1, "limits of");
    SPREAD_CHANGED(m->balance[0].ranks_per_node = 2, "layer 3: nodes of 2 ranks, of 5");
    SPREAD_CHANGED(m->balance[0].groups = 4, "layer 3: 4 groups of 4 experts");
    SPREAD_CHANGED((m->balance[0].ranks_per_node = 5, m->balance[0].groups = 3),
                   "layer 3: 3 groups of 4 experts");
    SPREAD_CHANGED((m->balance[0].ranks_per_node = 1, m->balance[0].groups = 2),
                   "layer 3: 2 groups of 4 experts");
}

/* Four ranks of one slot in two nodes, layer 3 with experts 0 1 2 3 in order, layer 7 backwards;
 * two groups. */
static struct image *two_nodes(void) {
    struct moe_plan_class nodes = small_class();
    nodes.ranks = E + 1;
    nodes.slots_per_rank = 1;
    struct image *m = make_image(nodes);
    m->classes[0].ranks = E;
    m->header.sections[MOE_SECTION_FORBIDDEN].count = 0;
    m->balance[0].ranks_per_node = 2;
    m->balance[0].groups = 2;
    OK(check_image(m, sizeof *m));
    return m;
}

Test(runtime, groups_stay_in_their_nodes) {
    struct image *m = two_nodes();
    m->tables[1] = 2; /* experts 0 2 1 3: every home leaves two slots away from theirs */
    m->tables[2] = 1;
    FAILS(check_image(m, sizeof *m), MOERT_CORRUPT,
          "layer 3: 2 slots hold an expert off the node of its group, 0 may");
    m->balance[0].cross_node_slots = 1;
    FAILS(check_image(m, sizeof *m), MOERT_CORRUPT, "layer 3: 2 slots hold");
    m->balance[0].cross_node_slots = 2;
    OK(check_image(m, sizeof *m));
    free(m);
}

/* ---- safetensors ---- */

/* A safetensors file from a header's text and some bytes of data. */
static void write_tensors(const char *name, const char *header, size_t data) {
    uint64_t n = strlen(header);
    char *all = calloc(1, 8 + n + data);
    cr_assert(all);
    memcpy(all, &n, 8);
    memcpy(all + 8, header, n);
    write_file(name, all, 8 + n + data);
    free(all);
}

static moert_result try_open(const char *name) {
    moert_tool_file *f;
    moert_result r = moert_tool_open(in_folder(name), &f);
    if (r == MOERT_OK)
        moert_tool_close(f);
    return r;
}

#define BAD_HEADER(header, data, text) \
    do { \
        write_tensors("bad.safetensors", header, data); \
        FAILS(try_open("bad.safetensors"), MOERT_CORRUPT, text); \
    } while (0)
#define T_(name, dtype, shape, from, to) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" #from \
    "," #to "]}"

Test(runtime, safetensors_headers_are_strict, .init = make_folder, .fini = remove_folder) {
    write_tensors("bad.safetensors", "{" T_("a", "F32", "2", 0, 8) "}  ", 8);
    OK(try_open("bad.safetensors"));
    write_tensors("bad.safetensors", "{\"__metadata__\":{\"format\":\"pt\"}}", 0);
    OK(try_open("bad.safetensors"));
    BAD_HEADER("", 0, "expected '{'");
    BAD_HEADER("[]", 0, "expected '{'");
    BAD_HEADER("{", 0, "expected '\"'");
    BAD_HEADER("{}x", 0, "text behind");
    BAD_HEADER("{" T_("a", "F32", "2", 0, 8) ",}", 8, "expected '\"'");
    BAD_HEADER("{" T_("a", "F32", "2", 0, 8) "}", 4, "outside the file");
    BAD_HEADER("{" T_("a", "F32", "2", 0, 8) "}", 12, "belong to no tensor");
    BAD_HEADER("{" T_("a", "F32", "3", 0, 8) "}", 8, "not what its shape says");
    BAD_HEADER("{" T_("a", "F32", "2", 8, 0) "}", 8, "outside the file");
    BAD_HEADER("{" T_("a", "F32", "1", 0, 4) "," T_("b", "F32", "2", 0, 8) "}", 8,
               "over another");
    BAD_HEADER("{" T_("a", "F32", "1", 4, 8) "}", 8, "gap");
    BAD_HEADER("{" T_("a", "F32", "1", 0, 4) "," T_("a", "F32", "1", 4, 8) "}", 8,
               "comes twice");
    BAD_HEADER("{" T_("a", "F32", "4611686018427387904,4", 0, 8) "}", 8, "whole number");
    BAD_HEADER("{" T_("a", "F32", "400000000000000000,64", 0, 8) "}", 8, "shape says");
    BAD_HEADER("{" T_("a", "F32", "-1", 0, 8) "}", 8, "whole number");
    BAD_HEADER("{" T_("a", "F32", "1.5", 0, 8) "}", 8, "whole number");
    BAD_HEADER("{" T_("a", "F32", "02", 0, 8) "}", 8, "whole number");
    BAD_HEADER("{" T_("a", "F32", "1,1,1,1,1,1,1,1,2", 0, 8) "}", 8, "8 dimensions");
    BAD_HEADER("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "needs dtype");
    BAD_HEADER("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 8, "twice");
    BAD_HEADER("{\"a\":{\"kind\":1}}", 8, "unknown key");
    BAD_HEADER("{\"a\\u0000\":1}", 0, "escape");
    BAD_HEADER("{\"a\\ud800\":1}", 0, "surrogate");
    BAD_HEADER("{\"a\\x\":1}", 0, "unknown escape");
    BAD_HEADER("{\"a\n\":1}", 0, "control character");
    BAD_HEADER("{\"a", 0, "without end");
    BAD_HEADER("{\"__metadata__\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, "too deep");
    write_file("bad.safetensors", "1234567", 7);
    FAILS(try_open("bad.safetensors"), MOERT_CORRUPT, "too short");
    FAILS(try_open("none.safetensors"), MOERT_NOT_FOUND, "none.safetensors");
}

Test(runtime, safetensors_cut_or_changed_anywhere, .init = make_folder, .fini = remove_folder) {
    static const float a[3] = {1, 2, 3};
    static char data[4096], copy[4096];
    struct moert_tool_tensor t[] = {
        {.name = "a", .dtype = "F32", .rank = 1, .shape = {3}, .data = a, .bytes = 12},
        {.name = "empty", .dtype = "BF16", .rank = 2, .shape = {0, 4}},
        {.name = "b", .dtype = "U8", .rank = 0, .data = a, .bytes = 1}};
    moert_tool_file *f;
    OK(moert_tool_save(in_folder("x"), t, 3));
    size_t n = read_whole(in_folder("x"), data, sizeof data);
    for (size_t cut = 0; cut < n; cut++) {
        write_file("cut", data, cut);
        FAILS(try_open("cut"), MOERT_CORRUPT, "cut");
    }
    for (size_t i = 0; i < n; i++)
        for (int bit = 0; bit < 8; bit++) {
            memcpy(copy, data, n);
            copy[i] ^= (char)(1 << bit);
            write_file("cut", copy, n);
            if (i >= n - 13) /* the tensors' own bytes */
                OK(try_open("cut"));
            else
                (void)try_open("cut");
        }
    OK(moert_tool_open(in_folder("x"), &f));
    struct moert_tool_tensor got;
    OK(moert_tool_find(f, "a", &got));
    cr_assert(got.bytes == 12 && got.rank == 1 && !memcmp(got.data, a, 12));
    OK(moert_tool_find(f, "empty", &got));
    cr_assert(got.bytes == 0 && got.shape[1] == 4);
    FAILS(moert_tool_find(f, "c", &got), MOERT_NOT_FOUND, "c");
    moert_tool_close(f);
    t[0].name = "quo\"te";
    FAILS(moert_tool_save(in_folder("y"), t, 3), MOERT_INVALID, "name");
    FAILS(moert_tool_save(in_folder("no/y"), t + 1, 1), MOERT_NOT_FOUND, "no/y");
}

Test(runtime, safetensors_escapes_in_names, .init = make_folder, .fini = remove_folder) {
    write_tensors("x", "{" T_("\\u00e4\\ud83d\\ude00\\/", "U8", "1", 0, 1) "}", 1);
    moert_tool_file *f;
    struct moert_tool_tensor t;
    OK(moert_tool_open(in_folder("x"), &f));
    OK(moert_tool_find(f, "\xc3\xa4\xf0\x9f\x98\x80/", &t));
    moert_tool_close(f);
}

Test(runtime, safetensors_index_of_shards, .init = make_folder, .fini = remove_folder) {
    static const float a[2] = {1, 2};
    struct moert_tool_tensor t[] = {
        {.name = "p", .dtype = "F32", .rank = 1, .shape = {1}, .data = a, .bytes = 4},
        {.name = "q", .dtype = "F32", .rank = 1, .shape = {1}, .data = a + 1, .bytes = 4}};
    static const char index[] = "{\"metadata\": {\"total_size\": 8, \"x\": [1, null, true]},\n"
                                "\"weight_map\": {\"q\": \"2.safetensors\", \"r\": "
                                "\"2.safetensors\", \"p\": \"1.safetensors\"}}\n";
    moert_tool_file *f;
    struct moert_tool_tensor got;
    FAILS(try_open(""), MOERT_NOT_FOUND, "neither");
    OK(moert_tool_save(in_folder("1.safetensors"), t, 1));
    OK(moert_tool_save(in_folder("2.safetensors"), t + 1, 1));
    write_file("model.safetensors.index.json", index, strlen(index));
    OK(moert_tool_open(folder, &f));
    OK(moert_tool_find(f, "q", &got));
    cr_assert(!memcmp(got.data, a + 1, 4));
    FAILS(moert_tool_find(f, "r", &got), MOERT_CORRUPT, "r is not there");
    moert_tool_close(f);
    OK(moert_tool_open(folder, &f));
    cr_assert(!unlink(in_folder("1.safetensors")));
    FAILS(moert_tool_find(f, "p", &got), MOERT_NOT_FOUND, "1.safetensors");
    moert_tool_close(f);
#define BAD_INDEX(text, why) \
    write_file("model.safetensors.index.json", text, strlen(text)); \
    FAILS(try_open(""), MOERT_CORRUPT, why)
    BAD_INDEX("{\"weight_map\": {\"p\": \"../1.safetensors\"}}", "bad file name");
    BAD_INDEX("{\"weight_map\": {\"p\": \"..\"}}", "bad file name");
    BAD_INDEX("{\"weight_map\": {\"p\": \"1\", \"p\": \"1\"}}", "twice");
    BAD_INDEX("{\"metadata\": {}}", "no weight_map");
    BAD_INDEX("{\"weight_map\": {\"p\": 1}}", "expected '\"'");
    BAD_INDEX("", "expected '{'");
}

Test(runtime, safetensors_header_of_a_large_checkpoint, .init = make_folder,
     .fini = remove_folder) {
    enum { TENSORS = 138000 };
    char *text = malloc((size_t)TENSORS * 160), *at = text;
    struct timespec from, to;
    cr_assert(text);
    *at++ = '{';
    for (int i = 0; i < TENSORS; i++)
        at += sprintf(
            at,
            "%s\"model.layers.%d.mlp.experts.%d.gate_proj.weight_scale_inv\":{\"dtype\":"
            "\"F32\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
            i ? "," : "", i / 768, i % 768, 4 * i, 4 * i + 4);
    strcpy(at, "}");
    write_tensors("x", text, (size_t)TENSORS * 4);
    free(text);
    clock_gettime(CLOCK_MONOTONIC, &from);
    OK(try_open("x"));
    clock_gettime(CLOCK_MONOTONIC, &to);
    cr_assert_lt((double)(to.tv_sec - from.tv_sec), 5);
}

/* ---- checkpoints of every family ---- */

enum { FE = 3, FH = 64, FI = 32, FS = 48, LAYER = 3 };

static float bf16_value(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* To nearest even, by trying both neighbours. */
static uint16_t naive_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint16_t low = (uint16_t)(u >> 16), high = (uint16_t)(low + 1);
    double down = fabs((double)f - (double)bf16_value(low));
    double up = fabs((double)bf16_value(high) - (double)f);
    return down < up || (down == up && low % 2 == 0) ? low : high;
}

static float value(int tensor, int i) {
    return bf16_value(naive_bf16(moe_random_value((uint64_t)tensor + 77, (uint64_t)i)));
}

/* Tensors of a checkpoint in the making. */
static struct moert_tool_tensor list[64];
static int list_count;

static struct moert_tool_tensor *new_tensor(const char *dtype, size_t bytes,
                                            const int64_t *shape, int rank, const char *fmt,
                                            va_list ap) {
    struct moert_tool_tensor *t = &list[list_count++];
    char *name, *data = calloc(1, bytes + 1);
    cr_assert(list_count < 64 && data && vasprintf(&name, fmt, ap) > 0);
    *t = (struct moert_tool_tensor){
        .name = name, .dtype = dtype, .rank = rank, .data = data, .bytes = bytes};
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    return t;
}

/* A tensor of bytes as they are. Shapes end with 0. */
static void *put_raw(const char *dtype, int bits, const int64_t *shape, const char *fmt, ...) {
    va_list ap;
    int rank = 0;
    size_t n = 1;
    for (; shape[rank]; rank++)
        n *= (size_t)shape[rank];
    va_start(ap, fmt);
    struct moert_tool_tensor *t = new_tensor(dtype, n * (size_t)bits / 8, shape, rank, fmt, ap);
    va_end(ap);
    return (void *)t->data;
}
#define SHAPE(...) ((const int64_t[]){__VA_ARGS__, 0})

/* A tensor [64, 0]. */
static void new_empty(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    new_tensor("F32", 0, (const int64_t[]){64, 0}, 2, fmt, ap);
    va_end(ap);
}

static void drop_tensor(void) {
    list_count--;
    free((char *)list[list_count].name);
    free((char *)list[list_count].data);
}

static void drop_tensors(void) {
    while (list_count)
        drop_tensor();
}

/* A bf16 tensor whose element i is element map(i) of a logical tensor. */
static void put_mapped(int tensor, int (*map)(int i), const int64_t *shape, const char *name) {
    uint16_t *out = put_raw("BF16", 16, shape, "%s", name);
    size_t n = list[list_count - 1].bytes / 2;
    for (size_t i = 0; i < n; i++)
        out[i] = naive_bf16(value(tensor, map ? map((int)i) : (int)i));
}

static void put(int tensor, const int64_t *shape, const char *fmt, ...) {
    char name[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name, sizeof name, fmt, ap);
    va_end(ap);
    put_mapped(tensor, NULL, shape, name);
}

/* Logical tensors by number; an expert's four begin at EXPERT(e). */
enum { ROUTER = 1, BIAS, CORRECTION, SHARED, GATE = 10 };
#define EXPERT(e) (20 + 10 * (e)) /* gate, up, down, gate bias, up bias, down bias */

/* Fused forms hold logical numbers of all experts: element of expert e's tensor p. A map cannot
 * name a tensor, so these write directly. where: 0 gate, 1 up, 2 down. */
static float expert_value(int e, int part, int row, int col) {
    return value(EXPERT(e) + part, row * (part == 2 ? FI : FH) + col);
}

/* gate and up of all experts, [E][2I][H] or transposed, halves or in turns. */
static void put_gate_up(bool transposed, bool interleaved, const char *name) {
    uint16_t *out = put_raw(
        "BF16", 16, transposed ? SHAPE(FE, FH, 2 * FI) : SHAPE(FE, 2 * FI, FH), "%s", name);
    for (int e = 0; e < FE; e++)
        for (int r = 0; r < 2 * FI; r++)
            for (int c = 0; c < FH; c++) {
                int up = interleaved ? r % 2 : r / FI, row = interleaved ? r / 2 : r % FI;
                int at = transposed ? c * 2 * FI + r : r * FH + c;
                out[e * 2 * FI * FH + at] = naive_bf16(expert_value(e, up, row, c));
            }
}

/* up of all experts, [E][I][H], where there are no gates */
static void put_up(const char *name) {
    uint16_t *out = put_raw("BF16", 16, SHAPE(FE, FI, FH), "%s", name);
    for (int i = 0; i < FE * FI * FH; i++)
        out[i] = naive_bf16(expert_value(i / (FI * FH), 1, i / FH % FI, i % FH));
}

static void put_down(bool transposed, const char *name) {
    uint16_t *out =
        put_raw("BF16", 16, transposed ? SHAPE(FE, FI, FH) : SHAPE(FE, FH, FI), "%s", name);
    for (int e = 0; e < FE; e++)
        for (int r = 0; r < FH; r++)
            for (int c = 0; c < FI; c++)
                out[e * FI * FH + (transposed ? c * FH + r : r * FI + c)] =
                    naive_bf16(expert_value(e, 2, r, c));
}

static void put_fused_biases(const char *base) {
    uint16_t *up = put_raw("BF16", 16, SHAPE(FE, 2 * FI), "%sgate_up_proj_bias", base);
    uint16_t *down = put_raw("BF16", 16, SHAPE(FE, FH), "%sdown_proj_bias", base);
    for (int e = 0; e < FE; e++) {
        for (int r = 0; r < 2 * FI; r++)
            up[e * 2 * FI + r] = naive_bf16(value(EXPERT(e) + 3 + r % 2, r / 2));
        for (int r = 0; r < FH; r++)
            down[e * FH + r] = naive_bf16(value(EXPERT(e) + 5, r));
    }
}

static void put_experts(const char *base, const char *gate, const char *up, const char *down) {
    for (int e = 0; e < FE; e++) {
        if (gate)
            put(EXPERT(e), SHAPE(FI, FH), "%sexperts.%d.%s.weight", base, e, gate);
        put(EXPERT(e) + 1, SHAPE(FI, FH), "%sexperts.%d.%s.weight", base, e, up);
        put(EXPERT(e) + 2, SHAPE(FH, FI), "%sexperts.%d.%s.weight", base, e, down);
    }
}

static void put_shared(const char *base) {
    put(SHARED, SHAPE(FS, FH), "%sgate_proj.weight", base);
    put(SHARED + 1, SHAPE(FS, FH), "%sup_proj.weight", base);
    put(SHARED + 2, SHAPE(FH, FS), "%sdown_proj.weight", base);
}

static struct moe_plan_class family_class(void) {
    struct moe_plan_class c = small_class();
    c.hidden = FH;
    c.inter = FI;
    c.experts = c.slots_per_rank = FE;
    return c;
}

/* Record of tensors gate, up, down (and biases) from `first`, packed the plain way. */
static void naive_pack(const struct moe_plan_class *c, int first, int inter, bool bias,
                       int64_t w2, char *out) {
    bool gated = c->activation != MOE_ACT_RELU2;
    for (int i = 0; i < inter; i++)
        for (int part = gated ? 0 : 1; part < 2; part++) {
            int row = gated ? i / 8 * 16 + part * 8 + i % 8 : i;
            for (int h = 0; h < c->hidden; h++)
                ((uint16_t *)out)[row * c->hidden + h] =
                    naive_bf16(value(first + part, i * c->hidden + h));
            if (bias)
                ((float *)(out + c->b1_offset))[row] = value(first + 3 + part, i);
        }
    for (int i = 0; i < c->hidden * inter; i++)
        ((uint16_t *)(out + w2))[i] = naive_bf16(value(first + 2, i));
    for (int h = 0; bias && h < c->hidden; h++)
        ((float *)(out + c->b2_offset))[h] = value(first + 5, h);
}

static void expect_vector(const struct rt_matrix *m, int tensor, int n) {
    float row[256];
    cr_assert(m->data && m->rows == 1 && m->cols == n, "tensor %d", tensor);
    rt_row_fp32(m, 0, row);
    for (int i = 0; i < n; i++)
        cr_assert_eq(row[i], value(tensor, i), "tensor %d, element %d", tensor, i);
}

static void expect_source(const struct moe_plan_class *c, const struct rt_source *s) {
    float scratch[256], row[256];
    char *got = malloc((size_t)(c->slot_bytes + c->shared_bytes));
    char *want = malloc((size_t)(c->slot_bytes + c->shared_bytes));
    cr_assert(got && want);
    for (int e = 0; e < FE; e++) {
        memset(want, 0, (size_t)c->slot_bytes);
        rt_pack_expert(c, &s->experts[e], got, scratch);
        naive_pack(c, EXPERT(e), FI, c->has_bias, c->w2_offset, want);
        cr_assert(!memcmp(got, want, (size_t)c->slot_bytes), "expert %d", e);
    }
    if (c->shared_inter) {
        memset(want, 0, (size_t)c->shared_bytes);
        rt_pack_shared(c, &s->shared, got, scratch);
        naive_pack(c, SHARED, FS, false, c->shared_w2_offset, want);
        cr_assert(!memcmp(got, want, (size_t)c->shared_bytes), "shared expert");
    }
    for (int e = 0; e < FE; e++) {
        rt_row_fp32(&s->router, e, row);
        for (int h = 0; h < FH; h++)
            cr_assert_eq(row[h], value(ROUTER, e * FH + h), "router");
    }
    if (c->has_router_bias)
        expect_vector(&s->router_bias, BIAS, FE);
    if (c->has_correction_bias)
        expect_vector(&s->correction, CORRECTION, FE);
    if (c->shared_gate)
        expect_vector(&s->shared_gate, GATE, FH);
    free(got);
    free(want);
}

static moert_result load_list(struct moe_plan_class *c, struct rt_source *s,
                              struct rt_checkpoint **ck) {
    lay_out(c);
    OK(moert_tool_save(in_folder("model.safetensors"), list, list_count));
    OK(rt_checkpoint_open(folder, ck));
    memset(s, 0, sizeof *s);
    return rt_source_from_checkpoint(c, LAYER, *ck, s);
}

/* The listed tensors load into exactly the logical layer. */
static void expect_family(struct moe_plan_class c) {
    struct rt_source s;
    struct rt_checkpoint *ck;
    OK(load_list(&c, &s, &ck));
    expect_source(&c, &s);
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

static void refuse_family(struct moe_plan_class c, moert_result result, const char *text) {
    struct rt_source s;
    struct rt_checkpoint *ck;
    FAILS(load_list(&c, &s, &ck), result, text);
    free(s.experts);
    rt_checkpoint_close(ck);
}

static void put_deepseek(const char *base) {
    put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
    put(CORRECTION, SHAPE(FE), "%sgate.e_score_correction_bias", base);
    put_experts(base, "gate_proj", "up_proj", "down_proj");
    char shared[256];
    snprintf(shared, sizeof shared, "%sshared_experts.", base);
    put_shared(shared);
}

static struct moe_plan_class deepseek_class(void) {
    struct moe_plan_class c = family_class();
    c.has_correction_bias = 1;
    c.shared_inter = FS;
    return c;
}

Test(runtime, names_of_deepseek_under_every_prefix, .init = make_folder,
     .fini = remove_folder) {
    static const char *const prefix[] = {"",
                                         "model.",
                                         "language_model.",
                                         "language_model.model.",
                                         "model.language_model.",
                                         "backbone."};
    for (int i = 0; i < 6; i++) {
        char base[128];
        snprintf(base, sizeof base, "%slayers.3.mlp.", prefix[i]);
        put_deepseek(base);
        put(ROUTER, SHAPE(FE, FH), "%slayers.30.mlp.gate.weight", prefix[i]);
        put(ROUTER, SHAPE(FE, FH), "%slayers.3.self_attn.q_proj.weight", prefix[i]);
        expect_family(deepseek_class());
    }
}

Test(runtime, names_of_qwen_and_olmoe, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = family_class();
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.weight");
    put_experts("model.layers.3.mlp.", "gate_proj", "up_proj", "down_proj");
    expect_family(c);
    c.shared_inter = FS;
    c.shared_gate = 1;
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.weight");
    put(GATE, SHAPE(1, FH), "model.layers.3.mlp.shared_expert_gate.weight");
    put_experts("model.layers.3.mlp.", "gate_proj", "up_proj", "down_proj");
    put_shared("model.layers.3.mlp.shared_expert.");
    expect_family(c);
}

Test(runtime, names_of_mixtral_phimoe_and_minimax, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = family_class();
    static const char *const base = "model.layers.3.block_sparse_moe.";
    put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
    put_experts(base, "w1", "w3", "w2");
    expect_family(c);
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.router.weight");
    put_experts("model.layers.3.mlp.", "w1", "w3", "w2");
    expect_family(c);
    c.has_correction_bias = 1;
    put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
    put(CORRECTION, SHAPE(FE), "%se_score_correction_bias", base);
    put_experts(base, "w1", "w3", "w2");
    expect_family(c);
}

static void put_gpt_oss_router(void) {
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.router.weight");
    put(BIAS, SHAPE(FE), "model.layers.3.mlp.router.bias");
    put_fused_biases("model.layers.3.mlp.experts.");
}

static struct moe_plan_class gpt_oss_class(void) {
    struct moe_plan_class c = family_class();
    c.activation = MOE_ACT_SWIGLU_OAI;
    c.has_bias = c.has_router_bias = 1;
    return c;
}

Test(runtime, names_of_gpt_oss, .init = make_folder, .fini = remove_folder) {
    put_gpt_oss_router();
    put_gate_up(true, true, "model.layers.3.mlp.experts.gate_up_proj");
    put_down(true, "model.layers.3.mlp.experts.down_proj");
    expect_family(gpt_oss_class());
}

Test(runtime, names_of_llama4, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = family_class();
    static const char *const base = "language_model.model.layers.3.feed_forward.";
    char name[128];
    c.shared_inter = FS;
    put(ROUTER, SHAPE(FE, FH), "%srouter.weight", base);
    snprintf(name, sizeof name, "%sexperts.gate_up_proj", base);
    put_gate_up(true, false, name);
    snprintf(name, sizeof name, "%sexperts.down_proj", base);
    put_down(true, name);
    snprintf(name, sizeof name, "%sshared_expert.", base);
    put_shared(name);
    expect_family(c);
}

Test(runtime, names_of_transformers_5, .init = make_folder, .fini = remove_folder) {
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.weight");
    put_gate_up(false, false, "model.layers.3.mlp.experts.gate_up_proj");
    put_down(false, "model.layers.3.mlp.experts.down_proj");
    expect_family(family_class());
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.weight"); /* Qwen3-VL */
    put_gate_up(true, false, "model.layers.3.mlp.experts.gate_up_proj");
    put_down(true, "model.layers.3.mlp.experts.down_proj");
    expect_family(family_class());
}

Test(runtime, names_of_ernie_hunyuan_and_granite, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = deepseek_class();
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.weight");
    put(CORRECTION, SHAPE(1, FE), "model.layers.3.mlp.moe_statics.e_score_correction_bias");
    put_experts("model.layers.3.mlp.", "gate_proj", "up_proj", "down_proj");
    put_shared("model.layers.3.mlp.shared_experts.");
    expect_family(c);
    c.has_correction_bias = 0;
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.mlp.gate.wg.weight");
    put_experts("model.layers.3.mlp.", "gate_proj", "up_proj", "down_proj");
    put_shared("model.layers.3.mlp.shared_mlp.");
    expect_family(c);
    put(ROUTER, SHAPE(FE, FH), "model.layers.3.block_sparse_moe.router.layer.weight");
    put_gate_up(false, false, "model.layers.3.block_sparse_moe.input_linear.weight");
    put_down(false, "model.layers.3.block_sparse_moe.output_linear.weight");
    uint16_t *both =
        put_raw("BF16", 16, SHAPE(2 * FS, FH), "model.layers.3.shared_mlp.input_linear.weight");
    for (int i = 0; i < 2 * FS * FH; i++)
        both[i] = naive_bf16(value(SHARED + i / (FS * FH), i % (FS * FH)));
    put(SHARED + 2, SHAPE(FH, FS), "model.layers.3.shared_mlp.output_linear.weight");
    expect_family(c);
}

Test(runtime, names_without_gates, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = family_class();
    c.activation = MOE_ACT_RELU2;
    put(ROUTER, SHAPE(FE, FH), "layers.3.mlp.gate.weight");
    put_experts("layers.3.mlp.", NULL, "up_proj", "down_proj");
    expect_family(c);
}

/* Nemotron-H, as released and as transformers 5 holds it: [E][I][H], no gate rows. */
Test(runtime, names_of_nemotron, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = deepseek_class();
    static const char *const base = "backbone.layers.3.mixer.";
    c.activation = MOE_ACT_RELU2;
    for (int fused = 0; fused < 2; fused++) {
        put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
        put(CORRECTION, SHAPE(FE), "%sgate.e_score_correction_bias", base);
        put(SHARED + 1, SHAPE(FS, FH), "%sshared_experts.up_proj.weight", base);
        put(SHARED + 2, SHAPE(FH, FS), "%sshared_experts.down_proj.weight", base);
        if (!fused) {
            put_experts(base, NULL, "up_proj", "down_proj");
        } else {
            put_up("backbone.layers.3.mixer.experts.up_proj");
            put_down(false, "backbone.layers.3.mixer.experts.down_proj");
        }
        if (fused) { /* the plan's activation wants gates, the tensor has none */
            struct moe_plan_class gated = deepseek_class();
            refuse_family(gated, MOERT_UNSUPPORTED, "experts.up_proj holds no gates");
        }
        expect_family(c);
    }
    put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
    put_gate_up(false, false, "backbone.layers.3.mixer.experts.gate_up_proj");
    put_down(false, "backbone.layers.3.mixer.experts.down_proj");
    c.has_correction_bias = c.shared_inter = 0;
    refuse_family(c, MOERT_UNSUPPORTED, "experts.gate_up_proj holds gates");
    drop_tensors();
}

Test(runtime, what_has_no_place_is_refused, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = deepseek_class(), d;
    static const char *const base = "model.layers.3.mlp.";
    put_deepseek(base);
    d = c;
    d.has_correction_bias = 0;
    refuse_family(d, MOERT_INVALID, "gate.e_score_correction_bias, for which the plan");
    d = c;
    d.shared_inter = 0;
    refuse_family(d, MOERT_INVALID, "shared_experts.down_proj.weight, for which");
    d = c;
    d.experts = FE - 1;
    refuse_family(d, MOERT_INVALID, "gate.weight has shape [3, 64], the plan wants [2, 64]");
    d = c;
    d.inter = FI / 2;
    refuse_family(d, MOERT_INVALID, "gate_proj.weight has shape [32, 64]");
    d = c;
    d.shared_gate = 1;
    refuse_family(d, MOERT_NOT_FOUND, "shared_expert_gate.weight");
    d = c;
    d.has_router_bias = 1;
    refuse_family(d, MOERT_NOT_FOUND, "gate.bias");
    d = c;
    d.has_bias = 1;
    refuse_family(d, MOERT_NOT_FOUND, "experts.0.gate_proj.bias");
    put(EXPERT(0) + 3, SHAPE(FI), "%sexperts.0.gate_proj.bias", base);
    refuse_family(c, MOERT_INVALID, "experts.0.gate_proj.bias, for which");
    drop_tensor();
    put(EXPERT(0), SHAPE(FI, FH), "%sexperts.3.gate_proj.weight", base);
    refuse_family(c, MOERT_INVALID, "experts.3.gate_proj.weight, for which");
    drop_tensor();
    put_raw("F32", 32, SHAPE(1), "%sexperts.0.gate_proj.input_scale", base);
    new_empty("%sshared_experts.gate_proj.bias", base);
    expect_family(c);
    put_raw("I32", 32, SHAPE(FE, FH), "%sgate.weight", base);
    refuse_family(c, MOERT_UNSUPPORTED, "type I32");
    drop_tensors();
    put(ROUTER, SHAPE(FE, FH), "%sgate.weight", base);
    put(CORRECTION, SHAPE(FE), "%sgate.e_score_correction_bias", base);
    refuse_family(c, MOERT_NOT_FOUND, "no experts behind model.layers.3.mlp.");
    drop_tensors();
    put(ROUTER, SHAPE(FE, FH), "model.layers.4.mlp.gate.weight");
    refuse_family(c, MOERT_NOT_FOUND, "no router in the checkpoint: looked for layers.3.");
    drop_tensors();
}

/* ---- quantised weights ---- */

static double naive_e4m3(uint8_t b) {
    int exponent = b >> 3 & 15, mantissa = b & 7;
    double v = exponent ? ldexp(1 + mantissa / 8.0, exponent - 7) : ldexp(mantissa / 8.0, -6);
    return b & 0x80 ? -v : v;
}

enum { QH = 256, QI = 160 };

static struct moe_plan_class fp8_class(void) {
    struct moe_plan_class c = family_class();
    c.hidden = QH;
    c.inter = QI;
    return c;
}

/* An fp8 weight [rows][cols] with one scale per block (0: one for all). */
static void put_fp8(int rows, int cols, int block, const char *name, const char *suffix) {
    uint8_t *w = put_raw("F8_E4M3", 8, SHAPE(rows, cols), "model.layers.3.mlp.%s", name);
    for (int i = 0; i < rows * cols; i++)
        w[i] = (uint8_t)(moe_hash((uint64_t)i + (uint64_t)list_count) & 0x7f) % 0x7f |
               (i % 3 ? 0x80 : 0);
    int n = block ? (rows + block - 1) / block : 1, m = block ? (cols + block - 1) / block : 1;
    float *s = put_raw("F32", 32, block ? SHAPE(n, m) : SHAPE(1), "model.layers.3.mlp.%s%s",
                       name, suffix);
    for (int i = 0; i < n * m; i++)
        s[i] = 0.01f + 0.003f * (float)i;
}

/* Element of tensor number t of the list, whose scales come next in it. */
static uint16_t dequantised(int t, int row, int col, int block) {
    const struct moert_tool_tensor *w = &list[t], *s = &list[t + 1];
    int64_t cols = w->shape[1];
    int64_t at = block ? row / block * s->shape[1] + col / block : 0;
    return naive_bf16((float)naive_e4m3(((const uint8_t *)w->data)[row * cols + col]) *
                      ((const float *)s->data)[at]);
}

static void expect_fp8(int block, const char *suffix) {
    struct moe_plan_class c = fp8_class();
    struct rt_source s;
    struct rt_checkpoint *ck;
    float scratch[QH];
    uint16_t row[QH];
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    for (int e = 0; e < FE; e++) {
        char name[64];
        snprintf(name, sizeof name, "experts.%d.gate_proj.weight", e);
        put_fp8(QI, QH, block, name, suffix);
        snprintf(name, sizeof name, "experts.%d.up_proj.weight", e);
        put_fp8(QI, QH, block, name, suffix);
        snprintf(name, sizeof name, "experts.%d.down_proj.weight", e);
        put_fp8(QH, QI, block, name, suffix);
    }
    OK(load_list(&c, &s, &ck));
    for (int e = 0; e < FE; e++) {
        const struct rt_matrix *m[] = {&s.experts[e].gate, &s.experts[e].up,
                                       &s.experts[e].down};
        for (int p = 0; p < 3; p++)
            for (int r = 0; r < m[p]->rows; r++) {
                rt_row_bf16(m[p], r, row, scratch);
                for (int i = 0; i < m[p]->cols; i++)
                    cr_assert_eq(row[i], dequantised(1 + 6 * e + 2 * p, r, i, block),
                                 "expert %d part %d [%d][%d]", e, p, r, i);
            }
    }
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

Test(runtime, fp8_weights_are_multiplied_out, .init = make_folder, .fini = remove_folder) {
    expect_fp8(128, "_scale_inv");
    expect_fp8(32, "_scale_inv");
    expect_fp8(0, "_scale");
}

/* ---- fp8 records ---- */

static struct moe_plan_class fp8_record_class(bool gated, int shared) {
    struct moe_plan_class c = fp8_class();
    c.record_format = MOE_FORMAT_FP8_BLOCK;
    c.pack_version = MOE_PACK_FP8_VERSION;
    c.activation = gated ? MOE_ACT_SWIGLU : MOE_ACT_RELU2;
    c.shared_inter = shared;
    return c;
}

/* One weight of a record, whose e4m3 and scales are those of tensor t of the list and the one behind
 * it. place: of a row in the packed order; scales: the first, `stride` further a block of rows. */
static void expect_as_it_is(const char *weight, const char *scales, int stride, int t,
                            int block, int (*place)(int row)) {
    const struct moert_tool_tensor *w = &list[t], *s = &list[t + 1];
    int64_t rows = w->shape[0], cols = w->shape[1];
    for (int r = 0; r < rows; r++)
        cr_assert(
            !memcmp(weight + place(r) * cols, (const char *)w->data + r * cols, (size_t)cols),
            "%s, row %d", w->name, r);
    for (int r = 0; r < (rows + 127) / 128; r++)
        for (int c = 0; c < (cols + 127) / 128; c++) {
            float want = ((const float *)s->data)[block ? r * s->shape[1] + c : 0], got;
            memcpy(&got, scales + 4 * (r * stride + c), 4);
            cr_assert_eq(got, want, "%s: scale [%d][%d] is %g, not %g", w->name, r, c, got,
                         want);
        }
}

static int gate_place(int row) {
    return row / 8 * 16 + row % 8;
}
static int up_place(int row) {
    return row / 8 * 16 + 8 + row % 8;
}
static int same_place(int row) {
    return row;
}

/* t: tensor of the list that the expert begins with. */
static void expect_fp8_expert(const char *w1, const char *w2, const char *s1, const char *s2,
                              int t, int inter, bool gated, int block) {
    int by_h = (QH + 127) / 128, stride = gated ? 2 * by_h : by_h;
    if (gated) {
        expect_as_it_is(w1, s1, stride, t, block, gate_place);
        t += 2;
    }
    expect_as_it_is(w1, s1 + 4 * (stride - by_h), stride, t, block,
                    gated ? up_place : same_place);
    expect_as_it_is(w2, s2, (inter + 127) / 128, t + 2, block, same_place);
}

static void put_fp8_expert(const char *base, int inter, bool gated, int block,
                           const char *suffix) {
    char name[160];
    for (int part = gated ? 0 : 1; part < 3; part++) {
        static const char *const parts[] = {"gate_proj", "up_proj", "down_proj"};
        snprintf(name, sizeof name, "%s%s.weight", base, parts[part]);
        put_fp8(part == 2 ? QH : inter, part == 2 ? inter : QH, block, name, suffix);
    }
}

/* A layer as DeepSeek-V3 is released (block 128), or with a scale per matrix (0). */
static void expect_fp8_records(bool gated, int shared, int block, const char *suffix) {
    struct moe_plan_class c = fp8_record_class(gated, shared);
    struct rt_source s;
    struct rt_checkpoint *ck;
    float scratch[QH];
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    for (int e = 0; e < FE; e++) {
        char base[64];
        snprintf(base, sizeof base, "experts.%d.", e);
        put_fp8_expert(base, QI, gated, block, suffix);
    }
    if (shared)
        put_fp8_expert("shared_experts.", shared, gated, block, suffix);
    OK(load_list(&c, &s, &ck));
    int each = gated ? 6 : 4;
    char *got = malloc((size_t)(c.slot_bytes + c.shared_bytes));
    cr_assert(got);
    for (int e = 0; e < FE; e++) {
        rt_pack_expert(&c, &s.experts[e], got, scratch);
        expect_fp8_expert(got, got + c.w2_offset, got + c.s1_offset, got + c.s2_offset,
                          1 + each * e, QI, gated, block);
    }
    if (shared) {
        rt_pack_shared(&c, &s.shared, got, scratch);
        expect_fp8_expert(got, got + c.shared_w2_offset, got + c.shared_s1_offset,
                          got + c.shared_s2_offset, 1 + each * FE, shared, gated, block);
    }
    free(got);
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

Test(runtime, fp8_checkpoints_are_taken_byte_for_byte, .init = make_folder,
     .fini = remove_folder) {
    expect_fp8_records(true, 144, 128, "_scale_inv");
    expect_fp8_records(true, 0, 0, "_scale");
    expect_fp8_records(false, 16, 128, "_scale_inv");
    expect_fp8_records(false, 272, 0, "_scale");
}

/* The e4m3 number nearest to v, the even one of two, by trying all. */
static uint8_t nearest_e4m3(float v) {
    int best = 0;
    for (int b = 1; b < 255; b++) {
        double now = fabs(naive_e4m3((uint8_t)b) - (double)v);
        double then = fabs(naive_e4m3((uint8_t)best) - (double)v);
        if (b != 0x7f && b != 0x80 && (now < then || (now == then && best % 2)))
            best = b;
    }
    return (uint8_t)best;
}

/* Numbers of every size that e4m3 has, its ties and what lies beyond among them. */
static float awkward(int i) {
    float v = ldexpf(moe_random_value(3, (uint64_t)i), (int)(moe_hash((uint64_t)i) % 24) - 18);
    return i % 5 ? v : ldexpf((float)(i % 37), -13);
}

Test(runtime, other_checkpoints_are_quantised_block_by_block) {
    struct moe_plan_class c = fp8_record_class(false, 0);
    float up[QI * QH], down[QH * QI] = {0}, scratch[QH];
    struct rt_expert e = {.up = {(unsigned char *)up, RT_F32, QI, QH, QH, 1},
                          .down = {(unsigned char *)down, RT_F32, QH, QI, QI, 1}};
    lay_out(&c);
    for (int i = 0; i < QI * QH; i++)
        up[i] = i / QH >= 128 && i % QH >= 128 ? 0 : awkward(i);
    down[3 * QI + 130] = NAN;
    char *got = malloc((size_t)c.slot_bytes);
    cr_assert(got);
    rt_pack_expert(&c, &e, got, scratch);
    const float *s1 = (const float *)(got + c.s1_offset),
                *s2 = (const float *)(got + c.s2_offset);
    for (int b = 0; b < 4; b++) {
        float largest = 0;
        for (int i = 0; i < QI * QH; i++)
            if (i / QH / 128 == b / 2 && i % QH / 128 == b % 2)
                largest = fmaxf(largest, fabsf(up[i]));
        cr_assert_eq(s1[b], b == 3 ? 1e-30f : largest / 448, "scale %d is %g", b, s1[b]);
    }
    for (int i = 0; i < QI * QH; i++) {
        float v = up[i] / s1[i / QH / 128 * 2 + i % QH / 128];
        uint8_t want = nearest_e4m3(v), is = (uint8_t)got[i];
        cr_assert(is == want || (is & 0x7f) + (want & 0x7f) == 0,
                  "[%d][%d]: %02x of %g, not %02x", i / QH, i % QH, is, v, want);
    }
    cr_expect(s2[0] == 1e-30f && isnan(s2[1]) && s2[2] == 1e-30f && s2[3] == 1e-30f,
              "a NaN is in its block's scale");
    free(got);
}

Test(runtime, scales_that_fp8_records_have_no_place_for_are_refused, .init = make_folder,
     .fini = remove_folder) {
    struct moe_plan_class c = fp8_record_class(false, 0);
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    for (int e = 0; e < FE; e++) {
        char base[64];
        snprintf(base, sizeof base, "experts.%d.", e);
        put_fp8_expert(base, QI, false, e == 1 ? 64 : 128, "_scale_inv");
    }
    refuse_family(
        c, MOERT_UNSUPPORTED,
        "routed expert 1: its scales are for blocks of 64 x 64, the plan's are for 128 x "
        "128");
    c.record_format = MOE_FORMAT_BF16;
    c.pack_version = MOE_PACK_VERSION;
    struct rt_source s;
    struct rt_checkpoint *ck;
    OK(load_list(&c, &s, &ck));
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

/* Fused [E][rows][cols] fp8 with scales [E][row blocks][column blocks]. */
static void put_fused_fp8(int rows, int cols, int block, const char *name) {
    uint8_t *w = put_raw("F8_E4M3", 8, SHAPE(FE, rows, cols), "model.layers.3.mlp.%s", name);
    int n = (rows + block - 1) / block, m = (cols + block - 1) / block;
    float *s = put_raw("F32", 32, SHAPE(FE, n, m), "model.layers.3.mlp.%s_scale_inv", name);
    for (int i = 0; i < FE * rows * cols; i++)
        w[i] = (uint8_t)(moe_hash((uint64_t)i) % 0x7f);
    for (int i = 0; i < FE * n * m; i++)
        s[i] = 0.01f + 0.003f * (float)i;
}

Test(runtime, fused_fp8_weights, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = fp8_class();
    struct rt_source s;
    struct rt_checkpoint *ck;
    float scratch[QH];
    uint16_t row[QH];
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    put_fused_fp8(2 * QI, QH, 32, "experts.gate_up_proj");
    put_fused_fp8(QH, QI, 32, "experts.down_proj");
    OK(load_list(&c, &s, &ck));
    for (int e = 0; e < FE; e++)
        for (int r = 0; r < 2 * QI; r++) {
            const uint8_t *w = list[1].data;
            const float *scale = list[2].data;
            rt_row_bf16(r < QI ? &s.experts[e].gate : &s.experts[e].up, r % QI, row, scratch);
            for (int i = 0; i < QH; i++) {
                double v = naive_e4m3(w[(e * 2 * QI + r) * QH + i]);
                float f = scale[(e * (2 * QI / 32) + r / 32) * (QH / 32) + i / 32];
                cr_assert_eq(row[i], naive_bf16((float)v * f), "expert %d [%d][%d]", e, r, i);
            }
        }
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    put_fused_fp8(2 * QI, QH, 128, "experts.gate_up_proj"); /* a block of gate and up rows */
    put_fused_fp8(QH, QI, 128, "experts.down_proj");
    refuse_family(c, MOERT_INVALID, "gate_up_proj_scale_inv do not divide");
    drop_tensors();
}

/* One scale for all of an expert's gates and ups, as fused checkpoints may have it. */
Test(runtime, fused_fp8_checkpoints_are_taken_byte_for_byte, .init = make_folder,
     .fini = remove_folder) {
    struct moe_plan_class c = fp8_record_class(true, 0);
    struct rt_source s;
    struct rt_checkpoint *ck;
    float scratch[QH];
    enum { WHOLE = 512, S1 = 2 * 2 * 2, S2 = 2 * 2 };
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    put_fused_fp8(2 * QI, QH, WHOLE, "experts.gate_up_proj");
    put_fused_fp8(QH, QI, WHOLE, "experts.down_proj");
    OK(load_list(&c, &s, &ck));
    char *got = malloc((size_t)c.slot_bytes);
    cr_assert(got);
    for (int e = 0; e < FE; e++) {
        const char *up = (const char *)list[1].data + e * 2 * QI * QH;
        const char *down = (const char *)list[3].data + e * QI * QH;
        rt_pack_expert(&c, &s.experts[e], got, scratch);
        for (int r = 0; r < QI; r++) {
            cr_assert(!memcmp(got + gate_place(r) * QH, up + r * QH, QH), "gate %d", r);
            cr_assert(!memcmp(got + up_place(r) * QH, up + (QI + r) * QH, QH), "up %d", r);
        }
        cr_assert(!memcmp(got + c.w2_offset, down, QH * QI));
        for (int i = 0; i < S1; i++)
            cr_assert_eq(((float *)(got + c.s1_offset))[i], ((const float *)list[2].data)[e]);
        for (int i = 0; i < S2; i++)
            cr_assert_eq(((float *)(got + c.s2_offset))[i], ((const float *)list[4].data)[e]);
    }
    free(got);
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

Test(runtime, fp8_without_scales_is_refused, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = fp8_class();
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    put_fp8(QH, QI, 128, "experts.0.down_proj.weight", "_x");
    put_fp8(QI, QH, 128, "experts.0.gate_proj.weight", "_x");
    refuse_family(c, MOERT_NOT_FOUND, "gate_proj.weight_scale");
    drop_tensors();
    put_raw("BF16", 16, SHAPE(FE, QH), "model.layers.3.mlp.gate.weight");
    put_fp8(QH, QI, 128, "experts.0.down_proj.weight", "_scale_inv");
    put_fp8(QI, QH, 0, "experts.0.gate_proj.weight", "_x");
    put_raw("F32", 32, SHAPE(7, 9), "model.layers.3.mlp.experts.0.gate_proj.weight_scale_inv");
    refuse_family(c, MOERT_INVALID, "do not divide");
    drop_tensors();
}

static uint16_t naive_mxfp4(const uint8_t *blocks, const uint8_t *scales, int64_t element) {
    static const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    int code = blocks[element / 2] >> (element % 2 * 4) & 15;
    double v = ldexp(values[code & 7], scales[element / 32] - 127);
    return naive_bf16((float)(code & 8 ? -v : v));
}

Test(runtime, mxfp4_weights_are_multiplied_out, .init = make_folder, .fini = remove_folder) {
    struct moe_plan_class c = gpt_oss_class();
    struct rt_source s;
    struct rt_checkpoint *ck;
    float scratch[FH];
    uint16_t row[FH];
    static const char *const base = "model.layers.3.mlp.experts.";
    put_gpt_oss_router();
    uint8_t *up =
        put_raw("U8", 8, SHAPE(FE, 2 * FI, FH / 32, 16), "%sgate_up_proj_blocks", base);
    uint8_t *us = put_raw("U8", 8, SHAPE(FE, 2 * FI, FH / 32), "%sgate_up_proj_scales", base);
    uint8_t *down = put_raw("U8", 8, SHAPE(FE, FH, FI / 32, 16), "%sdown_proj_blocks", base);
    uint8_t *ds = put_raw("U8", 8, SHAPE(FE, FH, FI / 32), "%sdown_proj_scales", base);
    for (int i = 0; i < FE * FI * FH; i++)
        up[i] = (uint8_t)moe_hash((uint64_t)i);
    for (int i = 0; i < FE * FI * FH / 16; i++)
        us[i] = (uint8_t)(120 + moe_hash((uint64_t)i + 9) % 12);
    for (int i = 0; i < FE * FI * FH / 2; i++)
        down[i] = (uint8_t)moe_hash((uint64_t)i + 99);
    for (int i = 0; i < FE * FI * FH / 32; i++)
        ds[i] = (uint8_t)(118 + moe_hash((uint64_t)i + 999) % 14);
    OK(load_list(&c, &s, &ck));
    for (int e = 0; e < FE; e++) {
        for (int r = 0; r < 2 * FI; r++) { /* gate and up in turns */
            rt_row_bf16(r % 2 ? &s.experts[e].up : &s.experts[e].gate, r / 2, row, scratch);
            for (int i = 0; i < FH; i++)
                cr_assert_eq(row[i], naive_mxfp4(up, us, ((int64_t)e * 2 * FI + r) * FH + i));
        }
        for (int r = 0; r < FH; r++) {
            rt_row_bf16(&s.experts[e].down, r, row, scratch);
            for (int i = 0; i < FI; i++)
                cr_assert_eq(row[i], naive_mxfp4(down, ds, ((int64_t)e * FH + r) * FI + i));
        }
        for (int i = 0; i < FI; i++) {
            float bias[FI];
            rt_row_fp32(&s.experts[e].up_bias, 0, bias);
            cr_assert_eq(bias[i], value(EXPERT(e) + 4, i));
        }
    }
    free(s.experts);
    rt_checkpoint_close(ck);
    drop_tensors();
}

Test(runtime, fp32_and_fp16_round_to_nearest_even) {
    static const struct {
        float in;
        uint16_t out;
    } cases[] = {{1.0f, 0x3f80},      {1.00390625f, 0x3f80},  {1.01171875f, 0x3f82},
                 {1.003907f, 0x3f81}, {-1.00390625f, 0xbf80}, {3.4e38f, 0x7f80},
                 {INFINITY, 0x7f80},  {1e-40f, 0x0001},       {0x1p-134f, 0x0000},
                 {-0.0f, 0x8000}};
    float scratch[1];
    uint16_t out;
    struct rt_matrix m = {
        .dtype = RT_F32, .rows = 1, .cols = 1, .row_stride = 1, .col_stride = 1};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        m.data = (const unsigned char *)&cases[i].in;
        rt_row_bf16(&m, 0, &out, scratch);
        cr_assert_eq(out, cases[i].out, "%g: %04x", (double)cases[i].in, out);
    }
    float nan = NAN;
    m.data = (const unsigned char *)&nan;
    rt_row_bf16(&m, 0, &out, scratch);
    cr_assert((out & 0x7f80) == 0x7f80 && out & 0x7f);
    m.dtype = RT_F8_E4M3;
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        m.data = &byte;
        rt_row_fp32(&m, 0, scratch);
        cr_assert(b % 128 == 127 ? isnan(scratch[0]) : scratch[0] == (float)naive_e4m3(byte));
    }
    static const uint16_t half[] = {0x3c00, 0x0001, 0x03ff, 0x7bff, 0xfc00, 0xc000};
    static const float want[] = {1, 0x1p-24f, 1023 * 0x1p-24f, 65504, -INFINITY, -2};
    m.dtype = RT_F16;
    for (int i = 0; i < 6; i++) {
        m.data = (const unsigned char *)&half[i];
        rt_row_fp32(&m, 0, scratch);
        cr_assert_eq(scratch[0], want[i]);
    }
}

/* ---- the launch path, with the recorder as the bundle's source ---- */

struct call { /* as the recorder writes it */
    int name, grid[3], tokens, flags, threads, first_idx;
};

static int num_log;
static char last_log[1024];
static void keep_log(moert_log_level level, const char *text, void *user) {
    cr_assert(level == MOERT_LOG_INFO && user == &num_log);
    num_log++;
    snprintf(last_log, sizeof last_log, "%s", text);
}

static moert_result host_context(moert_bundle *b, moert_context **out) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    cfg.device = MOERT_HOST;
    cfg.host_threads = 2;
    cfg.log = keep_log;
    cfg.log_user = &num_log;
    num_log = 0;
    return moert_context_create(b, &cfg, out);
}

struct rig {
    moert_bundle *b;
    moert_context *c;
    moert_layer *l;
    moert_io io;
    float x[64 * H] __attribute__((aligned(16))), out[64 * H], logits[64 * E], weight[64 * K];
    int32_t idx[64 * K];
};
static struct rig rig __attribute__((aligned(64)));

static void make_rig(struct moe_plan_class c) {
    rig.b = open_image(c);
    OK(host_context(rig.b, &rig.c));
    OK(moert_layer_create(rig.c, 3, &rig.l));
    rig.io = (moert_io)MOERT_IO_INIT;
    rig.io.num_tokens = 5;
    rig.io.x = rig.x;
    rig.io.out = rig.out;
    rig.io.topk_idx = rig.idx;
    rig.io.topk_weight = rig.weight;
    for (int i = 0; i < 64 * K; i++)
        rig.idx[i] = i;
}

static void drop_rig(void) {
    moert_layer_destroy(rig.l);
    moert_context_destroy(rig.c);
    moert_bundle_close(rig.b);
}

/* Takes the calls since the last time: their names as a string, the first in *first. */
static const char *calls(struct call *first) {
    static char names[128];
    int log[SYNC_BYTES / 4];
    OK(moert_tool_workspace(rig.c, MOE_WS_SYNC, log, sizeof log));
    for (int i = 0; i < log[0]; i++)
        names[i] = (char)log[8 + 8 * i];
    names[log[0]] = 0;
    memcpy(first, log + 8, 16 * sizeof *first);
    OK(moert_tool_set(rig.c, rig.c->ws[MOE_WS_SYNC], 0, 4));
    return names;
}

static void expect_grid(const struct call *c, int x, int y, int z) {
    cr_assert(c->grid[0] == x && c->grid[1] == y && c->grid[2] == z, "%c: %d %d %d", c->name,
              c->grid[0], c->grid[1], c->grid[2]);
}

Test(runtime, forward_walks_the_launch_list, .init = make_folder, .fini = remove_folder) {
    struct call c[16];
    make_rig(small_class());
    FAILS(moert_forward(rig.l, &rig.io, NULL), MOERT_INVALID, "no weights yet");
    OK(moert_layer_random(rig.l, 1));
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "adeg");
    expect_grid(&c[0], 3, 3, 1); /* ceil(5/2) */
    expect_grid(&c[1], 4, 1, 1); /* ceil(5*2/3) */
    expect_grid(&c[2], 4, 1, 1); /* the host's persistent blocks */
    expect_grid(&c[3], 1, 1, 2);
    cr_assert(c[0].tokens == 5 && c[0].flags == (MOE_ROUTER_FP32 | MOE_COMBINE) &&
              c[0].threads == 2);
    rig.io.num_tokens = 2;
    rig.io.x_dtype = rig.io.out_dtype = MOERT_FP32;
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "acdef"); /* the small bucket, and the conversion */
    expect_grid(&c[3], 3, 1, 1);
    cr_assert_eq(c[0].flags, MOE_ROUTER_FP32 | MOE_X_FP32 | MOE_OUT_FP32 | MOE_COMBINE);
    rig.io.num_tokens = 0;
    rig.io.x = NULL;
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "");
    drop_rig();
}

Test(runtime, long_batches_are_cut_into_even_chunks, .init = make_folder,
     .fini = remove_folder) {
    struct call c[16];
    make_rig(small_class());
    OK(moert_layer_random(rig.l, 1));
    rig.io.num_tokens = 19;
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "adegadegadeg");
    cr_assert(c[0].tokens == 6 && c[4].tokens == 6 && c[8].tokens == 7);
    cr_assert(c[0].first_idx == 0 && c[4].first_idx == 6 * K && c[8].first_idx == 12 * K);
    for (int i = 0; i < 64 * E; i++)
        memcpy(&rig.logits[i], &i, sizeof i);
    rig.io.logits = rig.logits;
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "bdegbdegbdeg");
    cr_assert(c[0].first_idx == 0 && c[4].first_idx == 6 * E && c[8].first_idx == 12 * E,
              "the caller's logits go with their tokens");
    FAILS(moert_route(rig.l, &rig.io, NULL), MOERT_INVALID, "at most 8");
    drop_rig();
}

Test(runtime, steps_alone_and_the_callers_logits, .init = make_folder, .fini = remove_folder) {
    struct call c[16];
    make_rig(small_class());
    OK(moert_layer_random(rig.l, 1));
    OK(moert_route(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "a");
    OK(moert_experts(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "de");
    OK(moert_combine(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "g");
    cr_assert(!(c[0].flags & MOE_COMBINE));
    OK(moert_experts_combine(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "deg");
    cr_assert(c[1].flags & MOE_COMBINE);
    OK(moert_tool_stage(rig.l, &rig.io, MOE_STAGE_PREPARE, NULL));
    cr_assert_str_eq(calls(c), "d");
    FAILS(moert_tool_stage(rig.l, &rig.io, MOE_STAGE_FILL, NULL), MOERT_INVALID, "stage");
    rig.io.logits = rig.logits;
    rig.io.logits_dtype = MOERT_BF16;
    OK(moert_forward(rig.l, &rig.io, NULL));
    cr_assert_str_eq(calls(c), "bdeg");
    expect_grid(&c[0], 5, 1, 1);
    cr_assert_eq(c[0].flags, MOE_ROUTER_FP32 | MOE_LOGITS_BF16 | MOE_COMBINE);
    rig.io.x = NULL; /* routing from logits reads no x */
    OK(moert_route(rig.l, &rig.io, NULL));
    FAILS(moert_forward(rig.l, &rig.io, NULL), MOERT_INVALID, "x is NULL");
    drop_rig();
}

Test(runtime, wrong_arguments_of_forward, .init = make_folder, .fini = remove_folder) {
    make_rig(small_class());
    OK(moert_layer_random(rig.l, 1));
#define WRONG(change, text) \
    do { \
        moert_io io = rig.io; \
        change; \
        FAILS(moert_forward(rig.l, &io, NULL), MOERT_INVALID, text); \
    } while (0)
    WRONG(io.num_tokens = -1, "num_tokens is -1");
    WRONG(io.x = NULL, "x is NULL");
    WRONG(io.x = (char *)io.x + 2, "x is not aligned");
    WRONG(io.out = NULL, "out is NULL");
    WRONG(io.out = (char *)io.out + 8, "out is not aligned");
    WRONG(io.topk_idx = NULL, "topk_idx is NULL");
    WRONG(io.topk_weight = NULL, "topk_weight is NULL");
    WRONG(io.logits = (char *)rig.logits + 2, "logits is not aligned");
    WRONG(io.x_dtype = (moert_dtype)2, "dtype");
    WRONG(io.size = 0, "_INIT");
    FAILS(moert_forward(NULL, &rig.io, NULL), MOERT_INVALID, "layer");
    FAILS(moert_forward(rig.l, NULL, NULL), MOERT_INVALID, "NULL");
    drop_rig();
}

Test(runtime, contexts_say_what_is_wrong, .init = make_folder, .fini = remove_folder) {
    moert_bundle *b = open_image(small_class());
    moert_context *c;
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    static char workspace[MOE_WS_COUNT * SYNC_BYTES] __attribute__((aligned(256)));
    FAILS(moert_context_create(b, NULL, &c), MOERT_INVALID, "NULL");
    cfg.device = (moert_device)7;
    FAILS(moert_context_create(b, &cfg, &c), MOERT_INVALID, "device");
    cfg.device = MOERT_HOST;
    cfg.host_threads = -1;
    FAILS(moert_context_create(b, &cfg, &c), MOERT_INVALID, "host_threads");
    cfg.host_threads = 1;
    cfg.workspace = workspace;
    cfg.workspace_bytes = sizeof workspace - 1;
    FAILS(moert_context_create(b, &cfg, &c), MOERT_INVALID, "at least");
    cfg.workspace = workspace + 8;
    cfg.workspace_bytes = sizeof workspace;
    FAILS(moert_context_create(b, &cfg, &c), MOERT_INVALID, "aligned");
    cfg.workspace = workspace;
    OK(moert_context_create(b, &cfg, &c));
    cr_assert_eq(c->ws[0], workspace);
    moert_layer *l;
    FAILS(moert_layer_create(c, 4, &l), MOERT_NOT_FOUND, "no layer 4");
    moert_context_destroy(c);
    moert_context_destroy(NULL);
    moert_bundle_close(b);
    struct moe_plan_class two = small_class();
    two.ranks = 2;
    two.slots_per_rank = (E + 1) / 2 + 1;
    struct image *m = make_image(two);
    m->tables[4] = -1;
    for (int i = 0; i < 2; i++) {
        m->layers[i].expert_of_slot = 0;          /* 6 slots: 0 1 2 3 -1 and layer 7's first */
        m->layers[i].share_of_slot = 2 * (E + 1); /* theirs */
    }
    m->tables[5] = -1;
    m->tables[2 * (E + 1) + 5] = 0;
    m->pins[0].expert = 1;
    m->forbidden[0] = (struct moe_plan_forbidden){3, 0, 1, 0};
    write_manifest(m, recorder);
    free(m);
    OK(moert_bundle_open(folder, &b));
    FAILS(host_context(b, &c), MOERT_INVALID, "2 ranks: moert_context_config needs a world");
    moert_bundle_close(b);
}

Test(runtime, without_the_target_or_a_gpu, .init = make_folder, .fini = remove_folder) {
    struct image *m = make_image(small_class());
    moert_bundle *b;
    moert_context *c;
    m->targets[0].target = MOE_TARGET_SM_90A;
    for (int i = 0; i < 8; i++)
        m->kernels[i].target = MOE_TARGET_SM_90A;
    write_manifest(m, recorder);
    free(m);
    OK(moert_bundle_open(folder, &b));
    FAILS(host_context(b, &c), MOERT_UNSUPPORTED, "needs target host, the bundle has sm_90a");
    moert_bundle_close(b);
    enum moe_target t[2];
    cr_assert(rt_cuda_targets(9, 0, t) == 1 && t[0] == MOE_TARGET_SM_90A);
    cr_assert(rt_cuda_targets(10, 3, t) == 1 && t[0] == MOE_TARGET_SM_103A);
    cr_assert(rt_cuda_targets(8, 9, t) == 2 && t[0] == MOE_TARGET_SM_89 &&
              t[1] == MOE_TARGET_SM_80);
    cr_assert(rt_cuda_targets(8, 6, t) == 1 && t[0] == MOE_TARGET_SM_80);
    cr_assert(rt_cuda_targets(7, 5, t) == 0 && rt_cuda_targets(9, 1, t) == 0);
}

/* ---- the host's compiler and the cache ---- */

static moert_result open_and_close(void) {
    moert_bundle *b;
    moert_context *c;
    OK(moert_bundle_open(folder, &b));
    moert_result r = host_context(b, &c);
    if (r == MOERT_OK)
        moert_context_destroy(c);
    moert_bundle_close(b);
    return r;
}

/* The one entry of the cache, by its name of 64 digits. */
static const char *cache_entry(void) {
    static char name[512];
    char command[256];
    snprintf(command, sizeof command, "find %s/moec -type f -name '%s'", folder,
             "[0-9a-f][0-9a-f][0-9a-f]*");
    FILE *p = popen(command, "r");
    cr_assert(p && fgets(name, sizeof name, p));
    pclose(p);
    name[strcspn(name, "\n")] = 0;
    return name;
}

Test(runtime, host_code_is_compiled_once, .init = make_folder, .fini = remove_folder) {
    moert_bundle_close(open_image(small_class()));
    OK(open_and_close());
    cr_assert_eq(num_log, 2, "%d", num_log); /* "compiling", "loaded" */
    OK(open_and_close());
    cr_assert_eq(num_log, 1);
    setenv("MOERT_CXXFLAGS", "-g0 -DOTHER", 1);
    OK(open_and_close());
    cr_assert_eq(num_log, 2);
    struct stat st;
    cr_assert(!stat(in_folder("moec"), &st) && (st.st_mode & 0777) == 0700);
}

Test(runtime, damaged_cache_entries_are_made_again, .init = make_folder,
     .fini = remove_folder) {
    static char data[1 << 20];
    moert_bundle_close(open_image(small_class()));
    OK(open_and_close());
    const char *path = cache_entry();
    size_t n = read_whole(path, data, sizeof data);
    for (int i = 0; i < 5; i++) {
        static const size_t places[] = {0, 9, 20, 90, 5000};
        FILE *f = fopen(path, "r+b");
        cr_assert(f && !fseek(f, (long)places[i], SEEK_SET));
        fputc(data[places[i]] ^ 4, f);
        fclose(f);
        OK(open_and_close());
        cr_assert_eq(num_log, 2, "byte %zu", places[i]);
    }
    cr_assert(!truncate(path, (off_t)n / 2));
    OK(open_and_close());
    cr_assert_eq(num_log, 2);
}

Test(runtime, compilers_that_do_not_work, .init = make_folder, .fini = remove_folder) {
    moert_bundle_close(open_image(small_class()));
    setenv("CXX", "no-such-compiler", 1);
    FAILS(open_and_close(), MOERT_NO_DEVICE, "no-such-compiler --version");
    setenv("CXX", " ", 1);
    FAILS(open_and_close(), MOERT_INVALID, "no command");
    setenv("CXX", "c++ -DUNUSED", 1);
    setenv("MOERT_CXXFLAGS", "--no-such-flag", 1);
    FAILS(open_and_close(), MOERT_NO_DEVICE, "no-such-flag");
    unsetenv("MOERT_CXXFLAGS");
    OK(open_and_close());
    struct image *m = make_image(small_class());
    write_manifest(m, "int x = 1; $\n");
    FAILS(open_and_close(), MOERT_NO_DEVICE, "class0.cu does not compile");
    write_manifest(m, "int x = 1;\n");
    FAILS(open_and_close(), MOERT_CORRUPT, "moe_host_launch");
    write_manifest(m, recorder);
    free(m);
    cr_assert(!chmod(in_folder("moec"), 0777));
    FAILS(open_and_close(), MOERT_SYSTEM, "nobody else may");
    if (!geteuid()) {
        cr_assert(!chmod(in_folder("moec"), 0700) && !chown(in_folder("moec"), 12345, -1));
        FAILS(open_and_close(), MOERT_SYSTEM, "folder of yours");
    }
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    FAILS(open_and_close(), MOERT_SYSTEM, "neither XDG_CACHE_HOME nor HOME");
}

Test(runtime, kernels_that_fail_say_so, .init = make_folder, .fini = remove_folder) {
    struct image *m = make_image(small_class());
    m->kernels[0].expression = add_string(m, "fail");
    write_manifest(m, recorder);
    free(m);
    OK(moert_bundle_open(folder, &rig.b));
    OK(host_context(rig.b, &rig.c));
    OK(moert_layer_create(rig.c, 7, &rig.l));
    OK(moert_layer_random(rig.l, 1));
    moert_io io = MOERT_IO_INIT;
    io.num_tokens = 1;
    io.x = rig.x;
    io.topk_idx = rig.idx;
    io.topk_weight = rig.weight;
    FAILS(moert_route(rig.l, &io, NULL), MOERT_SYSTEM, "fail on the host: as asked");
    drop_rig();
}

/* ---- weights on a device ---- */

static struct moe_plan_class full_class(void) {
    struct moe_plan_class c = small_class();
    c.has_bias = c.has_router_bias = c.has_correction_bias = c.shared_gate = 1;
    c.shared_inter = SI;
    return c;
}

static void expect_random(const void *got, bool fp32, int layer, int tensor, int n,
                          float scale) {
    uint64_t seed = moe_tensor_seed(42, layer, tensor);
    for (int i = 0; i < n; i++) {
        float want = moe_random_value(seed, (uint64_t)i) * scale;
        if (fp32)
            cr_assert_eq(((const float *)got)[i], want, "tensor %d[%d]", tensor, i);
        else
            cr_assert_eq(((const uint16_t *)got)[i], naive_bf16(want), "tensor %d[%d]", tensor,
                         i);
    }
}

Test(runtime, random_weights_follow_the_seed, .init = make_folder, .fini = remove_folder) {
    float router[E * H], bias[E], correction[E], gate[H];
    char record[1 << 14];
    make_rig(full_class());
    FAILS(moert_tool_router(rig.l, router, bias, correction, gate), MOERT_INVALID,
          "no weights");
    moert_layer_destroy(rig.l);
    OK(moert_layer_create(rig.c, 7, &rig.l));
    OK(moert_layer_random(rig.l, 42));
    OK(moert_tool_router(rig.l, router, bias, correction, gate));
    float scale_h = (float)(1 / sqrt(H)), scale_i = (float)(1 / sqrt(I));
    expect_random(router, true, 7, MOE_TENSOR_ROUTER, E * H, scale_h);
    expect_random(bias, true, 7, MOE_TENSOR_ROUTER_BIAS, E, 0.05f);
    expect_random(correction, true, 7, MOE_TENSOR_CORRECTION, E, 0.05f);
    expect_random(gate, true, 7, MOE_TENSOR_SHARED_GATE, H, scale_h);
    const struct moe_plan_class *c = moert_tool_class(rig.b, 7);
    for (int e = 0; e < E; e++) {
        int tensor = MOE_TENSOR_EXPERT + 4 * e;
        OK(moert_tool_record(rig.l, e, record));
        expect_random(record + c->w1_offset, false, 7, tensor, 2 * I * H, scale_h);
        expect_random(record + c->w2_offset, false, 7, tensor + 1, I * H, scale_i);
        expect_random(record + c->b1_offset, true, 7, tensor + 2, 2 * I, 0.05f);
        expect_random(record + c->b2_offset, true, 7, tensor + 3, H, 0.05f);
    }
    OK(moert_tool_record(rig.l, -1, record));
    expect_random(record, false, 7, MOE_TENSOR_SHARED_W1, 2 * SI * H, scale_h);
    expect_random(record + c->shared_w2_offset, false, 7, MOE_TENSOR_SHARED_W2, SI * H,
                  (float)(1 / sqrt(SI)));
    FAILS(moert_tool_record(rig.l, E, record), MOERT_NOT_FOUND, "no expert 4");
    drop_rig();
}

Test(runtime, weights_from_pointers, .init = make_folder, .fini = remove_folder) {
    static float gate[E][I * H], up[E][I * H], down[E][H * I], router[E * H], ones[64];
    static char record[1 << 14];
    moert_tensor g[E], u[E], d[E];
    float got[E * H];
    make_rig(small_class());
    for (int e = 0; e < E; e++) {
        for (int i = 0; i < I * H; i++) {
            gate[e][i] = value(EXPERT(e), i);
            up[e][i] = value(EXPERT(e) + 1, i);
            down[e][i] = value(EXPERT(e) + 2, i);
        }
        g[e] = (moert_tensor){gate[e], MOERT_FP32};
        u[e] = (moert_tensor){up[e], MOERT_FP32};
        d[e] = (moert_tensor){down[e], MOERT_FP32};
    }
    for (int i = 0; i < E * H; i++)
        router[i] = value(ROUTER, i) * 1.0001f; /* not a bf16 */
    moert_weights w = MOERT_WEIGHTS_INIT;
    FAILS(moert_layer_set_weights(rig.l, &w), MOERT_INVALID, "router is missing");
    w.router = (moert_tensor){router, MOERT_FP32};
    FAILS(moert_layer_set_weights(rig.l, &w), MOERT_INVALID, "gate is missing");
    w.gate = g;
    w.up = u;
    w.down = d;
    w.shared_expert_gate = (moert_tensor){ones, MOERT_FP32};
    FAILS(moert_layer_set_weights(rig.l, &w), MOERT_INVALID, "shared_expert_gate is given");
    w.shared_expert_gate.data = NULL;
    OK(moert_layer_set_weights(rig.l, &w));
    OK(moert_tool_router(rig.l, got, NULL, NULL, NULL));
    cr_assert(!memcmp(got, router, sizeof router));
    const struct moe_plan_class *c = moert_tool_class(rig.b, 3);
    for (int e = 0; e < E; e++) {
        static char want[1 << 14];
        memset(want, 0, sizeof want);
        OK(moert_tool_record(rig.l, e, record));
        naive_pack(c, EXPERT(e), I, false, c->w2_offset, want);
        cr_assert(!memcmp(record, want, (size_t)c->slot_bytes), "expert %d", e);
    }
    w.router.dtype = MOERT_BF16;
    OK(moert_layer_set_weights(rig.l, &w));
    OK(moert_forward(rig.l, &rig.io, NULL));
    struct call first[16];
    calls(first);
    cr_assert_eq(first[0].flags, MOE_COMBINE); /* a bf16 router stays one */
    u[2].dtype = (moert_dtype)9;
    FAILS(moert_layer_set_weights(rig.l, &w), MOERT_INVALID, "dtype 9");
    drop_rig();
}

Test(runtime, a_layer_from_a_folder, .init = make_folder, .fini = remove_folder) {
    char record[1 << 14];
    make_rig(small_class());
    FAILS(moert_layer_load(rig.l, in_folder("none")), MOERT_NOT_FOUND, "none");
    FAILS(moert_layer_load(rig.l, NULL), MOERT_INVALID, "path");
    put(ROUTER, SHAPE(E, H), "model.layers.3.mlp.gate.weight");
    for (int e = 0; e < E; e++) {
        put(EXPERT(e), SHAPE(I, H), "model.layers.3.mlp.experts.%d.gate_proj.weight", e);
        put(EXPERT(e) + 1, SHAPE(I, H), "model.layers.3.mlp.experts.%d.up_proj.weight", e);
        put(EXPERT(e) + 2, SHAPE(H, I), "model.layers.3.mlp.experts.%d.down_proj.weight", e);
    }
    OK(moert_tool_save(in_folder("model.safetensors"), list, list_count));
    drop_tensors();
    OK(moert_layer_load(rig.l, folder));
    const struct moe_plan_class *c = moert_tool_class(rig.b, 3);
    for (int e = 0; e < E; e++) {
        char want[1 << 14] = {0};
        OK(moert_tool_record(rig.l, e, record));
        naive_pack(c, EXPERT(e), I, false, c->w2_offset, want);
        cr_assert(!memcmp(record, want, (size_t)c->slot_bytes), "expert %d", e);
    }
    float router[E * H];
    OK(moert_tool_router(rig.l, router, NULL, NULL, NULL));
    for (int i = 0; i < E * H; i++)
        cr_assert_eq(router[i], value(ROUTER, i)); /* held as bf16, read back as fp32 */
    drop_rig();
}

static moert_result forward_call(void *user, moert_stream s) {
    return moert_forward(rig.l, user, s);
}

Test(runtime, tools_of_the_host_device, .init = make_folder, .fini = remove_folder) {
    struct moert_tool_device d;
    moert_graph *g;
    moert_stream s;
    void *p;
    double us = -1;
    char back[16];
    make_rig(small_class());
    OK(moert_layer_random(rig.l, 1));
    moert_tool_device(rig.c, &d);
    cr_assert(d.target == MOE_TARGET_HOST && d.sms == 2 && d.memory > 0);
    OK(moert_tool_alloc(rig.c, 16, &p));
    cr_assert_eq((uintptr_t)p % 256, 0);
    OK(moert_tool_upload(rig.c, p, "fifteen letters", 16));
    OK(moert_tool_copy(rig.c, (char *)p + 8, p, 8, NULL));
    OK(moert_tool_set(rig.c, p, 'z', 2));
    OK(moert_tool_download(rig.c, back, p, 16));
    cr_assert(!memcmp(back, "zzfteen fifteen ", 16));
    moert_tool_free(rig.c, p);
    moert_tool_free(rig.c, NULL);
    OK(moert_tool_stream(rig.c, &s));
    OK(moert_tool_sync(rig.c, s));
    OK(moert_tool_time(rig.c, s, forward_call, &rig.io, &us));
    cr_assert(us >= 0 && us < 1e6);
    FAILS(moert_tool_capture(rig.c, s, forward_call, &rig.io, &g), MOERT_UNSUPPORTED, "graphs");
    moert_tool_graph_free(rig.c, NULL);
    moert_tool_stream_free(rig.c, s);
    FAILS(moert_tool_workspace(rig.c, MOE_WS_SYNC, back, SYNC_BYTES + 1), MOERT_INVALID,
          "bytes");
    drop_rig();
}

/* ---- a real bundle on the host ---- */

static const char small_model[] =
    "name: small\nnum_hidden_layers: 1\nmoe_layers: 0-0\nhidden_size: 48\n"
    "moe_intermediate_size: 32\nnum_experts: 12\nnum_experts_per_tok: 3\n"
    "router: {method: deepseek_v3, n_group: 4, topk_group: 2, norm_topk_prob: true,\n"
    "  correction_bias: true}\nshared_experts: {intermediate_size: 16}\n";
enum { MH = 48, ME = 12, MK = 3, MT = 20, M_MAX = 8 };

static void build_small(void) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    const char *sets[] = {"moe_config.max_num_tokens=8"};
    struct overrides o = {.targets = "host", .set = sets, .num_set = 1};
    struct build_options options = {.jobs = 1, .out = in_folder("small.moe")};
    struct build_report report;
    write_file("small.yaml", small_model, strlen(small_model));
    struct deployment *dep = deployment_read(&a, &d, in_folder("small.yaml"), &o);
    struct plan *plan = dep ? plan_make(&a, &d, dep, 1) : NULL;
    cr_assert(plan && bundle_build(&a, &d, plan, &options, &report), "%s",
              d.first ? d.first->text : "no plan");
    arena_free(&a);
}

/* Everything a forward of the small model reads and writes. */
struct batch {
    uint16_t x[MT * MH], out[MT * MH];
    float x32[MT * MH], out32[MT * MH], weight[MT * MK], logits[MT * ME];
    int32_t idx[MT * MK];
};
static struct batch want __attribute__((aligned(64))), got __attribute__((aligned(64)));

static moert_io batch_io(struct batch *b, int first, int tokens) {
    moert_io io = MOERT_IO_INIT;
    io.num_tokens = tokens;
    io.x = b->x + first * MH;
    io.out = b->out + first * MH;
    io.topk_idx = b->idx + first * MK;
    io.topk_weight = b->weight + first * MK;
    return io;
}

static void fresh_batch(struct batch *b) {
    memset(b, 0xee, sizeof *b);
    for (int i = 0; i < MT * MH; i++) {
        b->x[i] = naive_bf16(value(5, i));
        b->x32[i] = value(5, i);
    }
}

static void expect_equal(const char *what, int tokens) {
    cr_assert(!memcmp(got.idx, want.idx, (size_t)tokens * MK * 4), "%s: ids", what);
    cr_assert(!memcmp(got.weight, want.weight, (size_t)tokens * MK * 4), "%s: weights", what);
    cr_assert(!memcmp(got.out, want.out, (size_t)tokens * MH * 2), "%s: output", what);
}

static void expect_steps(moert_layer *l) {
    moert_io io = batch_io(&got, 0, M_MAX);
    fresh_batch(&got);
    OK(moert_route(l, &io, NULL));
    OK(moert_experts(l, &io, NULL));
    OK(moert_combine(l, &io, NULL));
    expect_equal("steps alone", M_MAX);
    fresh_batch(&got); /* the caller's own top-k */
    memcpy(got.idx, want.idx, sizeof got.idx);
    memcpy(got.weight, want.weight, sizeof got.weight);
    OK(moert_experts(l, &io, NULL));
    OK(moert_combine(l, &io, NULL));
    expect_equal("the caller's top-k", M_MAX);
}

/* Routing from our own logits, given back by the caller. */
static void expect_logits(moert_context *c, moert_layer *l) {
    moert_io io = batch_io(&got, 0, M_MAX);
    fresh_batch(&got);
    OK(moert_route(l, &io, NULL));
    OK(moert_tool_workspace(c, MOE_WS_LOGITS, got.logits, M_MAX * ME * 4));
    memset(got.idx, 0xee, sizeof got.idx);
    memset(got.weight, 0xee, sizeof got.weight);
    io.logits = got.logits;
    OK(moert_forward(l, &io, NULL));
    expect_equal("the caller's logits", M_MAX);
}

static void expect_dtypes(moert_layer *l) {
    moert_io io = batch_io(&got, 0, MT);
    fresh_batch(&got);
    io.x = got.x32;
    io.x_dtype = MOERT_FP32;
    OK(moert_forward(l, &io, NULL));
    expect_equal("x in fp32", MT);
    io.out = got.out32;
    io.out_dtype = MOERT_FP32;
    OK(moert_forward(l, &io, NULL));
    for (int i = 0; i < MT * MH; i++)
        cr_assert_eq(naive_bf16(got.out32[i]), want.out[i], "out in fp32, %d", i);
}

Test(runtime, a_real_bundle_on_the_host, .init = make_folder, .fini = remove_folder) {
    moert_bundle *b;
    moert_context *c;
    moert_layer *l;
    build_small();
    OK(moert_bundle_open(in_folder("small.moe"), &b));
    OK(host_context(b, &c));
    OK(moert_layer_create(c, 0, &l));
    OK(moert_layer_random(l, 5));
    fresh_batch(&want);
    moert_io io = batch_io(&want, 0, MT);
    OK(moert_forward(l, &io, NULL)); /* 20 tokens, 8 at most: chunks of 6, 7 and 7 */
    for (int i = 0; i < MT * MK; i++)
        cr_assert(want.idx[i] >= 0 && want.idx[i] < ME && want.weight[i] > 0);
    fresh_batch(&got);
    for (int t = 0; t < MT; t++) {
        io = batch_io(&got, t, 1);
        OK(moert_forward(l, &io, NULL));
    }
    cr_assert(!memcmp(got.idx, want.idx, sizeof got.idx), "a token at a time");
    fresh_batch(&got);
    io = batch_io(&got, 0, MT);
    io.num_tokens = 0;
    OK(moert_forward(l, &io, NULL));
    cr_assert(got.idx[0] == (int32_t)0xeeeeeeee && got.out[0] == 0xeeee, "no tokens");
    expect_dtypes(l);
    fresh_batch(&want);
    io = batch_io(&want, 0, M_MAX);
    OK(moert_forward(l, &io, NULL));
    expect_steps(l);
    expect_logits(c, l);
    moert_layer_destroy(l);
    moert_context_destroy(c);
    moert_bundle_close(b);
}

/* ---- NVRTC ---- */

Test(runtime, nvrtc_and_the_compiler_share_a_cache, .init = make_folder,
     .fini = remove_folder) {
    static const char text[] = "template <int N> __global__ void k(int *p) { *p = N; }\n";
    struct rt_file source = {
        .path = "k.cu", .data = (unsigned char *)text, .bytes = strlen(text)};
    struct rt_entry e, again;
    int major, minor;
    if (!nvrtc_version(&major, &minor))
        cr_skip_test("no NVRTC");
    OK(rt_nvrtc(&source, "k<3>", MOE_TARGET_SM_80, &e));
    cr_assert(e.bytes > 64 && !memcmp(e.code, "\177ELF", 4) && strstr(e.symbol, "k"));
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct compile_job j = {.source = text,
                            .source_name = "k.cu",
                            .expression = "k<3>",
                            .target = MOE_TARGET_SM_80};
    cr_assert(nvrtc_compile(&a, &d, &j, 1, 1, NULL, NULL));
    cr_assert(j.cached && j.cubin_len == e.bytes && !memcmp(j.cubin, e.code, e.bytes));
    OK(rt_nvrtc(&source, "k<3>", MOE_TARGET_SM_80, &again));
    cr_assert_str_eq(again.symbol, e.symbol);
    FAILS(rt_nvrtc(&source, "none<3>", MOE_TARGET_SM_80, &again), MOERT_CUDA, "none<3>");
    free(again.memory);
    free(e.memory);
    arena_free(&a);
}
