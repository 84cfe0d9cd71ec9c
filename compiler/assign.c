/* Placements that were made before, in every form that moec plan writes: moec's own, TensorRT-LLM's
 * load balancer file, SGLang's expert locations and vLLM's expert map.
 *
 * A form becomes rows, a layer and its list of slots; then all rows are checked alike. */
#include "moec.h"

#include <limits.h>
#include <string.h>

enum { MAX_SLOTS = 1 << 20 };

struct row {
    int layer;      /* the model's own number */
    struct loc key; /* where the layer is named */
    struct node *list;
};
struct rows {
    struct assign_context *c;
    struct row *row;
    int n;
    const char *what; /* the placement, for messages */
    struct loc loc;
    bool may_be_empty; /* -1 marks an empty slot */
};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* ---- rows to assignments ---- */

static int moe_index(const struct model *m, int layer) {
    for (int i = 0; i < m->num_moe_layers; i++)
        if (m->moe_layers[i] == layer)
            return i;
    return -1;
}

static bool read_slots(struct rows *r, const struct row *row, struct assignment *as) {
    struct assign_context *c = r->c;
    int slots = c->num_slots, experts = c->model->num_experts;
    const char *what = arena_printf(c->arena, "layer %d", row->layer);
    if (!node_kind_is(c->diags, row->list, what, NODE_LIST))
        return false;
    if (row->list->count != slots) {
        diag_error(c->diags, row->list->loc,
                   "layer %d: %d slots are listed, but num_slots is %d", row->layer,
                   row->list->count, slots);
        diag_add(c->diags, DIAG_NOTE, c->slots, "num_slots is set here");
        return false;
    }
    bool *placed = arena_array(c->arena, bool, experts);
    *as = (struct assignment){row->layer, arena_array(c->arena, int, slots), row->list->loc};
    for (int i = 0; i < slots; i++) {
        const char *where = arena_printf(c->arena, "layer %d, slot %d", row->layer, i);
        int *e = &as->expert_of_slot[i];
        if (!node_int(c->diags, row->list->items[i], where, r->may_be_empty ? -1 : 0,
                      experts - 1, e))
            return false;
        if (*e >= 0)
            placed[*e] = true;
    }
    for (int e = 0; e < experts; e++)
        if (!placed[e]) {
            diag_error(c->diags, row->list->loc, "layer %d: expert %d is in no slot",
                       row->layer, e);
            return false;
        }
    return true;
}

/* Upstream refuses a missing layer, too. MTP layers may be left out: whether a recording holds
 * them depends on how it was made. */
static void check_missing(struct rows *r, const bool *given) {
    struct assign_context *c = r->c;
    const struct model *m = c->model;
    int *missing[2], n[2] = {0, 0};
    for (int mtp = 0; mtp < 2; mtp++) {
        missing[mtp] = arena_array(c->arena, int, m->num_moe_layers);
        for (int i = 0; i < m->num_moe_layers; i++)
            if (!given[i] && (m->moe_layers[i] >= m->num_hidden_layers) == mtp)
                missing[mtp][n[mtp]++] = m->moe_layers[i];
    }
    if (n[0])
        diag_error(c->diags, r->loc, "%s: missing layers: %s", r->what,
                   layer_ranges(c->arena, missing[0], n[0]));
    else if (n[1])
        diag_add(c->diags, DIAG_NOTE, r->loc, "%s: the policy places MTP layers: %s", r->what,
                 layer_ranges(c->arena, missing[1], n[1]));
}

/* Position of a row's layer among the model's MoE layers, or -1 with an error. */
static int row_index(struct rows *r, const struct row *row) {
    const struct model *m = r->c->model;
    int at = moe_index(m, row->layer);
    if (at < 0)
        diag_error(r->c->diags, row->key, "layer %d is no MoE layer of %s; those are %s",
                   row->layer, m->name,
                   layer_ranges(r->c->arena, m->moe_layers, m->num_moe_layers));
    return at;
}

static bool take_rows(struct rows *r, struct assignment **out, int *n) {
    struct assign_context *c = r->c;
    int before = c->diags->errors, layers = c->model->num_moe_layers;
    struct assignment *by_layer = arena_array(c->arena, struct assignment, layers);
    bool *given = arena_array(c->arena, bool, layers);
    for (int i = 0; i < r->n; i++) {
        int at = row_index(r, &r->row[i]);
        if (at < 0)
            continue;
        if (given[at])
            diag_error(c->diags, r->row[i].key, "layer %d is given twice", r->row[i].layer);
        given[at] = true;
        read_slots(r, &r->row[i], &by_layer[at]);
    }
    if (c->diags->errors == before)
        check_missing(r, given);
    *n = 0;
    *out = by_layer;
    for (int i = 0; i < layers; i++)
        if (by_layer[i].expert_of_slot)
            by_layer[(*n)++] = by_layer[i];
    return c->diags->errors == before;
}

/* Room for as many rows as a list has items. */
static void room(struct rows *r, int n) {
    r->row = arena_array(r->c->arena, struct row, n);
}

static void add_row(struct rows *r, int layer, struct loc key, struct node *list) {
    r->row[r->n++] = (struct row){layer, key, list};
}

/* What the placement says of num_slots, against what was known before. */
static bool take_slots(struct assign_context *c, int slots, struct loc loc) {
    if (!c->num_slots) {
        c->num_slots = slots;
        c->slots = loc;
        return true;
    }
    if (c->num_slots == slots)
        return true;
    diag_error(c->diags, loc, "the placement has %d slots, but num_slots is %d", slots,
               c->num_slots);
    diag_add(c->diags, DIAG_NOTE, c->slots, "num_slots is set here");
    return false;
}

static bool check_ranks(struct assign_context *c, const struct node *n, const char *key) {
    const struct cluster *k = c->cluster;
    int ranks;
    if (!node_int(c->diags, n, key, 1, INT_MAX, &ranks))
        return false;
    if (ranks == k->ranks)
        return true;
    diag_error(c->diags, n->loc, "%s: %d, but the cluster has %d ranks", key, ranks, k->ranks);
    if (k->ranks_loc.source)
        diag_add(c->diags, DIAG_NOTE, k->ranks_loc, "ranks is set here");
    return false;
}

/* ---- TensorRT-LLM ---- */

bool assign_map(struct assign_context *c, struct node *map, struct assignment **out, int *n) {
    struct rows r = {.c = c, .what = "initial_global_assignments", .loc = map->loc};
    bool ok = true;
    room(&r, map->count);
    for (int i = 0; i < map->count; i++) {
        struct node plain = *map->keys[i];
        int layer;
        plain.quoted = false; /* JSON knows no other keys */
        if (node_int(c->diags, &plain, "a layer of initial_global_assignments", 0, INT_MAX,
                     &layer))
            add_row(&r, layer, map->keys[i]->loc, map->items[i]);
        else
            ok = false;
    }
    return take_rows(&r, out, n) && ok;
}

static bool read_trtllm(struct assign_context *c, struct node *root, struct assignment **out,
                        int *n) {
    static const char *const legal[] = {"num_slots", "layer_updates_per_iter",
                                        "initial_global_assignments", "ep_size"};
    struct node *map = map_get(root, "initial_global_assignments"), *v;
    int slots, updates;
    bool ok = node_kind_is(c->diags, map, "initial_global_assignments", NODE_MAP);
    if (!(v = map_get(root, "num_slots"))) {
        diag_error(c->diags, root->loc, "num_slots is missing");
        return false;
    }
    ok = ok && node_int(c->diags, v, "num_slots", 1, MAX_SLOTS, &slots) &&
         take_slots(c, slots, v->loc);
    if ((v = map_get(root, "layer_updates_per_iter")))
        ok = node_int(c->diags, v, "layer_updates_per_iter", 0, INT_MAX, &updates) && ok;
    if (v && ok && updates)
        diag_add(c->diags, DIAG_NOTE, v->loc,
                 "layer_updates_per_iter: only the assignments are taken from this file");
    if ((v = map_get(root, "ep_size")))
        ok = check_ranks(c, v, "ep_size") && ok;
    ok = map_unused(c->diags, root, "the placement", legal, COUNT(legal)) && ok;
    return ok && assign_map(c, map, out, n);
}

/* ---- moec ---- */

static bool own_layer(struct rows *r, struct node *item) {
    static const char *const legal[] = {"layer",     "expert_of_slot", "share_of_slot",
                                        "imbalance", "imbalance_even", "bound"};
    struct diags *d = r->c->diags;
    int layer;
    if (!node_kind_is(d, item, "a layer", NODE_MAP))
        return false;
    struct node *number = map_get(item, "layer"), *slots = map_get(item, "expert_of_slot");
    for (int i = 2; i < COUNT(legal); i++)
        map_get(item, legal[i]); /* follow from the slots and the loads */
    if (!number || !slots) {
        diag_error(d, item->loc, "a layer needs the keys layer and expert_of_slot");
        return false;
    }
    if (!node_int(d, number, "layer", 0, INT_MAX, &layer) ||
        !map_unused(d, item, "a layer", legal, COUNT(legal)))
        return false;
    add_row(r, layer, number->loc, slots);
    return true;
}

static bool read_own(struct assign_context *c, struct node *root, struct assignment **out,
                     int *n) {
    static const char *const legal[] = {"model", "ranks", "slots_per_rank", "layers"};
    struct node *list = map_get(root, "layers"), *ranks = map_get(root, "ranks"),
                *slots = map_get(root, "slots_per_rank");
    struct rows r = {.c = c, .what = "layers", .loc = list->loc, .may_be_empty = true};
    int per_rank;
    bool ok = true;
    map_get(root, "model"); /* a name, nothing more: what counts is the shape */
    if (!ranks || !slots) {
        diag_error(c->diags, root->loc, "a placement needs ranks and slots_per_rank");
        return false;
    }
    if (!map_unused(c->diags, root, "the placement", legal, COUNT(legal)) ||
        !node_kind_is(c->diags, list, "layers", NODE_LIST) || !check_ranks(c, ranks, "ranks") ||
        !node_int(c->diags, slots, "slots_per_rank", 1, MAX_SLOTS / c->cluster->ranks,
                  &per_rank) ||
        !take_slots(c, per_rank * c->cluster->ranks, slots->loc))
        return false;
    room(&r, list->count);
    for (int i = 0; i < list->count; i++)
        ok = own_layer(&r, list->items[i]) && ok;
    return ok && take_rows(&r, out, n);
}

/* ---- lists of lists: SGLang and vLLM ---- */

/* The decoder's MoE layers; MTP layers belong to a draft model there. */
static int decoder_layers(const struct model *m) {
    int n = m->num_moe_layers;
    while (n && m->moe_layers[n - 1] >= m->num_hidden_layers)
        n--;
    return n;
}

/* One list per layer: of all decoder layers when all is true, else of the MoE layers. */
static bool read_lists(struct assign_context *c, struct node *list, const char *what, bool all,
                       struct assignment **out, int *n) {
    const struct model *m = c->model;
    int moe = decoder_layers(m), want = all ? m->num_hidden_layers : moe;
    struct rows r = {.c = c, .what = what, .loc = list->loc};
    if (!node_kind_is(c->diags, list, what, NODE_LIST))
        return false;
    if (list->count != want) {
        diag_error(c->diags, list->loc, "%s: %d lists, but %s has %d %s", what, list->count,
                   m->name, want, all ? "decoder layers" : "MoE layers");
        return false;
    }
    room(&r, moe);
    for (int i = 0; i < moe; i++) {
        struct node *row = list->items[all ? m->moe_layers[i] : i];
        if (!i && row->kind == NODE_LIST && !take_slots(c, row->count, row->loc))
            return false;
        add_row(&r, m->moe_layers[i], row->loc, row);
    }
    return take_rows(&r, out, n);
}

static bool read_sglang(struct assign_context *c, struct node *root, struct assignment **out,
                        int *n) {
    static const char *const legal[] = {"physical_to_logical_map"};
    struct node *list = map_get(root, legal[0]);
    map_get(root, "logical_count"); /* SGLang does not look at it beside a map */
    return map_unused(c->diags, root, "the placement", legal, COUNT(legal)) &&
           read_lists(c, list, legal[0], true, out, n);
}

/* ---- vLLM's expert map ---- */

/* A value of a map that must be there. */
static struct node *need(struct assign_context *c, struct node *map, const char *key) {
    struct node *n = map->kind == NODE_MAP ? map_get(map, key) : NULL;
    if (!n)
        diag_error(c->diags, map->loc, "the expert map lacks %s here", key);
    return n;
}

/* device_list: the slots of each rank, as one list. */
static struct node *join_devices(struct assign_context *c, struct node *devices) {
    struct node *all = arena_array(c->arena, struct node, 1);
    int ranks = c->cluster->ranks, n = 0;
    if (!node_kind_is(c->diags, devices, "device_list", NODE_LIST))
        return NULL;
    if (devices->count != ranks) {
        diag_error(c->diags, devices->loc,
                   "device_list: %d devices, but the cluster has %d ranks", devices->count,
                   ranks);
        return NULL;
    }
    struct node **list = arena_array(c->arena, struct node *, ranks);
    for (int i = 0; i < ranks; i++) {
        struct node *id = need(c, devices->items[i], "device_id");
        int rank;
        if (!id || !node_int(c->diags, id, "device_id", i, i, &rank) ||
            !(list[i] = need(c, devices->items[i], "device_expert")) ||
            !node_kind_is(c->diags, list[i], "device_expert", NODE_LIST))
            return NULL;
        if (list[i]->count != list[0]->count) {
            diag_error(c->diags, list[i]->loc, "device_expert: %d slots, but device 0 has %d",
                       list[i]->count, list[0]->count);
            return NULL;
        }
        n += list[i]->count;
    }
    *all = (struct node){.kind = NODE_LIST, .loc = devices->loc};
    all->items = arena_array(c->arena, struct node *, n);
    for (int i = 0; i < ranks; i++)
        for (int s = 0; s < list[i]->count; s++)
            all->items[all->count++] = list[i]->items[s];
    return all;
}

static bool map_layer(struct rows *r, struct node *item, int index) {
    struct assign_context *c = r->c;
    struct node *id = need(c, item, "layer_id"), *count = need(c, item, "device_count");
    struct node *devices = need(c, item, "device_list");
    int layer;
    if (!id || !count || !devices || !check_ranks(c, count, "device_count") ||
        !node_int(c->diags, id, "layer_id", index, index, &layer))
        return false;
    struct node *slots = join_devices(c, devices);
    if (!slots || (!index && !take_slots(c, slots->count, devices->loc)))
        return false;
    add_row(r, c->model->moe_layers[index], id->loc, slots);
    return true;
}

/* layer_id counts the MoE layers from 0. */
static bool read_vllm(struct assign_context *c, struct node *root, struct assignment **out,
                      int *n) {
    static const char *const legal[] = {"moe_layer_count", "layer_list"};
    struct node *list = map_get(root, "layer_list"), *count = need(c, root, "moe_layer_count");
    struct rows r = {.c = c, .what = "layer_list", .loc = list->loc};
    int moe = decoder_layers(c->model), layers;
    if (!count || !node_int(c->diags, count, "moe_layer_count", moe, moe, &layers) ||
        !map_unused(c->diags, root, "the placement", legal, COUNT(legal)) ||
        !node_kind_is(c->diags, list, "layer_list", NODE_LIST))
        return false;
    if (list->count != moe) {
        diag_error(c->diags, list->loc, "layer_list: %d layers, but %s has %d MoE layers",
                   list->count, c->model->name, moe);
        return false;
    }
    room(&r, moe);
    for (int i = 0; i < moe; i++)
        if (!map_layer(&r, list->items[i], i))
            return false;
    return take_rows(&r, out, n);
}

/* ---- any of them ---- */

static bool has(struct node *root, const char *key) {
    for (int i = 0; i < root->count; i++)
        if (!strcmp(root->keys[i]->text, key))
            return true;
    return false;
}

bool assign_file(struct assign_context *c, const char *path, struct assignment **out, int *n) {
    struct node *root = yaml_read(c->arena, c->diags, path);
    if (!root)
        return false;
    if (root->kind == NODE_LIST)
        return read_lists(c, root, "the expert map", false, out, n);
    if (!node_kind_is(c->diags, root, "a placement", NODE_MAP))
        return false;
    if (has(root, "layers"))
        return read_own(c, root, out, n);
    if (has(root, "initial_global_assignments"))
        return read_trtllm(c, root, out, n);
    if (has(root, "physical_to_logical_map"))
        return read_sglang(c, root, out, n);
    if (has(root, "layer_list"))
        return read_vllm(c, root, out, n);
    if (has(root, "logical_count"))
        diag_error(
            c->diags, root->loc,
            "logical_count is a recording, not a placement: name the file under 'loads'");
    else
        diag_error(c->diags, root->loc,
                   "no placement: none of layers (moec), initial_global_assignments "
                   "(TensorRT-LLM), physical_to_logical_map (SGLang) and layer_list (vLLM) is "
                   "here");
    return false;
}
