/* A bundle open on a device, for the commands that run one. */
#ifndef MOEC_DEVICE_H
#define MOEC_DEVICE_H

#include "../runtime/tool.h"
#include "moec.h"

struct session {
    moert_bundle *bundle;
    moert_world *world;     /* NULL: one rank */
    moert_context *context; /* of rank 0 */
    moert_context *rank[MOE_MAX_RANKS];
    struct moert_tool_device device;
    bool cuda;
};
/* Opens dir on "host", "cuda", or, when device is NULL, on a GPU if one is there and else on the
 * host. With `ranks` all ranks of its plan are opened, in one local world; else a bundle of several
 * is an error. Says what is wrong on stderr and returns false. */
bool session_open(struct session *s, const char *dir, const char *device, bool ranks);
void session_close(struct session *s);
/* True when r is MOERT_OK; else prints what failed and the runtime's own words. */
bool session_ok(moert_result r, const char *what);
/* Whether the bundle has the layer; says which it has when not. */
bool session_has_layer(const struct session *s, int layer);
/* Creates and fills a rank's layer: from weights (a file or folder), or random when weights is NULL.
 * NULL, after a message, on failure. */
moert_layer *session_layer(struct session *s, int rank, int layer, const char *weights,
                           unsigned long long seed);
/* Whether no layer before the bundle's i-th has its class. */
bool session_first_of_class(const struct session *s, int i);
/* A bundle's plan.bin as a plan's records, after the runtime's own checks; has no placement and no
 * deployment. False after a message. */
bool bundle_plan(struct arena *a, const char *dir, struct plan *p);
/* The cluster that a bundle's plan.yaml names, with the figures of its GPU's table; one rank of no
 * particular GPU when it names none. NULL on error. */
struct cluster *bundle_cluster(struct arena *a, struct diags *d, struct node *root);
/* "moec: error: ..." on stderr; returns false. */
bool say_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Usage on stdout (help) or stderr: returns 0 or 2. */
int say_usage(const char *text, bool help);
/* An option's number within [min, max]; false after a message. */
bool option_int(const char *name, const char *text, long long min, long long max, int *out);
bool option_device(const char *text, const char **out); /* "host" or "cuda" */
bool option_double(const char *name, const char *text, double min, double max, double *out);
/* Numbers of at least min, separated by commas, appended to list[*n]. */
bool option_list(const char *name, const char *text, int min, int *list, int max, int *n);

#endif
