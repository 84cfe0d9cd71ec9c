#!/bin/sh
# run.sh BINARY [FILTER]: runs the Criterion binary from the repository's root. With SAN set (the
# sanitizer flags it was built with) the host target is compiled with the same flags and any
# report is a failure, leaks included: Criterion itself does not see what is found at exit.
binary=$1
filter=$2
if [ -z "$SAN" ]; then
    exec "$binary" ${filter:+--filter "$filter"}
fi
log=$PWD/$B/sanitizer
rm -f "$log".*
export MOERT_CXXFLAGS="$SAN -O1 -g"
export ASAN_OPTIONS="log_path=$log:detect_leaks=1:strict_string_checks=1:$ASAN_OPTIONS"
export UBSAN_OPTIONS="log_path=$log:print_stacktrace=1:$UBSAN_OPTIONS"
"$binary" ${filter:+--filter "$filter"}
status=$?
for report in "$log".*; do
    [ -e "$report" ] || continue
    cat "$report" >&2
    status=1
done
[ $status = 0 ] || echo "sanitizers: failed" >&2
exit $status
