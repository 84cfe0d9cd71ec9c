/* Moves that are not worth their bytes are taken back.
 *
 * The searches take whatever helps, since two ranks that are equally hot must both be relieved before
 * their maximum falls. Here every move answers for itself: the one whose loss is smallest goes back
 * first, then what is left is asked again, so that few moves keep what the many gained. Where batches
 * are split as well as can be, some of the moves are then replaced by others, again and again. */
#include "balance_state.h"

#include <string.h>

enum { SWEEPS = 40, ROUNDS = 4, KICKS = 3 };

/* A slot back to what base has there, alone or by an exchange with another. */
struct back {
    int slot, with; /* with -1: alone */
};

static double figure(struct balance_state *s) {
    double sum = 0;
    if (s->p->split == BALANCE_EVEN || (s->p->split == BALANCE_SHARE && s->workloads > 1)) {
        even_value(s);
        for (int w = 0; w < s->workloads; w++) {
            int hot = s->order[(size_t)w * s->ranks];
            sum += s->weight[w] * s->time[(size_t)hot * s->workloads + w];
        }
        return sum;
    }
    for (int w = 0; w < s->workloads; w++)
        sum += s->weight[w] * balanced_time(s, s->expert_of_slot, w, SWEEPS, NULL);
    return sum;
}

static void exchange(struct balance_state *s, int a, int b) {
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b];
    state_put(s, a, -1);
    state_put(s, b, ea);
    state_put(s, a, eb);
}

/* The same call takes the step and, given what the slot held, takes it back. */
static void step(struct balance_state *s, const struct back *b, int expert) {
    if (b->with < 0)
        state_put(s, b->slot, expert);
    else
        exchange(s, b->slot, b->with);
}

/* A slot that was empty stays filled: emptying it is no move. */
static bool may(struct balance_state *s, const int *base, const struct back *b) {
    int old = base[b->slot];
    if (b->with < 0)
        return old >= 0 && state_may_rewrite(s, b->slot, old);
    return s->expert_of_slot[b->with] == old && base[b->with] != old &&
           state_may_swap(s, b->slot, b->with);
}

/* The step back that loses least per slot whose weights stay, less than worth; false: none. */
static bool least_loss(struct balance_state *s, const int *base, double now, double worth,
                       struct back *out) {
    double least = worth;
    bool found = false;
    for (int i = 0; i < s->slots; i++)
        for (int j = -1; s->expert_of_slot[i] != base[i] && j < s->slots; j++) {
            struct back b = {i, j};
            int held = s->expert_of_slot[i], moved = s->moved;
            if (i == j || !may(s, base, &b))
                continue;
            step(s, &b, base[i]);
            moved -= s->moved;
            double loss = moved > 0 ? (figure(s) - now) / moved : worth;
            step(s, &b, held);
            if (loss < least) {
                least = loss;
                *out = b;
                found = true;
            }
        }
    return found;
}

static void prune(struct balance_state *s, const int *base) {
    struct back b;
    double now = figure(s);
    while (least_loss(s, base, now, s->p->worth, &b)) {
        step(s, &b, base[b.slot]);
        now = figure(s);
    }
}

/* ---- other moves in the place of some ---- */

static int *keep(struct balance_state *s, int *into) {
    return memcpy(into, s->expert_of_slot, sizeof *into * s->slots);
}

/* Takes a random move back, if there is one that can go alone or with another. */
static void kick(struct balance_state *s, const int *base) {
    int slot = state_pick(s, s->slots);
    for (int i = 0; i < s->slots; i++, slot = slot + 1 < s->slots ? slot + 1 : 0) {
        if (s->expert_of_slot[slot] == base[slot])
            continue;
        for (int j = -1; j < s->slots; j++) {
            struct back b = {slot, j};
            if (j == slot || !may(s, base, &b))
                continue;
            step(s, &b, base[slot]);
            return;
        }
    }
}

/* What the slots are and what it cost to bring them there. */
static double price(struct balance_state *s) {
    return figure(s) + s->p->worth * s->moved;
}

void worth_search(struct balance_state *s, const int *base, bool pour) {
    int *kept = state_alloc(s, s->slots, sizeof *kept);
    prune(s, base);
    double best = price(s);
    keep(s, kept);
    for (int round = 0; pour && s->moved && round < ROUNDS; round++) {
        for (int kicks = 1 + state_pick(s, KICKS); kicks; kicks--)
            kick(s, base);
        pour_search(s, 0);
        prune(s, base);
        double now = price(s);
        if (now <= best) {
            best = now;
            keep(s, kept);
        } else {
            even_reset(s, kept);
        }
    }
    even_reset(s, base);
    if (price(s) > best)
        even_reset(s, kept);
}
