#!/bin/sh
# run.sh BINARY [FILTER]: runs the Criterion binary from the repository's root. With SAN set (the
# sanitizer flags it was built with) the host target is compiled with the same flags and any
# report is a failure, leaks included: Criterion itself does not see what is found at exit. Criterion
# leaks a little of its own at times: a report of leaks alone, in which no frame is outside of
# libcriterion and the sanitizer, is passed over.
binary=$1
filter=$2
if [ -z "$SAN" ]; then
    exec "$binary" ${filter:+--filter "$filter"}
fi
log=$PWD/$B/sanitizer
rm -f "$log".*
export MOERT_CXXFLAGS="$SAN -O1 -g"
export ASAN_OPTIONS="log_path=$log:detect_leaks=1:exitcode=23:strict_string_checks=1:$ASAN_OPTIONS"
export UBSAN_OPTIONS="log_path=$log:print_stacktrace=1:$UBSAN_OPTIONS"
criterions_own() {
    grep -q 'ERROR: LeakSanitizer' "$1" && grep -q 'libcriterion\.so' "$1" &&
        ! grep -E 'runtime error|ERROR: AddressSanitizer' "$1" >/dev/null &&
        ! grep -E '^ *#[0-9]+ ' "$1" | grep -vE 'libcriterion\.so|/libsanitizer/' | grep -q .
}
"$binary" ${filter:+--filter "$filter"}
status=$?
[ $status = 23 ] && status=0 # leaks found at the end: the reports below say whose
for report in "$log".*; do
    [ -e "$report" ] || continue
    cat "$report" >&2
    criterions_own "$report" && continue
    status=1
done
[ $status = 0 ] || echo "sanitizers: failed" >&2
exit $status
