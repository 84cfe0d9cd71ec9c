/* moec plan and what a build freezes of a placement: every format out and in again, starts and
 * moves, loads of a deployment, memory, constraints. Figures are computed again here, from the
 * printed placement and the counts, by plain loops. */
#define _GNU_SOURCE
#include "../compiler/moec.h"
#include "../runtime/internal.h"

#include <criterion/criterion.h>

#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[64];
static const char *output; /* of the last command */

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-plan-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}

TestSuite(plan, .init = set_up, .fini = tear_down, .timeout = 300);

/* ---- helpers ---- */

static const char *in_dir(const char *name) {
    return arena_printf(&arena, "%s/%s", dir, name);
}

static void write_text(const char *name, const char *text) {
    cr_assert_eq(file_write(in_dir(name), text, strlen(text)), 0);
}

static const char *text_of(const char *name) {
    char *text;
    size_t len;
    cr_assert_eq(file_read(&arena, in_dir(name), 64 << 20, &text, &len), 0, "%s", name);
    return text;
}

static int call(int argc, char **argv) {
#define X(name, what) \
    if (!strcmp(argv[0], #name)) \
        return cmd_##name(argc, argv);
    MOEC_COMMANDS(X)
#undef X
    return 2;
}

/* Exit code of `moec LINE` in the test's folder; what it says is in output. */
static int moec(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int moec(const char *fmt, ...) {
    char line[2048], *argv[40], *save;
    int argc = 0, status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    for (char *w = strtok_r(line, " ", &save); w; w = strtok_r(NULL, " ", &save))
        argv[argc++] = w;
    argv[argc] = NULL;
    fflush(NULL);
    pid_t pid = fork();
    cr_assert(pid >= 0);
    if (!pid) {
        int fd = open(in_dir("output"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        dup2(fd, STDOUT_FILENO);
        dup2(fd, STDERR_FILENO);
        if (chdir(dir))
            _exit(99);
        setenv("XDG_CACHE_HOME", dir, 1);
        int code = call(argc, argv);
        fflush(NULL);
        _exit(code);
    }
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    output = text_of("output");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#define MOEC(...) cr_assert_eq(moec(__VA_ARGS__), 0, "%s", output)
#define SAYS(text) cr_expect(strstr(output, text), "no \"%s\" in: %s", text, output)

/* Eight experts; layers 1, 3 and 5 have them, and MTP layer 6. */
static const char odd_model[] =
    "name: odd\nnum_hidden_layers: 6\nnum_nextn_predict_layers: 1\nmoe_layers: odd\n"
    "hidden_size: 64\nmoe_intermediate_size: 32\nnum_experts: 8\nnum_experts_per_tok: 2\n"
    "router: {method: softmax_topk}\n";
enum { E = 8, LAYERS = 4, DECODER = 3 };
static const int odd_layers[LAYERS] = {1, 3, 5, 6};

static const int counts[DECODER][E] = {{900, 20, 310, 45, 120, 60, 70, 15},
                                       {10, 10, 10, 700, 10, 10, 10, 650},
                                       {5, 80, 44, 31, 77, 123, 9, 200}};

static void write_counts(const char *name) {
    struct buf b = {.arena = &arena};
    for (int l = 0; l < DECODER; l++)
        for (int e = 0; e < E; e++)
            buf_printf(&b, "%d%c", counts[l][e], e == E - 1 ? '\n' : ',');
    write_text(name, b.data);
}

/* A deployment of the odd model over 4 ranks; rest is YAML. */
static void write_deployment(const char *name, const char *rest) {
    write_text("odd.yaml", odd_model);
    write_counts("counts.csv");
    write_text(name, arena_printf(&arena, "model: odd.yaml\ncluster: {ranks: 4}\n%s", rest));
}

static const char loaded[] =
    "loads: counts.csv\nmoe_config: {load_balancer: {num_slots: 12}}\n";

static struct deployment *read_deployment(const char *name) {
    struct overrides o = {0};
    diags = (struct diags){.arena = &arena};
    struct deployment *dep = deployment_read(&arena, &diags, in_dir(name), &o);
    if (!dep)
        diag_print(&diags, stderr);
    cr_assert(dep);
    return dep;
}

/* A placement as moec plan --format json prints it. */
struct printed {
    int layers, ranks, per_rank;
    int layer[64];
    int slot[64][512];
    double share[64][512], imbalance[64], even[64], bound[64];
};

static struct node *value(struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    cr_assert(n, "no key %s", key);
    return n;
}

static int whole(struct node *n) {
    int v;
    cr_assert(node_int(&diags, n, "v", -1, 1 << 20, &v));
    return v;
}

static double number(struct node *n) {
    double v;
    cr_assert(node_double(&diags, n, "v", 0, 1e9, &v));
    return v;
}

/* The keys of a map are these, in this order. */
static void expect_keys(const struct node *map, const char *const *keys, int n) {
    cr_assert_eq(map->count, n);
    for (int i = 0; i < n; i++)
        cr_expect_str_eq(map->keys[i]->text, keys[i]);
}

static struct printed *parse(const char *name) {
    static const char *const top[] = {"model", "ranks", "slots_per_rank", "layers"};
    static const char *const inner[] = {"layer",     "expert_of_slot", "share_of_slot",
                                        "imbalance", "imbalance_even", "bound"};
    struct printed *p = arena_array(&arena, struct printed, 1);
    struct node *root = yaml_read(&arena, &diags, in_dir(name));
    cr_assert(root, "%s", name);
    expect_keys(root, top, 4);
    p->ranks = whole(value(root, "ranks"));
    p->per_rank = whole(value(root, "slots_per_rank"));
    struct node *layers = value(root, "layers");
    p->layers = layers->count;
    cr_assert(p->layers <= 64 && p->ranks * p->per_rank <= 512);
    for (int i = 0; i < p->layers; i++) {
        struct node *l = layers->items[i], *slots = value(l, "expert_of_slot"),
                    *shares = value(l, "share_of_slot");
        expect_keys(l, inner, 6);
        p->layer[i] = whole(value(l, "layer"));
        cr_assert_eq(slots->count, p->ranks * p->per_rank);
        cr_assert_eq(shares->count, slots->count);
        for (int s = 0; s < slots->count; s++) {
            p->slot[i][s] = whole(slots->items[s]);
            p->share[i][s] = number(shares->items[s]);
        }
        p->imbalance[i] = number(value(l, "imbalance"));
        p->even[i] = number(value(l, "imbalance_even"));
        p->bound[i] = number(value(l, "bound"));
    }
    return p;
}

static struct printed *plan_json(const char *file, const char *options) {
    MOEC("plan %s --format json -o plan.json %s", file, options);
    return parse("plan.json");
}

static int slots(const struct printed *p) {
    return p->ranks * p->per_rank;
}

static void expect_same(const struct printed *a, const struct printed *b, int layers) {
    cr_assert(a->ranks == b->ranks && a->per_rank == b->per_rank);
    for (int i = 0; i < layers; i++)
        cr_expect(!memcmp(a->slot[i], b->slot[i], sizeof(int) * (size_t)slots(a)), "layer %d",
                  a->layer[i]);
}

/* max/mean rank load of layer i when loads are split by share[]; NULL: evenly. */
static double imbalance(const struct printed *p, int i, const int *load, const double *share) {
    double most = 0, sum = 0;
    int n[E] = {0};
    for (int s = 0; s < slots(p); s++)
        if (p->slot[i][s] >= 0)
            n[p->slot[i][s]]++;
    for (int r = 0; r < p->ranks; r++) {
        double rank = 0;
        for (int s = r * p->per_rank; s < (r + 1) * p->per_rank; s++)
            if (p->slot[i][s] >= 0)
                rank += load[p->slot[i][s]] * (share ? share[s] : 1.0 / n[p->slot[i][s]]);
        most = rank > most ? rank : most;
        sum += rank;
    }
    return most / (sum / p->ranks);
}

static int differing(const int *a, const int *b, int n) {
    int d = 0;
    for (int i = 0; i < n; i++)
        d += a[i] != b[i];
    return d;
}

/* ---- what is printed ---- */

Test(plan, json_has_the_promised_keys_and_figures) {
    write_deployment("d.yaml", arena_printf(&arena, "dispatch: share\n%s", loaded));
    struct printed *p = plan_json("d.yaml", "");
    cr_assert_eq(p->layers, LAYERS);
    cr_expect(p->ranks == 4 && p->per_rank == 3);
    for (int i = 0; i < LAYERS; i++) {
        double sum[E] = {0};
        cr_expect_eq(p->layer[i], odd_layers[i]);
        for (int s = 0; s < 12; s++) {
            cr_assert(p->slot[i][s] >= 0 && p->slot[i][s] < E);
            sum[p->slot[i][s]] += p->share[i][s];
        }
        for (int e = 0; e < E; e++)
            cr_expect_float_eq(sum[e], 1, 1e-7, "layer %d, expert %d: %g", p->layer[i], e,
                               sum[e]);
        cr_expect_geq(p->imbalance[i], p->bound[i] - 1e-9);
        cr_expect_geq(p->bound[i], 1 - 1e-9);
    }
    for (int i = 0; i < DECODER; i++) {
        cr_expect_float_eq(p->even[i], imbalance(p, i, counts[i], NULL), 1e-6);
        cr_expect_float_eq(p->imbalance[i], imbalance(p, i, counts[i], p->share[i]), 1e-4);
    }
}

Test(plan, loads_decide_what_is_replicated) {
    write_deployment("d.yaml", arena_printf(&arena, "dispatch: even\n%s", loaded));
    struct printed *p = plan_json("d.yaml", "");
    static const int hot[DECODER] = {0, 3, 7};
    for (int i = 0; i < DECODER; i++) {
        int replicas = 0;
        for (int s = 0; s < 12; s++)
            replicas += p->slot[i][s] == hot[i];
        cr_expect_geq(replicas, 2, "layer %d", p->layer[i]);
    }
    struct printed *q = plan_json("d.yaml", "--policy even");
    for (int i = 0; i < DECODER; i++)
        cr_expect_lt(p->even[i], q->even[i], "layer %d", p->layer[i]);
}

Test(plan, the_number_of_threads_changes_no_byte) {
    write_deployment("d.yaml", loaded);
    MOEC("plan d.yaml -o one -j 1");
    MOEC("plan d.yaml -o two -j 2");
    MOEC("plan d.yaml -o seven -j 7");
    MOEC("plan d.yaml");
    cr_expect_str_eq(text_of("one"), text_of("two"));
    cr_expect_str_eq(text_of("one"), text_of("seven"));
    cr_expect(strstr(output, text_of("one")), "standard output holds the same");
}

/* ---- formats ---- */

/* Written in a format, read back as a given assignment: the same placement. */
static void round_trip(const char *format, const struct printed *want, int layers) {
    MOEC("plan d.yaml --format %s -o placement", format);
    write_deployment("again.yaml", "moe_config:\n  load_balancer:\n    "
                                   "initial_global_assignments: placement\n");
    expect_same(plan_json("again.yaml", ""), want, layers);
    expect_same(plan_json("again.yaml", "--policy trtllm"), want, layers);
    write_deployment("bare.yaml", "");
    expect_same(plan_json("bare.yaml", "--start placement --moves 0"), want, layers);
}

Test(plan, every_format_comes_back_as_the_same_placement) {
    write_deployment("d.yaml", loaded);
    struct printed *want = plan_json("d.yaml", "");
    round_trip("yaml", want, LAYERS);
    round_trip("json", want, LAYERS);
    round_trip("trtllm", want, LAYERS);
    round_trip("sglang", want, DECODER);
    round_trip("vllm", want, DECODER);
}

Test(plan, a_trtllm_file_is_a_load_balancer) {
    write_deployment("d.yaml", loaded);
    struct printed *want = plan_json("d.yaml", "");
    MOEC("plan d.yaml --format trtllm -o moe_load_balancer.yaml");
    struct node *root = yaml_read(&arena, &diags, in_dir("moe_load_balancer.yaml"));
    static const char *const keys[] = {"num_slots", "layer_updates_per_iter",
                                       "initial_global_assignments"};
    expect_keys(root, keys, 3);
    cr_expect(whole(value(root, keys[0])) == 12 && whole(value(root, keys[1])) == 0);
    for (int i = 0; i < LAYERS; i++) {
        cr_expect_eq(atoi(value(root, keys[2])->keys[i]->text), odd_layers[i]);
        for (int s = 0; s < 12; s++)
            cr_expect_eq(whole(value(root, keys[2])->items[i]->items[s]), want->slot[i][s]);
    }
    write_deployment("again.yaml", "moe_config: {load_balancer: moe_load_balancer.yaml}\n");
    struct printed *p = plan_json("again.yaml", "");
    expect_same(p, want, LAYERS);
}

/* SGLang wants a row for every decoder layer, those without experts too. */
Test(plan, sglang_rows_are_the_decoders_layers) {
    write_deployment("d.yaml", loaded);
    struct printed *want = plan_json("d.yaml", "");
    MOEC("plan d.yaml --format sglang -o map.json");
    SAYS("format sglang has no MTP layers: left out: 6");
    struct node *root = yaml_read(&arena, &diags, in_dir("map.json"));
    struct node *rows = value(root, "physical_to_logical_map");
    cr_assert(root->count == 1 && rows->count == 6);
    for (int i = 0; i < 6; i++)
        for (int s = 0; s < 12; s++)
            cr_expect_eq(whole(rows->items[i]->items[s]), i % 2 ? want->slot[i / 2][s] : s % E,
                         "row %d", i);
}

Test(plan, vllm_maps_count_moe_layers_and_devices) {
    write_deployment("d.yaml", loaded);
    struct printed *want = plan_json("d.yaml", "");
    MOEC("plan d.yaml --format vllm -o map.json");
    struct node *root = yaml_read(&arena, &diags, in_dir("map.json"));
    struct node *layers = value(root, "layer_list");
    cr_assert(whole(value(root, "moe_layer_count")) == 3 && layers->count == 3);
    for (int i = 0; i < 3; i++) {
        struct node *devices = value(layers->items[i], "device_list");
        cr_expect_eq(whole(value(layers->items[i], "layer_id")), i);
        cr_assert(whole(value(layers->items[i], "device_count")) == 4 && devices->count == 4);
        for (int s = 0; s < 12; s++) {
            struct node *device = devices->items[s / 3];
            cr_expect_eq(whole(value(device, "device_id")), s / 3);
            cr_expect_eq(whole(value(device, "device_expert")->items[s % 3]), want->slot[i][s]);
        }
    }
    /* a list per MoE layer is read, too */
    struct buf b = {.arena = &arena};
    for (int i = 0; i < 3; i++)
        for (int s = 0; s < 12; s++)
            buf_printf(&b, "%s%d%s",
                       s   ? ","
                       : i ? ",["
                           : "[[",
                       want->slot[i][s], s == 11 ? "]" : "");
    buf_printf(&b, "]\n");
    write_text("list.json", b.data);
    write_deployment("bare.yaml", "");
    expect_same(plan_json("bare.yaml", "--start list.json --moves 0"), want, DECODER);
}

Test(plan, formats_that_know_no_empty_slot_say_so) {
    static const char *const refuse[] = {"trtllm", "sglang", "vllm"};
    write_deployment("d.yaml", "");
    MOEC("plan d.yaml --ep 3 --format json -o plan.json");
    struct printed *p = parse("plan.json");
    cr_expect(p->per_rank == 3 && p->slot[0][8] == -1 && p->share[0][8] == 0);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(moec("plan d.yaml --ep 3 --format %s -o none", refuse[i]), 1);
        SAYS("slot 8 of layer 1 is empty");
        SAYS("num_slots: 9 fills every slot");
        cr_expect(access(in_dir("none"), F_OK), "something was written");
    }
    MOEC("plan d.yaml --ep 3 -o own.yaml");
    expect_same(plan_json("d.yaml", "--ep 3 --start own.yaml --moves 0"), p, LAYERS);
}

/* Every byte of every form changed, and every form cut: a placement or an error, nothing else. */
Test(plan, no_damaged_placement_gets_through_unchecked) {
    static const char *const forms[] = {"yaml", "json", "trtllm", "sglang", "vllm"};
    static const char changes[] = {'0', '9', '-', '[', '}', ',', ' ', '"'};
    int accepted = 0, refused = 0;
    const char *path = in_dir("bad");
    write_deployment("d.yaml", loaded);
    for (int f = 0; f < 5; f++)
        MOEC("plan d.yaml --format %s -o %s", forms[f], forms[f]);
    struct deployment *dep = read_deployment("d.yaml");
    for (int f = 0; f < 5; f++) {
        const char *good = text_of(forms[f]);
        size_t len = strlen(good);
        for (size_t i = 0; i < len; i += len / 300 + 1)
            for (size_t k = 0; k <= sizeof changes; k++) {
                struct arena a = {0};
                struct diags d = {.arena = &a};
                struct assign_context c = {
                    .arena = &a, .diags = &d, .model = dep->model, .cluster = dep->cluster};
                struct assignment *list;
                int n = 0;
                char *bad = arena_strdup(&a, good);
                bad[i] = k < sizeof changes ? changes[k] : 0;
                FILE *out = fopen(path, "w"); /* file_write syncs: too slow here */
                cr_assert(out && fputs(bad, out) >= 0 && !fclose(out));
                bool ok = assign_file(&c, path, &list, &n);
                cr_assert_eq(ok, d.errors == 0, "%s, byte %zu", forms[f], i);
                for (int l = 0; ok && l < n; l++)
                    for (int s = 0; s < c.num_slots; s++)
                        cr_assert(list[l].expert_of_slot[s] >= -1 &&
                                  list[l].expert_of_slot[s] < E);
                *(ok ? &accepted : &refused) += 1;
                arena_free(&a);
            }
    }
    cr_expect(accepted > 50 && refused > 1000, "%d accepted, %d refused", accepted, refused);
}

/* ---- starting from a placement ---- */

Test(plan, moves_bound_what_differs_from_the_start) {
    write_deployment("bad.yaml",
                     "policy: even\nmoe_config: {load_balancer: {num_slots: 12}}\n");
    write_deployment("d.yaml", loaded);
    struct printed *from = plan_json("bad.yaml", "");
    MOEC("plan bad.yaml --format trtllm -o bad.lb");
    double best[DECODER];
    for (int moves = 0; moves <= 3; moves++) {
        struct printed *p = plan_json(
            "d.yaml",
            arena_printf(&arena, "--set dispatch=even --start bad.lb --moves %d", moves));
        for (int i = 0; i < DECODER; i++) {
            cr_expect_leq(differing(p->slot[i], from->slot[i], 12), moves, "layer %d",
                          p->layer[i]);
            cr_expect_float_eq(p->even[i], imbalance(p, i, counts[i], NULL), 1e-6);
            double before = imbalance(from, i, counts[i], NULL);
            cr_expect_leq(p->even[i], before + 1e-6, "%d moves, layer %d", moves, p->layer[i]);
            best[i] = p->even[i] - before;
        }
    }
    cr_expect_lt(best[0], -0.1, "three moves gain nothing");
}

Test(plan, a_policy_that_places_cannot_start_from_a_placement) {
    write_deployment("d.yaml", loaded);
    MOEC("plan d.yaml -o from.yaml");
    cr_expect_eq(moec("plan d.yaml --start from.yaml --policy trtllm"), 1);
    SAYS("policy trtllm: place starts from nothing");
}

Test(plan, moves_alone_start_from_the_given_assignments) {
    write_deployment("bad.yaml",
                     "policy: even\nmoe_config: {load_balancer: {num_slots: 12}}\n");
    struct printed *from = plan_json("bad.yaml", "");
    MOEC("plan bad.yaml --format trtllm -o bad.lb");
    write_deployment("d.yaml", "loads: counts.csv\nmoe_config: {load_balancer: bad.lb}\n");
    expect_same(plan_json("d.yaml", ""), from, LAYERS);
    struct printed *p = plan_json("d.yaml", "--moves 1");
    int moved = 0;
    for (int i = 0; i < LAYERS; i++) {
        int d = differing(p->slot[i], from->slot[i], 12);
        cr_expect_leq(d, 1);
        moved += d;
    }
    cr_expect_gt(moved, 0);
}

/* ---- loads of a deployment ---- */

Test(plan, loads_are_workloads_with_weights) {
    write_deployment("d.yaml", "loads:\n- counts.csv\n- {path: counts.csv, weight: 0.25}\n"
                               "- {path: other.csv, weight: 0}\n");
    write_text("other.csv", "1,1,1,1,1,1,1,1\n2,2,2,2,2,2,2,2\n3,3,3,3,3,3,3,9\n");
    const struct loads *l = read_deployment("d.yaml")->loads;
    cr_assert(l && l->num_workloads == 3 && l->num_layers == LAYERS && l->experts == E);
    cr_expect(l->workloads[0].weight == 1 && l->workloads[1].weight == 0.25 &&
              l->workloads[2].weight == 0);
    for (int e = 0; e < E; e++) {
        cr_expect_eq(l->workloads[1].count[loads_layer(l, 3) * E + e], counts[1][e]);
        cr_expect_eq(l->workloads[2].count[loads_layer(l, 5) * E + e], e == E - 1 ? 9 : 3);
    }
}

/* Counts of slots, as TensorRT-LLM records them while its balancer is on, are those of the experts
 * that the slots held. */
Test(plan, loads_of_slots_are_led_back_to_experts) {
    static const char slot_counts[] = "1,2,3,4,5,6,7,8,100,200,300,400\n";
    write_deployment("even.yaml",
                     "policy: even\nmoe_config: {load_balancer: {num_slots: 12}}\n");
    MOEC("plan even.yaml --format json -o even.json");
    struct printed *p = parse("even.json");
    write_text("slots.csv",
               arena_printf(&arena, "%s%s%s", slot_counts, slot_counts, slot_counts));
    MOEC("stats convert slots.csv --to trtllm --top-k 2 -o trace");
    /* a recording of layers 0, 1 and 2 becomes one of 1, 3 and 5 */
    write_text("dense.yaml", "name: dense\nnum_hidden_layers: 3\nmoe_layers: all\n"
                             "hidden_size: 64\nmoe_intermediate_size: 32\nnum_experts: 8\n"
                             "num_experts_per_tok: 2\nrouter: {method: softmax_topk}\n");
    MOEC("plan even.yaml --set model=dense.yaml --format trtllm -o even.lb");
    static const char *const ways[] = {"loads: {path: trace, placement: even.lb}\n",
                                       "loads: trace\nmoe_config: {load_balancer: even.lb}\n"};
    for (int way = 0; way < 2; way++) {
        write_text("d.yaml", arena_printf(&arena, "model: dense.yaml\ncluster: {ranks: 4}\n%s",
                                          ways[way]));
        const struct loads *l = read_deployment("d.yaml")->loads;
        for (int e = 0; e < E; e++) {
            int want = 0, at = 0;
            for (int s = 0; s < 12; s++) {
                int count = atoi(slot_counts + at);
                at += (int)strcspn(slot_counts + at, ",\n") + 1;
                want += p->slot[0][s] == e ? count : 0;
            }
            cr_expect_eq(l->workloads[0].count[E + e], want, "way %d, expert %d: %g, not %d",
                         way, e, l->workloads[0].count[E + e], want);
        }
    }
}

/* ---- memory ---- */

/* Bytes of a rank, from the model's sizes: bf16 weights, an fp32 router, 256-byte parts. */
Test(plan, memory_is_checked_with_the_arithmetic) {
    enum { H = 1024, I = 512, SLOTS = 4, T = 64 };
    double slot = 3.0 * 2 * H * I, router = 4.0 * 16 * H;
    double weights = 2 * (SLOTS * slot + router);
    static const char text[] =
        "model:\n  name: m\n  num_hidden_layers: 2\n  moe_layers: all\n  hidden_size: 1024\n"
        "  moe_intermediate_size: 512\n  num_experts: 16\n  num_experts_per_tok: 1\n"
        "  router: {method: softmax_topk}\n"
        "target: host\nmoe_config: {max_num_tokens: 256}\n"
        "cluster: {ranks: 4, memory_gb: %.6f}\n";
    write_text("d.yaml", arena_printf(&arena, text, weights / 1e9 - 0.001));
    cr_assert_eq(moec("plan d.yaml"), 1);
    SAYS("d.yaml:12:10: error: a rank needs 2");
    SAYS(
        ", but has 24.3 MB: 2 layers x (4 slots x 3.1 MB + 65.5 kB of router) = 25.3 MB, and ");
    SAYS(" of workspace for 64 tokens");
    SAYS("more ranks, fewer slots");
    cr_expect_eq(moec("build d.yaml -o bundle"), 1);
    cr_expect(access(in_dir("bundle"), F_OK), "a bundle was written");
    /* the workspace: at least a row of x and y for every token, at most ten times that */
    write_text("d.yaml", arena_printf(&arena, text, (weights + 4.0 * T * H) / 1e9));
    cr_expect_eq(moec("plan d.yaml"), 1);
    write_text("d.yaml", arena_printf(&arena, text, (weights + 40.0 * T * H) / 1e9));
    MOEC("plan d.yaml");
}

/* ---- what a build freezes ---- */

static moert_bundle *open_bundle(const char *name) {
    moert_bundle *b = NULL;
    moert_result r = moert_bundle_open(in_dir(name), &b);
    cr_assert_eq(r, MOERT_OK, "%s", moert_last_error());
    return b;
}

Test(plan, a_bundle_holds_what_was_planned) {
    write_deployment("d.yaml",
                     arena_printf(&arena, "target: host\ndispatch: share\n%s", loaded));
    struct printed *p = plan_json("d.yaml", "");
    MOEC("build d.yaml -o d.moe");
    moert_bundle *b = open_bundle("d.moe");
    cr_assert_eq(b->count[MOE_SECTION_LAYER], LAYERS);
    for (int i = 0; i < LAYERS; i++) {
        const struct moe_plan_layer *l = &b->layers[i];
        cr_expect_eq(l->layer, odd_layers[i]);
        cr_expect_float_eq(l->imbalance, p->imbalance[i], 1e-7);
        cr_expect_float_eq(l->imbalance_even, p->even[i], 1e-7);
        cr_expect_float_eq(l->bound, p->bound[i], 1e-7);
        for (int s = 0; s < 12; s++) {
            cr_expect_eq(b->tables[l->expert_of_slot + s], p->slot[i][s]);
            cr_expect_float_eq(b->tables[l->share_of_slot + s] / 65536.0, p->share[i][s],
                               12 / 65536.0);
        }
    }
    cr_expect(b->balance->dispatch == MOE_DISPATCH_SHARE && b->balance->move_budget == -1);
    cr_assert_eq(b->count[MOE_SECTION_WEIGHT], 1);
    cr_expect_eq(b->weights[0], 1);
    moert_bundle_close(b);
    struct node *yaml = yaml_read(&arena, &diags, in_dir("d.moe/plan.yaml"));
    struct node *layer = value(value(yaml, "layers"), "3");
    for (int s = 0; s < 12; s++)
        cr_expect_eq(whole(value(layer, "expert_of_slot")->items[s]), p->slot[1][s]);
    cr_expect_eq(value(layer, "share_of_slot")->count, 12);
    cr_expect_str_eq(value(value(yaml, "workloads")->items[0], "name")->text, "counts.csv");
    MOEC("explain d.moe");
    MOEC("explain d.yaml");
}

/* Expert 5 in slot 1 of layer 3, expert 0 not on ranks 1 and 2 of layer 5, two moves at most. */
static const char constrained[] =
    "return {\n  constraints = function(model, cluster)\n"
    "    return {pins = {{layer = 3, slot = 1, expert = 5}},\n"
    "      forbidden = {{layer = 5, expert = 0, rank = 1}, {layer = 5, expert = 0, rank = "
    "2}},\n"
    "      workload_weights = {0.5}, move_budget = 2}\n  end,\n}\n";

Test(plan, constraints_are_kept_and_frozen) {
    write_text("mine.lua", constrained);
    write_deployment("d.yaml",
                     arena_printf(&arena, "target: host\npolicy: ./mine.lua\n%s", loaded));
    MOEC("build d.yaml -o d.moe");
    moert_bundle *b = open_bundle("d.moe");
    cr_assert(b->count[MOE_SECTION_PIN] == 1 && b->count[MOE_SECTION_FORBIDDEN] == 2 &&
              b->count[MOE_SECTION_WEIGHT] == 1);
    cr_expect(b->pins[0].layer == 3 && b->pins[0].slot == 1 && b->pins[0].expert == 5);
    for (int i = 0; i < 2; i++)
        cr_expect(b->forbidden[i].layer == 5 && b->forbidden[i].expert == 0 &&
                  b->forbidden[i].rank == i + 1);
    cr_expect(b->balance->move_budget == 2 && b->weights[0] == 0.5);
    cr_expect_eq(b->tables[b->layers[1].expert_of_slot + 1], 5);
    for (int s = 3; s < 9; s++)
        cr_expect_neq(b->tables[b->layers[2].expert_of_slot + s], 0, "slot %d", s);
    moert_bundle_close(b);
    struct node *yaml = yaml_read(&arena, &diags, in_dir("d.moe/plan.yaml"));
    cr_expect_eq(whole(value(yaml, "move_budget")), 2);
    cr_expect_eq(whole(value(value(yaml, "pins")->items[0], "expert")), 5);
    cr_expect_eq(whole(value(value(yaml, "forbidden")->items[1], "rank")), 2);
}

Test(plan, a_given_assignment_may_not_break_constraints) {
    write_deployment("even.yaml",
                     "policy: even\nmoe_config: {load_balancer: {num_slots: 12}}\n");
    MOEC("plan even.yaml --format trtllm -o even.lb");
    write_text("mine.lua", constrained);
    write_deployment("d.yaml", "policy: ./mine.lua\nloads: counts.csv\n"
                               "moe_config: {load_balancer: even.lb}\n");
    cr_expect_eq(moec("plan d.yaml"), 1);
    SAYS("d.yaml:3:9: error: policy ./mine.lua: initial_global_assignments: layer 3, slot 1: "
         "expert 1, but");
    SAYS("constraints forbid expert 0 on rank 2");
    cr_expect(!strstr(output, "on rank 1"), "%s", output);
}

/* ---- limits ---- */

/* Sixteen experts in four groups, two layers, 4 ranks in nodes of 2; rest is YAML, differ belongs to
 * the cluster. The first two groups are the hot ones of layer 0. */
enum { GE = 16, GR = 4, GROUPS = 4, NODE = 2 };
static const int grouped_counts[2][GE] = {
    {400, 90, 80, 70, 300, 60, 50, 40, 9, 8, 7, 6, 5, 4, 3, 2},
    {10, 200, 30, 4, 50, 6, 70, 8, 9, 10, 110, 12, 13, 14, 15, 160}};

static void write_grouped(const char *name, const char *differ, const char *rest) {
    struct buf b = {.arena = &arena};
    for (int i = 0; i < 2 * GE; i++)
        buf_printf(&b, "%d%c", grouped_counts[i / GE][i % GE], i % GE == GE - 1 ? '\n' : ',');
    write_text("grouped.csv", b.data);
    write_text(
        "grouped.yaml",
        "name: grouped\nnum_hidden_layers: 2\nhidden_size: 64\n"
        "moe_intermediate_size: 32\nnum_experts: 16\nnum_experts_per_tok: 2\n"
        "router: {method: deepseek_v3, n_group: 4, topk_group: 2, norm_topk_prob: true}\n");
    write_text(name, arena_printf(&arena,
                                  "model: grouped.yaml\nloads: grouped.csv\ntarget: host\n"
                                  "dispatch: even\ncluster: {ranks: 4, ranks_per_node: 2%s}\n"
                                  "moe_config: {load_balancer: {num_slots: 24}}\n%s",
                                  differ, rest));
}

/* Slots off their group's node, for the best of all ways to give each of two nodes two groups. */
static int slots_away(const struct printed *p, int i) {
    int best = INT_MAX;
    for (int home = 0; home < 1 << GROUPS; home++) {
        int away = 0;
        if (__builtin_popcount((unsigned)home) != GROUPS / 2)
            continue;
        for (int s = 0; s < slots(p); s++)
            if (p->slot[i][s] >= 0)
                away += (home >> (p->slot[i][s] * GROUPS / GE) & 1) != s / p->per_rank / NODE;
        best = away < best ? away : best;
    }
    return best;
}

/* Most replicas of an expert on the ranks from .. to. */
static int most_replicas(const struct printed *p, int i, int from, int to) {
    int n[GE] = {0}, most = 0;
    for (int s = from * p->per_rank; s < to * p->per_rank; s++)
        if (p->slot[i][s] >= 0 && ++n[p->slot[i][s]] > most)
            most = n[p->slot[i][s]];
    return most;
}

Test(plan, groups_stay_in_their_nodes_only_when_asked) {
    double kept = 0, some = 0, free = 0;
    write_grouped("d.yaml", "", "");
    struct printed *p = plan_json("d.yaml", "");
    for (int i = 0; i < 2; i++) {
        cr_expect_gt(slots_away(p, i), 3, "layer %d", i);
        free += p->even[i];
    }
    write_grouped("d.yaml", "", "placement: {keep_groups_in_nodes: true}\n");
    p = plan_json("d.yaml", "");
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(slots_away(p, i), 0, "layer %d", i);
        kept += p->even[i];
    }
    write_grouped("d.yaml", "",
                  "placement: {keep_groups_in_nodes: true, cross_node_slots: 3}\n");
    p = plan_json("d.yaml", "");
    for (int i = 0; i < 2; i++) {
        cr_expect_leq(slots_away(p, i), 3, "layer %d", i);
        some += p->even[i];
    }
    cr_expect(free < some + 1e-3 && some < kept - 1e-3, "%g %g %g", free, some, kept);
    write_grouped("d.yaml", "", "policy: deepseek\nplacement: {keep_groups_in_nodes: true}\n");
    p = plan_json("d.yaml", "");
    cr_expect(slots_away(p, 0) == 0 && slots_away(p, 1) == 0);
}

Test(plan, replicas_are_limited_in_all_and_in_a_node) {
    write_grouped("d.yaml", "", "");
    struct printed *p = plan_json("d.yaml", "");
    cr_expect_gt(most_replicas(p, 0, 0, GR), 2);
    write_grouped("d.yaml", "", "placement: {max_replicas: 2}\n");
    p = plan_json("d.yaml", "");
    cr_expect(most_replicas(p, 0, 0, GR) == 2 && most_replicas(p, 1, 0, GR) == 2);
    write_grouped("d.yaml", "", "placement: {max_replicas_per_node: 1}\n");
    p = plan_json("d.yaml", "");
    for (int i = 0; i < 2; i++)
        for (int n = 0; n < GR / NODE; n++)
            cr_expect_eq(most_replicas(p, i, n * NODE, (n + 1) * NODE), 1, "layer %d", i);
}

/* The longest rank time over the time were all ranks equally long at work. */
static double imbalance_in_time(const struct printed *p, int i, const double *speed) {
    int n[GE] = {0};
    double most = 0, sum = 0, speeds = 0;
    for (int s = 0; s < slots(p); s++)
        if (p->slot[i][s] >= 0)
            n[p->slot[i][s]]++;
    for (int r = 0; r < GR; r++) {
        double load = 0;
        for (int s = r * p->per_rank; s < (r + 1) * p->per_rank; s++)
            if (p->slot[i][s] >= 0)
                load += (double)grouped_counts[i][p->slot[i][s]] / n[p->slot[i][s]];
        most = fmax(most, load / speed[r]);
        sum += load;
        speeds += speed[r];
    }
    return most / (sum / speeds);
}

Test(plan, ranks_differ_in_speed_and_in_slots) {
    static const double speed[GR] = {1, 0.5, 1, 2};
    static const int room[GR] = {6, 5, 3, 6};
    write_grouped("alike.yaml", "", "");
    struct printed *alike = plan_json("alike.yaml", "");
    write_grouped("d.yaml", ", rank_speed: [1, 0.5, 1, 2], rank_slots: [6, 5, 3, 6]", "");
    struct printed *p = plan_json("d.yaml", "");
    for (int i = 0; i < 2; i++) {
        for (int s = 0; s < slots(p); s++)
            cr_expect_eq(p->slot[i][s] < 0, s % 6 >= room[s / 6], "layer %d, slot %d", i, s);
        cr_expect_float_eq(p->even[i], imbalance_in_time(p, i, speed), 1e-6);
        cr_expect_lt(p->even[i], imbalance_in_time(alike, i, speed) - 0.1);
        cr_expect_geq(p->even[i], p->bound[i] - 1e-9);
    }
    MOEC("plan d.yaml -o from.yaml"); /* and from a placement that does not keep them */
    MOEC("plan alike.yaml -o alike.out");
    p = plan_json("d.yaml", "--start alike.out --moves 0");
    for (int s = 0; s < 2 * slots(p); s++)
        cr_expect(p->slot[s / 24][s % 24] < 0 || s % 6 < room[s % 24 / 6]);
}

Test(plan, limits_are_kept_or_refused_whoever_places) {
    static const char *const limits[] = {"keep_groups_in_nodes: true", "max_replicas: 2",
                                         "max_replicas_per_node: 1"};
    static const char *const exact[] = {"even", "trtllm", "deepseek"};
    for (int i = 0; i < 9; i++) {
        if (i % 3 == 0 && i / 3 == 2)
            continue;
        write_grouped(
            "d.yaml", "",
            arena_printf(&arena, "policy: %s\nplacement: {%s}\n", exact[i / 3], limits[i % 3]));
        cr_expect_eq(moec("plan d.yaml"), 1);
        SAYS(arena_printf(&arena, "policy %s cannot keep it; policy robust can", exact[i / 3]));
        SAYS("d.yaml:7:9: note: the policy is chosen here");
    }
    for (int i = 0; i < 3; i++) {
        write_grouped("d.yaml",
                      i % 2 ? ", rank_speed: [1, 1, 1, 2]" : ", rank_slots: [6, 6, 6, 5]",
                      arena_printf(&arena, "policy: %s\n", exact[i]));
        cr_expect_eq(moec("plan d.yaml"), 1);
        SAYS(i % 2 ? "error: rank_speed: policy" : "error: rank_slots: policy");
    }
}

/* Experts in order, the last rank's slots from `last` on empty; it has read the limits. */
static const char placing[] = "return {place = function(model, cluster)\n"
                              "  local p = {}\n"
                              "  for _, l in ipairs(model.moe_layers) do\n"
                              "    p[l] = {}\n"
                              "    for i = 1, 24 do p[l][i] = (i - 1) %% 16 end\n"
                              "    for i = 18 + %s, 24 do p[l][i] = -1 end\n"
                              "  end\n"
                              "  return p\nend}\n";

Test(plan, a_policy_of_ones_own_is_told_the_limits_and_held_to_them) {
    write_text("mine.lua", arena_printf(&arena, placing, "1 + cluster.rank_slots[4]"));
    write_grouped("d.yaml", ", rank_slots: [6, 6, 6, 5]", "policy: ./mine.lua\n");
    MOEC("plan d.yaml");
    write_grouped("d.yaml", ", rank_slots: [6, 6, 5, 6]", "policy: ./mine.lua\n");
    write_text("mine.lua", arena_printf(&arena, placing, "7"));
    cr_expect_eq(moec("plan d.yaml"), 1);
    SAYS("d.yaml:7:9: error: policy ./mine.lua: place: layer 0: slot 5 of rank 2 holds expert "
         "1, "
         "but only its first 5 may be used");
    SAYS("d.yaml:5:52: note: the limit is set here");
    write_grouped("d.yaml", "",
                  "policy: ./mine.lua\nplacement: {keep_groups_in_nodes: true}\n");
    cr_expect_eq(moec("plan d.yaml"), 1);
    SAYS("place: layer 1: 8 slots hold an expert off the node of its group, 0 may");
    write_text("mine.lua", "return {replicate = function(model)\n"
                           "  local c = {}\n"
                           "  for _, l in ipairs(model.moe_layers) do\n"
                           "    c[l] = {}\n"
                           "    for e = 1, 16 do c[l][e] = e < 5 and 3 or 1 end\n"
                           "  end\n"
                           "  return c\nend}\n");
    write_grouped("d.yaml", "", "policy: ./mine.lua\nplacement: {max_replicas: 3}\n");
    MOEC("plan d.yaml");
    write_grouped("d.yaml", "", "policy: ./mine.lua\nplacement: {max_replicas: 2}\n");
    cr_expect_eq(moec("plan d.yaml"), 1);
    SAYS("replicate asks for: layer 0: expert 0 has more than 2 replicas");
}

Test(plan, a_given_assignment_may_not_break_limits) {
    write_grouped("free.yaml", "", "policy: even\n");
    MOEC("plan free.yaml --format trtllm -o even.lb");
    write_grouped("d.yaml", "", "placement: {keep_groups_in_nodes: true}\n");
    cr_expect_eq(moec("plan d.yaml --set moe_config.load_balancer=even.lb"), 1);
    SAYS("error: initial_global_assignments: layer 0: 8 slots hold an expert off the node of "
         "its "
         "group, 0 may");
    SAYS("d.yaml:7:12: note: the limit is set here");
    struct printed *p =
        plan_json("d.yaml", "--set moe_config.load_balancer=even.lb --moves 24");
    cr_expect_eq(slots_away(p, 0), 0);
}

Test(plan, limits_are_frozen_and_explained) {
    static const double speed[GR] = {1, 1, 0.5, 1};
    static const int room[GR] = {6, 6, 5, 6};
    write_grouped(
        "d.yaml", ", rank_speed: [1, 1, 0.5, 1], rank_slots: [6, 6, 5, 6]",
        "placement: {keep_groups_in_nodes: true, cross_node_slots: 2, max_replicas: 3, "
        "max_replicas_per_node: 2}\n");
    MOEC("build d.yaml -o d.moe");
    moert_bundle *b = open_bundle("d.moe");
    const struct moe_plan_balance *k = b->balance;
    cr_expect(k->ranks_per_node == NODE && k->groups == GROUPS && k->cross_node_slots == 2);
    cr_expect(k->max_replicas == 3 && k->max_per_node == 2);
    cr_assert_eq(b->count[MOE_SECTION_RANK], GR);
    for (int r = 0; r < GR; r++)
        cr_expect(b->ranks[r].speed == speed[r] && b->ranks[r].slots == room[r], "rank %d", r);
    moert_bundle_close(b);
    struct node *yaml = yaml_read(&arena, &diags, in_dir("d.moe/plan.yaml"));
    cr_expect_eq(whole(value(value(yaml, "placement"), "max_replicas")), 3);
    cr_expect_eq(whole(value(value(yaml, "cluster"), "rank_slots")->items[2]), 5);
    cr_expect_eq(number(value(value(yaml, "cluster"), "rank_speed")->items[2]), 0.5);
    static const char *const what[] = {"d.yaml", "d.moe"};
    for (int i = 0; i < 2; i++) {
        MOEC("explain %s", what[i]);
        SAYS("limits: 4 groups of experts inside nodes of 2 ranks but for 2 slots, at most 3 "
             "replicas of an expert, at most 2 in a node of 2 ranks, 1 rank with fewer slots, "
             "ranks of different speed\n");
    }
    MOEC("simulate d.yaml --set cluster.gpu=h200");
    MOEC("diff d.yaml d.moe");
    write_grouped("d.yaml", "", "");
    MOEC("build d.yaml -o free.moe");
    b = open_bundle("free.moe");
    cr_expect(!b->count[MOE_SECTION_RANK] && !b->balance->ranks_per_node &&
              !b->balance->groups);
    moert_bundle_close(b);
    MOEC("explain free.moe");
    cr_expect(!strstr(output, "limits:"), "%s", output);
}

/* As above: a slot has 3 x 2 x 1024 x 512 bytes, the router 4 x 16 x 1024, and there are two layers. */
Test(plan, a_ranks_own_memory_is_checked_with_its_own_slots) {
    static const char text[] =
        "model:\n  name: m\n  num_hidden_layers: 2\n  moe_layers: all\n  hidden_size: 1024\n"
        "  moe_intermediate_size: 512\n  num_experts: 16\n  num_experts_per_tok: 1\n"
        "  router: {method: softmax_topk}\n"
        "target: host\nmoe_config: {max_num_tokens: 256, load_balancer: {num_slots: 24}}\n"
        "cluster: {ranks: 4, rank_memory_gb: [1, 1, 1, %.6f]%s}\n";
    double slot = 3.0 * 2 * 1024 * 512, has = 2 * (4.5 * slot + 4.0 * 16 * 1024) / 1e9;
    write_text("d.yaml", arena_printf(&arena, text, has, ""));
    cr_assert_eq(moec("plan d.yaml"), 1);
    SAYS("d.yaml:12:37: error: rank 3 needs 3");
    SAYS(
        ", but has 28.4 MB: 2 layers x (6 slots x 3.1 MB + 65.5 kB of router) = 37.9 MB, and ");
    SAYS("note: rank_slots of 4 would fit rank 3");
    write_text("d.yaml", arena_printf(&arena, text, has, ", rank_slots: [6, 6, 6, 5]"));
    cr_expect_eq(moec("plan d.yaml"), 1);
    SAYS("rank 3 needs 3");
    write_text("d.yaml", arena_printf(&arena, text, has, ", rank_slots: [6, 6, 6, 4]"));
    MOEC("plan d.yaml");
}

Test(plan, a_policys_move_budget_bounds_a_start) {
    write_text("mine.lua", "return {constraints = function() return {move_budget = 2} end}\n");
    write_grouped("even.yaml", "", "policy: even\n");
    MOEC("plan even.yaml --format trtllm -o even.lb");
    struct printed *from = plan_json("even.yaml", "");
    write_grouped("d.yaml", "", "policy: ./mine.lua\n");
    struct printed *far = plan_json("d.yaml", "");
    cr_expect_gt(differing(far->slot[0], from->slot[0], 24), 2);
    for (int moves = -1; moves <= 2; moves++) {
        const char *more = moves < 0 ? "" : arena_printf(&arena, "--moves %d", moves);
        struct printed *p =
            plan_json("d.yaml", arena_printf(&arena, "--start even.lb %s", more));
        for (int i = 0; i < 2; i++)
            cr_expect_leq(differing(p->slot[i], from->slot[i], 24), moves < 0 ? 2 : moves);
        if (moves < 0)
            cr_expect_gt(differing(p->slot[0], from->slot[0], 24), 0);
    }
    cr_expect_eq(moec("plan d.yaml --start even.lb --moves 3"), 1);
    SAYS(
        "d.yaml:7:9: error: --moves 3 is more than the move_budget of policy ./mine.lua, which "
        "is 2");
    SAYS("mine.lua:1:1: note: constraints sets the budget");
}

/* The exchange of every bucket of a bundle. */
static bool exchanges_are(const char *bundle, int few, int many) {
    moert_bundle *b = open_bundle(bundle);
    bool ok = b->count[MOE_SECTION_BUCKET] > 1;
    for (uint32_t i = 0; i < b->count[MOE_SECTION_BUCKET]; i++)
        ok = ok && b->buckets[i].exchange == (b->buckets[i].max_tokens <= 64 ? few : many);
    moert_bundle_close(b);
    return ok;
}

Test(plan, a_policy_chooses_how_ranks_exchange) {
    write_text("mine.lua", "return {exchange = function(model, cluster, tokens)\n"
                           "  return tokens <= 64 and 'onesided' or 'allgather'\nend}\n");
    write_deployment("d.yaml", "target: host\npolicy: ./mine.lua\nloads: counts.csv\n");
    MOEC("build d.yaml -o d.moe");
    cr_expect(exchanges_are("d.moe", MOE_EXCHANGE_ONESIDED, MOE_EXCHANGE_ALLGATHER));
    MOEC("build d.yaml --ep 1 -o one.moe");
    cr_expect(exchanges_are("one.moe", -1, -1));
    write_text(
        "far.yaml",
        "model: odd.yaml\ntarget: host\n"
        "cluster: {ranks: 4, ranks_per_node: 2, nvlink_domain: 2}\npolicy: ./mine.lua\n");
    cr_expect_eq(moec("build far.yaml -o far.moe"), 1);
    SAYS(
        "mine.lua:1:1: error: exchange: onesided reaches 2 ranks, the NVLink domain; there are "
        "4");
}

/* Without figures of a GPU reach decides, with them the cheapest on paper. */
Test(plan, an_exchange_is_chosen_by_tokens) {
    write_deployment("near.yaml", "target: host\n");
    MOEC("build near.yaml -o near.moe");
    cr_expect(exchanges_are("near.moe", MOE_EXCHANGE_ONESIDED, MOE_EXCHANGE_ONESIDED));
    write_text("far.yaml", "model: odd.yaml\ntarget: host\n"
                           "cluster: {ranks: 4, ranks_per_node: 2, nvlink_domain: 2}\n");
    MOEC("build far.yaml -o far.moe");
    cr_expect(exchanges_are("far.moe", MOE_EXCHANGE_ALLTOALL, MOE_EXCHANGE_ALLTOALL));
}

Test(plan, a_policy_chooses_tiles) {
    write_text("mine.lua", "return {variant = function(model, cluster, regime)\n"
                           "  return {gemm1 = 1, gemm2 = 1, router = 0}\nend}\n");
    write_deployment("d.yaml", "target: host\npolicy: ./mine.lua\nloads: counts.csv\n");
    MOEC("build d.yaml --ep 1 -o d.moe");
    moert_bundle *b = open_bundle("d.moe");
    for (uint32_t i = 0; i < b->count[MOE_SECTION_KERNEL]; i++) {
        const char *name = b->strings + b->kernels[i].expression;
        cr_expect(strncmp(name, "moe_gemm", 8) || !strcmp(name + 9, "<1>"), "%s", name);
        cr_expect(strncmp(name, "moe_router", 10) || !strcmp(name + 10, "<0>"), "%s", name);
    }
    moert_bundle_close(b);
    MOEC("verify d.moe --device host --tokens 1,33");
}

/* What a policy says of the launch of the whole experts part, and what is told of it. */
Test(plan, a_policy_chooses_the_experts_launch) {
    static const struct {
        const char *experts, *target, *weights, *told; /* told NULL: it is taken */
    } cases[] = {
        {"{w1_rows = 48, w2_rows = 80, cluster = 2}", "sm_90a", "bf16", NULL},
        {"false", "sm_80", "bf16", NULL},
        {"{}", "sm_80", "bf16", "sm_80 has no launch of the whole experts part"},
        {"{}", "host", "bf16", "host has no launch of the whole experts part"},
        {"{w1_rows = 48}", "sm_90a", "fp8_block, block: [128, 128]", "128 or 256 rows"},
        {"{w1_rows = 192}", "sm_90a", "fp8_block, block: [128, 128]", "128 or 256 rows"},
        {"{w1_rows = 32, w2_rows = 256, tokens = 128}", "sm_90a",
         "fp8_block, block: [128, 128]", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text("tiles.lua",
                   arena_printf(&arena,
                                "return {variant = function(model, cluster, regime)\n"
                                "  return {experts = %s}\nend}\n",
                                cases[i].experts));
        write_text(
            "tiles.yaml",
            arena_printf(&arena,
                         "model: {name: t, num_hidden_layers: 1, hidden_size: 256, "
                         "moe_intermediate_size: 128, num_experts: 8, num_experts_per_tok: 2, "
                         "router: {method: softmax_topk}, activation: swiglu, "
                         "weights: {format: %s}}\npolicy: ./tiles.lua\n",
                         cases[i].weights));
        int code = moec("build tiles.yaml --target %s -o tiles.moe", cases[i].target);
        cr_expect_eq(code, cases[i].told != NULL, "%s on %s: %s", cases[i].experts,
                     cases[i].target, output);
        if (cases[i].told)
            SAYS(cases[i].told);
    }
}

Test(plan, one_rank_with_loads_builds_and_runs) {
    write_deployment("d.yaml", "target: host\nloads: counts.csv\n");
    MOEC("build d.yaml --ep 1 -o d.moe");
    MOEC("run d.moe --device host --layer 3 --tokens 16");
    MOEC("verify d.moe --device host --tokens 1,7");
}

/* What experts multiply in follows from the format, and what that cannot serve is told. */
Test(plan, formats_of_weights_and_of_records) {
    static const struct {
        const char *weights, *packed, *told;
    } cases[] = {
        {"{format: fp8_block, block: [128, 128]}", "fp8_block", NULL},
        {"{format: fp8_tensor}", "fp8_block", NULL},
        {"{format: fp8_block, block: [64, 128]}", "bf16",
         "those of 64 x 128 are multiplied out into bf16"},
        {"{format: mxfp4}", "bf16", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text("m.yaml", arena_printf(&arena,
                                          "name: m\nnum_hidden_layers: 1\nhidden_size: 64\n"
                                          "moe_intermediate_size: 32\nnum_experts: 4\n"
                                          "num_experts_per_tok: 2\nrouter: {method: llama4}\n"
                                          "weights: %s\n",
                                          cases[i].weights));
        cr_assert_eq(moec("explain %s --target host --json", in_dir("m.yaml")), 0, "%s",
                     output);
        cr_expect(strstr(output, arena_printf(&arena, "\"packed\":\"%s\"", cases[i].packed)),
                  "%s: %s", cases[i].weights, output);
        cr_expect_eq(strstr(output, "warning:") != NULL, cases[i].told != NULL, "%s", output);
        cr_expect(!cases[i].told || strstr(output, cases[i].told), "%s", output);
    }
}

Test(plan, the_same_bundle_whatever_the_number_of_threads) {
    write_deployment("d.yaml", arena_printf(&arena, "target: host\n%s", loaded));
    MOEC("build d.yaml -j 1 -o one.moe");
    MOEC("build d.yaml -j 5 -o five.moe");
    cr_expect_str_eq(text_of("one.moe/MANIFEST"), text_of("five.moe/MANIFEST"));
}

/* ---- speed ---- */

static double children_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_CHILDREN, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* CPU time of all threads; sanitizers are many times slower. */
static void plan_in_a_second(const char *loads) {
    char here[PATH_MAX];
    cr_assert(getcwd(here, sizeof here));
    double before = children_seconds();
    MOEC("plan %s/plans/deepseek-v3-ep32.yaml --set loads=%s --format json -o plan.json", here,
         loads);
    double seconds = children_seconds() - before;
    struct printed *p = parse("plan.json");
    double sum = 0;
    for (int i = 0; i < 58; i++)
        sum += p->imbalance[i];
    printf("deepseek-v3-ep32, loads %s: %.3f s of processor, imbalance %.5f\n", loads, seconds,
           sum / 58);
#ifndef __SANITIZE_ADDRESS__
    cr_expect_lt(seconds, 1);
#endif
}

Test(plan, deepseek_v3_on_32_ranks_is_planned_in_a_second) {
    struct buf b = {.arena = &arena};
    unsigned x = 1;
    for (int l = 0; l < 58; l++)
        for (int e = 0; e < 256; e++) {
            x = x * 1664525u + 1013904223u; /* long tails: the product of two uniform numbers */
            buf_printf(&b, "%u%c", (x >> 20) * ((x >> 8) & 4095) / 64, e == 255 ? '\n' : ',');
        }
    write_text("counts.csv", b.data);
    plan_in_a_second(in_dir("counts.csv"));
    static const char recorded[] = "../shared/data/loads/deepseek-v3/decode_in2000out100.csv";
    char *path = realpath(recorded, NULL);
    if (path)
        plan_in_a_second(path);
    else
        printf("%s is not here: only made-up loads were planned\n", recorded);
    free(path);
}

/* ---- wrong usage ---- */

Test(plan, wrong_usage_exits_2) {
    static const char *const wrong[] = {"plan",
                                        "plan a.yaml b.yaml",
                                        "plan d.yaml --format xml",
                                        "plan d.yaml --moves -1",
                                        "plan d.yaml --moves many",
                                        "plan d.yaml -j 0",
                                        "plan d.yaml --start"};
    write_deployment("d.yaml", "");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(moec("%s", wrong[i]), 2, "%s: %s", wrong[i], output);
    cr_expect_eq(moec("plan d.yaml --format sglnag"), 2);
    SAYS("did you mean 'sglang'?");
    cr_expect_eq(moec("plan absent.yaml"), 1);
    cr_expect_eq(moec("plan d.yaml --start absent.json"), 1);
    SAYS("absent.json");
    cr_expect_eq(moec("plan d.yaml -o no/such/folder/plan"), 1);
    SAYS("no/such/folder/plan");
}
