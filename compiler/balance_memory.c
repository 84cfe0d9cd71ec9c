/* The engine's memory. The compiler may abort without any; a server that the runtime is part of may
 * not: inside balance_within a lack of memory ends the call, and what it had taken is given back. */
#include "balance.h"

#include <setjmp.h>
#include <stdlib.h>

struct taken { /* in front of each piece */
    struct taken *prev, *next;
    _Alignas(16) char data[]; /* for anything, four floats at a time included */
};

static _Thread_local jmp_buf *within;     /* NULL: outside */
static _Thread_local struct taken *first; /* inside: what was taken there */

_Thread_local long balance_allocations = -1;

static _Noreturn void no_memory(void) {
    if (!within)
        abort();
    longjmp(*within, 1);
}

void *balance_alloc(size_t n, size_t size) {
    struct taken *t = NULL;
    if (n < ((size_t)-1 >> 1) / (size ? size : 1) && balance_allocations)
        t = calloc(1, sizeof *t + n * size);
    if (!t)
        no_memory();
    balance_allocations -= balance_allocations > 0;
    if (within) {
        t->next = first;
        if (first)
            first->prev = t;
        first = t;
    }
    return t->data;
}

void balance_free(void *p) {
    if (!p)
        return;
    struct taken *t = (struct taken *)((char *)p - offsetof(struct taken, data));
    if (t->prev)
        t->prev->next = t->next;
    else if (first == t)
        first = t->next;
    if (t->next)
        t->next->prev = t->prev;
    free(t);
}

bool balance_within(void (*fn)(void *user), void *user) {
    jmp_buf back;
    volatile bool done = false;
    within = &back;
    if (!setjmp(back)) {
        fn(user);
        done = true;
    }
    within = NULL;
    for (struct taken *next; first; first = next) { /* nothing when all went well */
        next = first->next;
        free(first);
    }
    return done;
}
