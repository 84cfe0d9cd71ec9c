/* Files that place experts in slots, read without a model: TensorRT-LLM's load balancer file and
 * the JSON of moec plan. */
#include "loads.h"

#include <limits.h>
#include <string.h>

enum { MAX_SLOTS = 1 << 20 };

struct reader {
    struct arena *arena;
    struct diags *diags;
    struct slots *out;
};

static bool read_layer(struct reader *r, const struct node *list, int layer, int least,
                       struct assignment *as) {
    const char *what = arena_printf(r->arena, "layer %d", layer);
    if (!node_kind_is(r->diags, list, what, NODE_LIST))
        return false;
    if (list->count != r->out->num_slots) {
        diag_error(r->diags, list->loc, "layer %d: %d slots are listed, but there are %d",
                   layer, list->count, r->out->num_slots);
        return false;
    }
    *as = (struct assignment){layer, arena_array(r->arena, int, list->count), list->loc};
    for (int i = 0; i < list->count; i++)
        if (!node_int(r->diags, list->items[i],
                      arena_printf(r->arena, "layer %d, slot %d", layer, i), least,
                      LOADS_MAX_EXPERTS - 1, &as->expert_of_slot[i]))
            return false;
    for (int i = 0; i < r->out->num_assignments; i++)
        if (r->out->assignments[i].layer == layer) {
            diag_error(r->diags, list->loc, "layer %d is given twice", layer);
            return false;
        }
    return true;
}

static bool read_balancer(struct reader *r, struct node *root) {
    static const char *const legal[] = {"num_slots", "initial_global_assignments", "ep_size",
                                        "layer_updates_per_iter"};
    struct diags *d = r->diags;
    struct node *slots = map_get(root, legal[0]), *map = map_get(root, legal[1]), *n;
    if (!slots || !map || node_is_null(slots) || node_is_null(map)) {
        diag_error(d, root->loc, "no '%s': it places nothing", legal[slots ? 1 : 0]);
        return false;
    }
    bool ok = node_int(d, slots, legal[0], 1, MAX_SLOTS, &r->out->num_slots) &&
              node_kind_is(d, map, legal[1], NODE_MAP);
    if ((n = map_get(root, legal[2])) && !node_is_null(n))
        ok &= node_int(d, n, legal[2], 1, MAX_SLOTS, &r->out->ranks);
    if ((n = map_get(root, legal[3])) && !node_is_null(n))
        ok &= node_int(d, n, legal[3], 0, INT_MAX, &r->out->updates);
    ok &= map_unused(d, root, "load_balancer", legal, sizeof legal / sizeof *legal);
    r->out->assignments = arena_array(r->arena, struct assignment, map->count);
    for (int i = 0; ok && i < map->count; i++) {
        struct node key = *map->keys[i];
        int layer;
        key.quoted = false; /* JSON knows no other keys */
        ok = node_int(d, &key, "a layer of initial_global_assignments", 0, LOADS_MAX_LAYER,
                      &layer) &&
             read_layer(r, map->items[i], layer, 0, &r->out->assignments[i]);
        r->out->num_assignments += ok;
    }
    return ok;
}

/* {"ranks": R, "slots_per_rank": S, "layers": [{"layer": 3, "expert_of_slot": [...]}, ...]};
 * the other keys are not about slots. */
static bool read_plan(struct reader *r, struct node *root) {
    struct diags *d = r->diags;
    struct node *layers = map_get(root, "layers"), *ranks = map_get(root, "ranks"),
                *per_rank = map_get(root, "slots_per_rank");
    int slots_per_rank;
    if (!layers || !ranks) {
        diag_error(d, root->loc, "no '%s': expected the JSON of moec plan",
                   layers ? "ranks" : "layers");
        return false;
    }
    bool ok = node_int(d, ranks, "ranks", 1, MAX_SLOTS, &r->out->ranks) &&
              node_int(d, per_rank, "slots_per_rank", 1, MAX_SLOTS / r->out->ranks,
                       &slots_per_rank) &&
              node_kind_is(d, layers, "layers", NODE_LIST);
    if (!ok)
        return false;
    r->out->num_slots = r->out->ranks * slots_per_rank;
    r->out->assignments = arena_array(r->arena, struct assignment, layers->count);
    for (int i = 0; ok && i < layers->count; i++) {
        struct node *map = layers->items[i], *n = NULL, *list = NULL;
        int layer;
        if (node_kind_is(d, map, "an entry of layers", NODE_MAP) &&
            !((n = map_get(map, "layer")) && (list = map_get(map, "expert_of_slot"))))
            diag_error(d, map->loc, "no '%s'", n ? "expert_of_slot" : "layer");
        ok = n && list && node_int(d, n, "layer", 0, LOADS_MAX_LAYER, &layer) &&
             read_layer(r, list, layer, -1, &r->out->assignments[i]);
        r->out->num_assignments += ok;
    }
    return ok;
}

bool slots_read(struct arena *a, struct diags *d, const char *path, struct slots *out) {
    struct reader r = {a, d, out};
    struct node *root = yaml_read(a, d, path);
    *out = (struct slots){.path = path};
    if (!root || !node_kind_is(d, root, "a placement", NODE_MAP))
        return false;
    out->loc = root->loc;
    bool plan = false;
    for (int i = 0; i < root->count; i++)
        plan |= !strcmp(root->keys[i]->text, "slots_per_rank");
    if (!(plan ? read_plan : read_balancer)(&r, root))
        return false;
    if (out->ranks && out->num_slots % out->ranks) {
        diag_error(d, out->loc, "%d slots are not divisible by %d ranks", out->num_slots,
                   out->ranks);
        return false;
    }
    if (!out->num_assignments)
        diag_error(d, out->loc, "no layer is placed");
    return out->num_assignments;
}
