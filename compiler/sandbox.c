/* The child of a policy call: a process that can compute and write to one pipe, and in it a Lua
 * state of which the same is true. It may hold whatever memory, time and result the limits allow;
 * when one is reached it says so and ends, so that nothing in Lua can catch it. */
#define _GNU_SOURCE
#include "balance.h"
#include "policy.h"

#include <lua5.4/lauxlib.h>
#include <lua5.4/lua.h>
#include <lua5.4/lualib.h>

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

enum {
    HOOK_STEPS = 1000,        /* instructions between two looks at the budget */
    BYTES_PER_STEP = 32,      /* what allocating costs, so that C loops cost, too */
    SPARE_MEMORY = 128 << 20, /* of the process, beside Lua's objects */
};
#define CHUNK "policy" /* what Lua calls the policy's text in messages */

/* One call in one process; a signal handler reads it. */
static struct {
    int fd;
    volatile sig_atomic_t line;    /* being executed */
    volatile sig_atomic_t sending; /* the result is under way */
    long long steps;
    size_t used; /* bytes of Lua objects */
    int notes, values;
    bool quiet; /* print says nothing: it was heard when the policy was opened */
    int error_line;
    char *out; /* the result */
    size_t len, cap;
} box;

/* ---- records ---- */

static void write_all(const void *data, size_t len) {
    for (const char *p = data; len;) {
        ssize_t n = write(box.fd, p, len);
        if (n < 0 && errno != EINTR)
            _exit(1);
        if (n > 0) {
            p += n;
            len -= (size_t)n;
        }
    }
}

static void send_record(char type, int line, const void *data, size_t len) {
    char head[RECORD_HEAD];
    int32_t at = line;
    uint32_t n = (uint32_t)len;
    head[0] = type;
    memcpy(head + 1, &at, 4);
    memcpy(head + 5, &n, 4);
    write_all(head, sizeof head);
    write_all(data, len);
}

static void __attribute__((noreturn)) fail_at(int line, const char *text) {
    box.sending = 1;
    send_record(RECORD_ERROR, line, text, strnlen(text, POLICY_NOTE));
    _exit(0);
}

static void __attribute__((noreturn)) fail(const char *text) {
    fail_at(box.line, text);
}

/* ---- limits ---- */

static void on_timer(int signal) {
    if (box.sending)
        return;
    if (signal == SIGPROF)
        fail("stopped: it took 3 s of processor time, and that is all there is");
    fail("stopped: it took 8 s in all, and that is all there is");
}

void sandbox_charge(struct lua_State *L, long long steps) {
    (void)L;
    box.steps += steps;
    if (box.steps > POLICY_STEPS)
        fail("stopped: it took 100 million instructions, and that is all there is");
}

static void on_hook(lua_State *L, lua_Debug *ar) {
    if (ar->event == LUA_HOOKLINE)
        box.line = ar->currentline;
    else
        sandbox_charge(L, HOOK_STEPS);
}

static void *allocate(void *user, void *old, size_t old_size, size_t size) {
    (void)user;
    if (!old)
        old_size = 0;
    if (size > old_size) {
        sandbox_charge(NULL, 1 + (long long)((size - old_size) / BYTES_PER_STEP));
        if (size - old_size > POLICY_MEMORY - box.used)
            return NULL;
    }
    if (!size) {
        free(old);
        box.used -= old_size;
        return NULL;
    }
    void *p = realloc(old, size);
    if (p)
        box.used = box.used - old_size + size;
    return p;
}

static void limit(int what, rlim_t value) {
    struct rlimit now, r = {value, value};
    if (!getrlimit(what, &now) && now.rlim_max < value)
        r.rlim_cur = r.rlim_max = now.rlim_max;
    if (setrlimit(what, &r))
        fail("the limits of a policy's process cannot be set");
}

static void close_files(void) {
    int fd = 3;
    if (box.fd != fd && dup2(box.fd, fd) < 0)
        fail("the files of a policy's process cannot be closed");
    box.fd = fd;
#ifdef __SANITIZE_ADDRESS__
    int first = STDIN_FILENO, last = STDIN_FILENO; /* a report goes to stderr */
#else
    int first = STDIN_FILENO, last = STDERR_FILENO;
#endif
    for (int i = first; i <= last; i++)
        close(i);
    if (!syscall(SYS_close_range, 4u, ~0u, 0u))
        return;
    for (int i = 4, most = (int)sysconf(_SC_OPEN_MAX); i < most && i < 1 << 16; i++)
        close(i);
}

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define THIS_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__) && !defined(__SANITIZE_ADDRESS__)
#define THIS_ARCH AUDIT_ARCH_AARCH64
#endif

#ifdef THIS_ARCH
/* Calls of the system that computing and writing to an open pipe need. */
static const int allowed[] = {
    SYS_write,  SYS_exit,     SYS_exit_group, SYS_brk,   SYS_mmap,         SYS_munmap,
    SYS_mremap, SYS_mprotect, SYS_madvise,    SYS_futex, SYS_rt_sigreturn, SYS_rt_sigprocmask,
};
enum { NUM_ALLOWED = sizeof allowed / sizeof *allowed };

/* Everything else fails with EPERM. Where the kernel has no filters the other limits stay. */
static void filter_calls(void) {
    struct sock_filter code[4 + NUM_ALLOWED + 2];
    int n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             offsetof(struct seccomp_data, arch));
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCH, 1, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             offsetof(struct seccomp_data, nr));
    for (int i = 0; i < NUM_ALLOWED; i++)
        code[n++] =
            (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)allowed[i],
                                         (unsigned char)(NUM_ALLOWED - i), 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {(unsigned short)n, code};
    if (!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
#else
static void filter_calls(void) {}
#endif

/* Address space now, bytes; 0: not known, or of no use as under a sanitizer. */
static size_t size_now(void) {
#ifdef __SANITIZE_ADDRESS__
    return 0;
#endif
    char text[64] = "";
    unsigned long pages = 0;
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
        pages = strtoul(text, NULL, 10);
    if (fd >= 0)
        close(fd);
    return pages * (size_t)sysconf(_SC_PAGESIZE);
}

static void set_timer(int which, int signal, double seconds) {
    struct sigaction act = {.sa_handler = on_timer};
    struct itimerval t = {{1, 0}, {(time_t)seconds, (suseconds_t)(fmod(seconds, 1) * 1e6) + 1}};
    sigaction(signal, &act, NULL);
    setitimer(which, &t, NULL);
}

static void confine(double seconds) {
    sigset_t none;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close_files();
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    set_timer(ITIMER_PROF, SIGPROF, POLICY_CPU);
    set_timer(ITIMER_REAL, SIGALRM, seconds);
    size_t size = size_now();
    if (size) /* known, and no sanitizer's */
        limit(RLIMIT_AS, size + POLICY_MEMORY + POLICY_RESULT + SPARE_MEMORY);
    limit(RLIMIT_CPU, (rlim_t)POLICY_WALL);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_FSIZE, 0);
    limit(RLIMIT_NPROC, 0);
    limit(RLIMIT_NOFILE, 0);
    filter_calls();
}

/* ---- Lua's own functions, where they depend on the machine or would not end ---- */

/* Tables and functions print as what they are: addresses differ between runs. */
static const char *to_text(lua_State *L, int at) {
    at = lua_absindex(L, at);
    int type = lua_type(L, at);
    bool plain =
        type == LUA_TNIL || type == LUA_TBOOLEAN || type == LUA_TNUMBER || type == LUA_TSTRING;
    if (!plain && luaL_getmetafield(L, at, "__tostring") == LUA_TNIL)
        return lua_pushstring(L, lua_typename(L, type));
    if (!plain)
        lua_pop(L, 1);
    return luaL_tolstring(L, at, NULL);
}

static int lib_tostring(lua_State *L) {
    luaL_checkany(L, 1);
    to_text(L, 1);
    return 1;
}

/* Goes to the diagnostics as a note. */
static int lib_print(lua_State *L) {
    luaL_Buffer b;
    lua_Debug ar;
    size_t len;
    int n = lua_gettop(L), line = box.line;
    lua_settop(L, n);
    luaL_buffinit(L, &b);
    for (int i = 1; i <= n; i++) {
        if (i > 1)
            luaL_addchar(&b, '\t');
        to_text(L, i);
        luaL_addvalue(&b);
    }
    luaL_pushresult(&b);
    const char *text = lua_tolstring(L, -1, &len);
    if (lua_getstack(L, 1, &ar) && lua_getinfo(L, "l", &ar) && ar.currentline > 0)
        line = ar.currentline;
    if (!box.quiet && box.notes++ < POLICY_NOTES) {
        box.sending = 1;
        send_record(RECORD_NOTE, line, text, len < POLICY_NOTE ? len : POLICY_NOTE);
        box.sending = 0;
    }
    return 0;
}

static int lib_setmetatable(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    if (lua_istable(L, 2)) {
        lua_pushliteral(L, "__gc");
        if (lua_rawget(L, 2) != LUA_TNIL)
            return luaL_error(L, "setmetatable: a policy has no __gc");
        lua_pop(L, 1);
    }
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, 1);
    return 1;
}

/* string.format without addresses. */
static int lib_format(lua_State *L) {
    size_t len;
    const char *format = luaL_checklstring(L, 1, &len);
    int n = lua_gettop(L);
    for (size_t i = 0; i < len; i++)
        if (format[i] == '%') {
            i += 1 + strspn(format + i + 1, "-+ #0123456789.");
            if (i < len && format[i] == 'p')
                return luaL_error(L, "string.format: a policy has no %%p");
        }
    for (int i = 2; i <= n; i++)
        if (lua_type(L, i) >= LUA_TTABLE || lua_type(L, i) == LUA_TLIGHTUSERDATA) {
            to_text(L, i);
            lua_replace(L, i);
        }
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, n, 1);
    return 1;
}

/* ---- pairs and next in order: numbers, strings by their bytes, false, true ---- */

static int rank_of_type(int type) {
    return type == LUA_TNUMBER ? 0 : type == LUA_TSTRING ? 1 : type == LUA_TBOOLEAN ? 2 : 3;
}

static int compare_numbers(lua_State *L, int a, int b) {
    if (lua_isinteger(L, a) && lua_isinteger(L, b)) {
        lua_Integer x = lua_tointeger(L, a), y = lua_tointeger(L, b);
        return (x > y) - (x < y);
    }
    return lua_compare(L, a, b, LUA_OPLT) ? -1 : lua_compare(L, b, a, LUA_OPLT);
}

/* Order of two keys; a and b are absolute. */
static int compare_keys(lua_State *L, int a, int b) {
    int ta = rank_of_type(lua_type(L, a)), tb = rank_of_type(lua_type(L, b));
    if (ta == 3 || tb == 3)
        luaL_error(L, "pairs: keys of type %s have no order",
                   luaL_typename(L, ta == 3 ? a : b));
    if (ta != tb)
        return ta - tb;
    if (ta == 0)
        return compare_numbers(L, a, b);
    if (ta == 2)
        return lua_toboolean(L, a) - lua_toboolean(L, b);
    size_t la, lb;
    const char *x = lua_tolstring(L, a, &la), *y = lua_tolstring(L, b, &lb);
    int order = memcmp(x, y, la < lb ? la : lb);
    return order ? order : (la > lb) - (la < lb);
}

/* Whether a comes before b, under the function at 2 or, without one, as keys or as Lua's <. */
enum order { ORDER_KEYS, ORDER_LESS, ORDER_FUNCTION };
static bool before(lua_State *L, enum order order, int a, int b) {
    if (order == ORDER_KEYS)
        return compare_keys(L, a, b) < 0;
    if (order == ORDER_LESS)
        return lua_compare(L, a, b, LUA_OPLT);
    lua_pushvalue(L, 2);
    lua_pushvalue(L, a);
    lua_pushvalue(L, b);
    lua_call(L, 2, 1);
    bool yes = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return yes;
}

/* Merges from[lo, mid) and from[mid, hi) into to; both are tables on the stack. */
static void merge(lua_State *L, enum order order, int from, int to, lua_Integer lo,
                  lua_Integer mid, lua_Integer hi) {
    lua_Integer i = lo, j = mid;
    int a = lua_gettop(L) + 1, b = a + 1;
    for (lua_Integer k = lo; k < hi; k++) {
        bool right = i >= mid;
        if (!right && j < hi) {
            lua_rawgeti(L, from, i);
            lua_rawgeti(L, from, j);
            right = before(L, order, b, a);
            lua_settop(L, a - 1);
        }
        lua_rawgeti(L, from, right ? j++ : i++);
        lua_rawseti(L, to, k);
    }
}

/* Sorts entries 1 .. n of the table at `at`. Stable, and it ends whatever the order says. The
 * sorted table is left at the top. */
static void sort_table(lua_State *L, enum order order, int at, lua_Integer n) {
    luaL_checkstack(L, 8, NULL);
    lua_createtable(L, n < 1 << 20 ? (int)n : 0, 0);
    lua_createtable(L, n < 1 << 20 ? (int)n : 0, 0);
    int from = lua_gettop(L) - 1, to = from + 1;
    for (lua_Integer i = 1; i <= n; i++) {
        lua_geti(L, at, i);
        lua_rawseti(L, from, i);
    }
    for (lua_Integer width = 1; width < n; width *= 2) {
        sandbox_charge(L, n);
        for (lua_Integer lo = 1; lo <= n; lo += 2 * width) {
            lua_Integer mid = lo + width <= n ? lo + width : n + 1;
            merge(L, order, from, to, lo, mid, mid + width <= n ? mid + width : n + 1);
        }
        lua_pushvalue(L, to);
        lua_copy(L, from, to);
        lua_replace(L, from);
    }
    lua_pop(L, 1);
}

static int lib_sort(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    enum order order = ORDER_LESS;
    if (!lua_isnoneornil(L, 2)) {
        luaL_checktype(L, 2, LUA_TFUNCTION);
        order = ORDER_FUNCTION;
    }
    lua_settop(L, 2);
    lua_Integer n = luaL_len(L, 1);
    luaL_argcheck(L, n < POLICY_MEMORY / 16, 1, "too many entries");
    sort_table(L, order, 1, n);
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, 3, i);
        lua_seti(L, 1, i);
    }
    return 0;
}

/* Upvalues: the table, its sorted keys, how many were seen. */
static int pairs_step(lua_State *L) {
    lua_Integer i = lua_tointeger(L, lua_upvalueindex(3));
    for (;;) {
        lua_settop(L, 0);
        if (lua_rawgeti(L, lua_upvalueindex(2), ++i) == LUA_TNIL)
            return 1;
        lua_pushvalue(L, 1);
        if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL)
            break; /* it was not removed meanwhile */
    }
    lua_pushinteger(L, i);
    lua_copy(L, -1, lua_upvalueindex(3));
    lua_pop(L, 1);
    return 2;
}

static int lib_pairs(lua_State *L) {
    lua_Integer n = 0;
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 1);
    lua_newtable(L);
    for (lua_pushnil(L); lua_next(L, 1); n++) {
        lua_pop(L, 1);
        lua_pushvalue(L, -1);
        lua_rawseti(L, 2, n + 1);
    }
    if (n == 1) { /* nothing compares it */
        lua_rawgeti(L, 2, 1);
        compare_keys(L, 3, 3);
        lua_pop(L, 1);
    }
    sandbox_charge(L, n);
    lua_pushvalue(L, 1);
    sort_table(L, ORDER_KEYS, 2, n);
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, pairs_step, 3);
    return 1;
}

/* The smallest key above the given one. */
static int lib_next(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 2);
    lua_pushnil(L); /* 3: the best so far */
    lua_pushnil(L); /* 4: the one looked at */
    for (long long n = 1; lua_next(L, 1); n++) {
        lua_pop(L, 1);
        compare_keys(L, 4, 4);
        if ((lua_isnil(L, 2) || compare_keys(L, 4, 2) > 0) &&
            (lua_isnil(L, 3) || compare_keys(L, 4, 3) < 0))
            lua_copy(L, 4, 3);
        sandbox_charge(L, n % 8 == 0);
    }
    lua_settop(L, 3);
    if (lua_isnil(L, 3))
        return 1;
    lua_pushvalue(L, 3);
    lua_rawget(L, 1);
    return 2;
}

static int lib_exp(lua_State *L) {
    lua_pushnumber(L, number_exp(luaL_checknumber(L, 1)));
    return 1;
}

static int lib_log(lua_State *L) {
    double x = number_log(luaL_checknumber(L, 1));
    if (!lua_isnoneornil(L, 2))
        x /= number_log(luaL_checknumber(L, 2));
    lua_pushnumber(L, x);
    return 1;
}

/* ---- the environment: what is listed, and no more ---- */

static const char *const base_names[] = {
    "assert", "error",  "getmetatable", "ipairs",   "pcall", "rawequal", "rawget",
    "rawlen", "rawset", "select",       "tonumber", "type",  "xpcall",   NULL};
static const char *const table_names[] = {"concat", "insert", "move", "pack",
                                          "remove", "unpack", NULL};
static const char *const string_names[] = {"byte", "char",  "find",  "gmatch", "gsub",
                                           "len",  "lower", "match", "rep",    "reverse",
                                           "sub",  "upper", NULL};
static const char *const math_names[] = {
    "abs",  "ceil", "floor",  "fmod", "huge",      "max",  "maxinteger", "min", "mininteger",
    "modf", "pi",   "random", "sqrt", "tointeger", "type", "ult",        NULL};

/* Copies what is listed from the library at `from` to the table at the top. */
static void copy(lua_State *L, int from, const char *const *names) {
    for (; *names; names++) {
        lua_getfield(L, from, *names);
        lua_setfield(L, -2, *names);
    }
}

static void set(lua_State *L, const char *name, lua_CFunction f) {
    lua_pushcfunction(L, f);
    lua_setfield(L, -2, name);
}

/* A function that does its part and then calls the one it stands for, found in `from`. */
static void set_around(lua_State *L, int from, const char *name, lua_CFunction f) {
    lua_getfield(L, from, name);
    lua_pushcclosure(L, f, 1);
    lua_setfield(L, -2, name);
}

/* Strings find their methods in the string library that is left. */
static void set_string_methods(lua_State *L) {
    lua_pushliteral(L, "");
    lua_getmetatable(L, -1);
    lua_pushvalue(L, -3);
    lua_setfield(L, -2, "__index");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 2);
}

static void open_library(lua_State *L, lua_CFunction open) {
    lua_pushcfunction(L, open);
    lua_call(L, 0, 1);
    lua_newtable(L);
}

static void open_math(lua_State *L, int globals) {
    open_library(L, luaopen_math);
    lua_getfield(L, -2, "randomseed");
    lua_pushinteger(L, 1);
    lua_call(L, 1, 0);
    copy(L, lua_gettop(L) - 1, math_names);
    set(L, "exp", lib_exp);
    set(L, "log", lib_log);
    lua_setfield(L, globals, "math");
    lua_pop(L, 1);
}

/* Puts a new table of globals in place of the one that the libraries filled. */
static void open_environment(lua_State *L) {
    lua_newtable(L);
    int globals = lua_gettop(L);
    lua_pushcfunction(L, luaopen_base);
    lua_call(L, 0, 1);
    lua_pushvalue(L, globals);
    copy(L, globals + 1, base_names);
    set(L, "tostring", lib_tostring);
    set(L, "print", lib_print);
    set(L, "pairs", lib_pairs);
    set(L, "next", lib_next);
    set_around(L, globals + 1, "setmetatable", lib_setmetatable);
    lua_pushvalue(L, globals);
    lua_setfield(L, globals, "_G");
    lua_settop(L, globals);
    open_library(L, luaopen_table);
    copy(L, globals + 1, table_names);
    set(L, "sort", lib_sort);
    lua_setfield(L, globals, "table");
    lua_settop(L, globals);
    open_library(L, luaopen_string);
    copy(L, globals + 1, string_names);
    set_around(L, globals + 1, "format", lib_format);
    set_string_methods(L);
    lua_setfield(L, globals, "string");
    lua_settop(L, globals);
    open_math(L, globals);
    policy_lib_open(L);
    lua_setfield(L, globals, "moe");
    lua_rawseti(L, LUA_REGISTRYINDEX, LUA_RIDX_GLOBALS);
}

/* ---- arguments ---- */

static void set_int(lua_State *L, const char *key, long long n) {
    lua_pushinteger(L, n);
    lua_setfield(L, -2, key);
}

static void set_text(lua_State *L, const char *key, const char *text) {
    lua_pushstring(L, text);
    lua_setfield(L, -2, key);
}

static void push_model(lua_State *L, const struct model *m) {
    lua_newtable(L);
    set_text(L, "name", m->name);
    set_int(L, "num_hidden_layers", m->num_hidden_layers);
    set_int(L, "hidden_size", m->hidden_size);
    set_int(L, "moe_intermediate_size", m->moe_intermediate_size);
    set_int(L, "num_experts", m->num_experts);
    set_int(L, "num_experts_per_tok", m->num_experts_per_tok);
    set_text(L, "activation", activation_names[m->activation]);
    set_text(L, "weights", format_names[m->weights.format]);
    set_int(L, "shared_intermediate_size", m->shared.intermediate_size);
    lua_createtable(L, m->num_moe_layers, 0);
    for (int i = 0; i < m->num_moe_layers; i++) {
        lua_pushinteger(L, m->moe_layers[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "moe_layers");
    lua_newtable(L);
    set_text(L, "method", router_names[m->router.method]);
    set_int(L, "n_group", m->router.n_group);
    set_int(L, "topk_group", m->router.topk_group);
    lua_setfield(L, -2, "router");
}

static void push_numbers(lua_State *L, const double *x, int n) {
    lua_createtable(L, n, 0);
    for (int i = 0; i < n; i++) {
        lua_pushnumber(L, x[i]);
        lua_rawseti(L, -2, i + 1);
    }
}

/* What differs from rank to rank, and the limits; absent where there is none. */
static void push_limits(lua_State *L, const struct policy_world *w) {
    const struct cluster *c = w->cluster;
    const struct placement_limits *l = w->limits;
    if (c->rank_speed) {
        push_numbers(L, c->rank_speed, c->ranks);
        lua_setfield(L, -2, "rank_speed");
    }
    if (c->rank_slots) {
        lua_createtable(L, c->ranks, 0);
        for (int r = 0; r < c->ranks; r++) {
            lua_pushinteger(L, c->rank_slots[r]);
            lua_rawseti(L, -2, r + 1);
        }
        lua_setfield(L, -2, "rank_slots");
    }
    if (!l)
        return;
    lua_pushboolean(L, l->keep_groups_in_nodes);
    lua_setfield(L, -2, "keep_groups_in_nodes");
    set_int(L, "cross_node_slots", l->cross_node_slots);
    set_int(L, "max_replicas", l->max_replicas);
    set_int(L, "max_replicas_per_node", l->max_replicas_per_node);
}

static void push_cluster(lua_State *L, const struct policy_world *w) {
    const struct cluster *c = w->cluster;
    lua_newtable(L);
    set_text(L, "name", c->name);
    set_text(L, "gpu", c->gpu);
    set_int(L, "ranks", c->ranks);
    set_int(L, "ranks_per_node", c->ranks_per_node);
    set_int(L, "nvlink_domain", c->nvlink_domain);
    set_int(L, "slots_per_rank", w->slots_per_rank);
    set_int(L, "num_slots", w->num_slots);
#define X(name, ...) \
    if (c->name > 0) { \
        lua_pushnumber(L, c->name); \
        lua_setfield(L, -2, #name); \
    }
    CLUSTER_FIGURES(X)
#undef X
    push_limits(L, w);
}

static double sum_of(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += x[i];
    return sum;
}

/* One layer's load: the only workload's as it is; of several, each normalised, then weighted; equal
 * without any. */
static void push_layer_load(lua_State *L, const struct policy_world *w, int layer) {
    const struct loads *l = w->loads;
    int E = w->model->num_experts, row = l ? loads_layer(l, layer) : -1;
    double total[BALANCE_MAX_EXPERTS];
    for (int e = 0; e < E; e++)
        total[e] = row < 0;
    for (int i = 0; row >= 0 && i < l->num_workloads; i++) {
        const double *count = l->workloads[i].count + (size_t)row * E;
        double sum = sum_of(count, E);
        double scale = l->num_workloads == 1 ? 1 : sum > 0 ? l->workloads[i].weight / sum : 0;
        for (int e = 0; e < E; e++)
            total[e] += count[e] * scale;
    }
    push_numbers(L, total, E);
}

static void push_workload(lua_State *L, const struct loads *l, const struct workload *w) {
    lua_newtable(L);
    set_text(L, "name", w->name);
    lua_pushnumber(L, w->weight);
    lua_setfield(L, -2, "weight");
    lua_newtable(L);
    for (int i = 0; i < l->num_layers; i++) {
        push_numbers(L, w->count + (size_t)i * l->experts, l->experts);
        lua_rawseti(L, -2, l->layers[i]);
    }
    lua_setfield(L, -2, "load");
}

/* loads[layer][expert], and loads.workloads beside the layers, where pairs does not see it. */
static void push_loads(lua_State *L, const struct policy_world *w) {
    lua_newtable(L);
    for (int i = 0; i < w->model->num_moe_layers; i++) {
        push_layer_load(L, w, w->model->moe_layers[i]);
        lua_rawseti(L, -2, w->model->moe_layers[i]);
    }
    lua_newtable(L);
    lua_newtable(L);
    lua_newtable(L);
    for (int i = 0; w->loads && i < w->loads->num_workloads; i++) {
        push_workload(L, w->loads, &w->loads->workloads[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "workloads");
    lua_setfield(L, -2, "__index");
    lua_setmetatable(L, -2);
}

static void push_layers(lua_State *L, const struct policy_world *w, const int *x, int n) {
    lua_newtable(L);
    for (int i = 0; i < w->model->num_moe_layers; i++) {
        lua_createtable(L, n, 0);
        for (int j = 0; j < n; j++) {
            lua_pushinteger(L, x[(size_t)i * (size_t)n + (size_t)j]);
            lua_rawseti(L, -2, j + 1);
        }
        lua_rawseti(L, -2, w->model->moe_layers[i]);
    }
}

/* Pushes a hook's arguments and says how many. */
static int push_arguments(lua_State *L, const struct policy_call *call) {
    const struct policy_world *w = call->world;
    int top = lua_gettop(L), slots = w->cluster->ranks * w->slots_per_rank;
    push_model(L, w->model);
    push_cluster(L, w);
    if (call->hook == HOOK_replicate || call->hook == HOOK_place || call->hook == HOOK_share)
        push_loads(L, w);
    if (call->hook == HOOK_place)
        push_layers(L, w, call->count, w->model->num_experts);
    if (call->hook == HOOK_share)
        push_layers(L, w, call->expert_of_slot, slots);
    if (call->hook == HOOK_exchange)
        lua_pushinteger(L, call->tokens);
    if (call->hook == HOOK_variant) {
        lua_newtable(L);
        set_text(L, "target", target_names[call->target]);
        set_int(L, "tokens", call->tokens);
    }
    return lua_gettop(L) - top;
}

/* ---- the result ---- */

static void put(const void *data, size_t len) {
    if (len > POLICY_RESULT - box.len)
        fail("stopped: what it returns is larger than 64 MiB");
    if (len > box.cap - box.len) {
        box.cap = 2 * box.cap + len + 4096;
        box.out = realloc(box.out, box.cap);
        if (!box.out)
            fail("stopped: not enough memory for what it returns");
    }
    memcpy(box.out + box.len, data, len);
    box.len += len;
}

static void put_tagged(char tag, const void *data, size_t len) {
    put(&tag, 1);
    put(data, len);
}

static void put_text(char tag, const char *s, size_t len) {
    uint32_t n = len < POLICY_RESULT ? (uint32_t)len : POLICY_RESULT;
    put_tagged(tag, &n, sizeof n);
    put(s, len);
}

static void put_value(lua_State *L, int at, int depth);

/* Keys other than 1 .. n; returns how many. */
static uint32_t put_pairs(lua_State *L, int at, lua_Integer n, int depth) {
    uint32_t pairs = 0;
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        int isnum = lua_isinteger(L, -2);
        lua_Integer key = isnum ? lua_tointeger(L, -2) : 0;
        if (isnum && key >= 1 && key <= n)
            continue;
        put_value(L, lua_gettop(L) - 1, depth);
        put_value(L, lua_gettop(L), depth);
        pairs++;
    }
    return pairs;
}

/* Without metamethods: what is not in the table is not there. */
static void put_table(lua_State *L, int at, int depth) {
    uint32_t head[2] = {0, 0};
    put_tagged(VALUE_TABLE, head, sizeof head);
    size_t mark = box.len - sizeof head;
    for (; lua_rawgeti(L, at, (lua_Integer)head[0] + 1) != LUA_TNIL; head[0]++) {
        put_value(L, lua_gettop(L), depth);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    head[1] = put_pairs(L, at, head[0], depth);
    memcpy(box.out + mark, head, sizeof head);
}

static void put_value(lua_State *L, int at, int depth) {
    size_t len;
    int type = lua_type(L, at);
    luaL_checkstack(L, 4, NULL);
    if (++box.values > POLICY_VALUES)
        fail("stopped: what it returns has more than 4 million values");
    if (type == LUA_TNIL || type == LUA_TBOOLEAN) {
        put_tagged(type == LUA_TNIL       ? VALUE_NIL
                   : lua_toboolean(L, at) ? VALUE_TRUE
                                          : VALUE_FALSE,
                   "", 0);
    } else if (lua_isinteger(L, at)) {
        int64_t n = lua_tointeger(L, at);
        put_tagged(VALUE_INT, &n, sizeof n);
    } else if (type == LUA_TNUMBER) {
        double x = lua_tonumber(L, at);
        put_tagged(VALUE_NUMBER, &x, sizeof x);
    } else if (type == LUA_TSTRING) {
        const char *s = lua_tolstring(L, at, &len);
        put_text(VALUE_STRING, s, len);
    } else if (type == LUA_TTABLE && depth < POLICY_DEPTH) {
        put_table(L, at, depth + 1);
    } else {
        const char *s = type == LUA_TTABLE ? "table, nested too deep" : lua_typename(L, type);
        put_text(VALUE_OTHER, s, strlen(s));
    }
}

/* ---- the call ---- */

/* The policy's fields: a function as "f" and its line, the name as "n" and itself, anything else as
 * "x" and its type. */
static void describe(lua_State *L, int policy) {
    lua_newtable(L);
    int out = lua_gettop(L);
    for (lua_pushnil(L); lua_next(L, policy);) {
        lua_Debug ar = {.linedefined = 0};
        const char *key = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : NULL;
        lua_pushvalue(L, -2);
        if (lua_isfunction(L, -2)) {
            lua_pushvalue(L, -2);
            lua_getinfo(L, ">S", &ar);
            lua_pushfstring(L, "f%d", ar.linedefined);
        } else if (key && !strcmp(key, "name") && lua_type(L, -2) == LUA_TSTRING) {
            lua_pushfstring(L, "n%s", lua_tostring(L, -2));
        } else {
            lua_pushfstring(L, "x%s", luaL_typename(L, -2));
        }
        lua_rawset(L, out);
        lua_pop(L, 1);
    }
}

struct job {
    const struct source *source;
    const struct policy_call *call;
};

/* Runs inside a protected call; its argument is the job. */
static int body(lua_State *L) {
    const struct job *job = lua_touserdata(L, 1);
    const struct source *s = job->source;
    open_environment(L);
    lua_settop(L, 0);
    if (luaL_loadbufferx(L, s->text, s->len, "=" CHUNK, "t"))
        return lua_error(L);
    lua_sethook(L, on_hook, LUA_MASKCOUNT | LUA_MASKLINE, HOOK_STEPS);
    box.quiet = job->call->hook != NUM_HOOKS;
    lua_call(L, 0, 1);
    box.quiet = false;
    if (!lua_istable(L, 1))
        fail_at(0, "a policy returns a table of functions, and this one does not");
    if (job->call->hook == NUM_HOOKS) {
        describe(L, 1);
    } else {
        lua_pushstring(L, hook_names[job->call->hook]);
        lua_rawget(L, 1);
        lua_call(L, push_arguments(L, job->call), 1);
    }
    put_value(L, lua_gettop(L), 0);
    return 0;
}

/* Takes the place where an error arose out of its message. */
static int on_error(lua_State *L) {
    lua_Debug ar;
    const char *text = lua_tostring(L, 1);
    int length = 0;
    if (text && sscanf(text, CHUNK ":%d: %n", &box.error_line, &length) == 1 && length) {
        lua_pushstring(L, text + length);
        return 1;
    }
    for (int level = 0; lua_getstack(L, level, &ar); level++)
        if (lua_getinfo(L, "l", &ar) && ar.currentline > 0) {
            box.error_line = ar.currentline;
            break;
        }
    if (!text)
        lua_pushfstring(L, "error() was given a %s, not a text", luaL_typename(L, 1));
    return 1;
}

void sandbox_run(const struct source *source, const struct policy_call *call, int fd) {
    struct job job = {source, call};
    box.fd = fd;
    confine(call->seconds);
    lua_State *L = lua_newstate(allocate, NULL);
    if (!L)
        fail("not enough memory");
    lua_pushcfunction(L, on_error);
    lua_pushcfunction(L, body);
    lua_pushlightuserdata(L, &job);
    int status = lua_pcall(L, 1, 0, 1);
    if (status == LUA_ERRMEM)
        fail("not enough memory: a policy may use 256 MiB");
    if (status)
        fail_at(box.error_line ? box.error_line : box.line,
                lua_tostring(L, -1) ? lua_tostring(L, -1) : "error in an error handler");
    box.sending = 1;
    send_record(RECORD_VALUE, 0, box.out, box.len);
    _exit(0);
}
