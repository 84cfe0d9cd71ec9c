#!/bin/sh
# valgrind.sh: the runtime's host path under valgrind, from a bundle on disk to results and back
# to nothing allocated. B is the build folder.
set -e
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export XDG_CACHE_HOME="$dir/cache" MOERT_CXXFLAGS="-g $MOERT_CXXFLAGS"
"$B/moec" build plans/tiny.yaml --target host -o "$dir/tiny.moe" >/dev/null
gcc -g -Iruntime examples/01-forward/main.c "$B/libmoert.a" -l:libsodium.a -lm -ldl -lpthread \
    -o "$dir/forward"
"$dir/forward" "$dir/tiny.moe" 1 >/dev/null # compiles the host code, outside valgrind
# What stays reachable is the dynamic loader's and libstdc++'s.
kinds=definite,indirect,possible
memcheck="valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=$kinds
    --errors-for-leak-kinds=$kinds --fair-sched=yes"
check() {
    $memcheck "$@" >"$dir/out" || {
        echo "valgrind: $*" >&2
        exit 1
    }
}
for tokens in 0 1 9; do
    check "$dir/forward" "$dir/tiny.moe" $tokens
done
# A damaged bundle: the error paths leave nothing behind either.
printf 'x' >>"$dir/tiny.moe/plan.bin"
status=0
$memcheck "$dir/forward" "$dir/tiny.moe" 1 2>"$dir/err" || status=$?
[ $status = 1 ] || { cat "$dir/err" >&2; exit 1; }
echo "valgrind: clean"
