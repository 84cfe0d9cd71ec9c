#!/bin/sh
# lint.sh: what reviewers should not have to look for. Prints every finding, fails on any.
cd "$(dirname "$0")/.." || exit 1
status=0
fail() {
    status=1
    sed "s|^|lint: $1: |" >&2
}
sources=$(git ls-files -co --exclude-standard -- '*.c' '*.h' '*.cu' '*.cuh' '*.S')
scripts=$(git ls-files -co --exclude-standard -- '*.sh' .ci/run)
# check WHAT: findings on stdin, one a line
check() {
    findings=$(cat)
    [ -z "$findings" ] || printf '%s\n' "$findings" | fail "$1"
}

# shellcheck disable=SC2086 # lists of file names
{
    if command -v clang-format >/dev/null; then
        for file in $sources; do
            [ "${file%.S}" != "$file" ] || clang-format "$file" | cmp -s - "$file" || echo "$file"
        done | check "make format changes"
    else
        echo "lint: clang-format is not installed, formatting is not checked"
    fi
    if command -v shellcheck >/dev/null; then
        shellcheck -s sh $scripts || status=1
    else
        echo "lint: shellcheck is not installed, scripts are not checked"
    fi
    grep -nE 'TODO|FIXME|XXX|HACK' $sources $scripts Makefile | grep -v '^tests/lint.sh' |
        check "unfinished"
    grep -nP '\t' $sources | check "tab"
    grep -nE '[[:space:]]+$' $sources $scripts Makefile | check "space at the end"
}
# One header only may hold asm or ask whether it is on the host.
grep -nE '\b(asm|__asm__?)\b|__CUDACC__|__CUDA_ARCH__|__NVCC__|MOE_HOST' templates/* |
    grep -v '^templates/prim.cuh:' | check "asm or a question about the host outside prim.cuh"
# One public header, and it stays short enough to read.
[ "$(wc -l <runtime/moert.h)" -le 250 ] || echo "runtime/moert.h has over 250 lines" | check length
[ "$(wc -l <Makefile)" -le 120 ] || echo "Makefile has over 120 lines" | check length
# Functions: from a line that starts with a letter and ends in "{" to a "}" in column 1.
# shellcheck disable=SC2086
awk '/^[A-Za-z_].*\) *\{$/ || (/^[ ]+.*\) \{$/ && open == "") && FNR > 1 { open = FILENAME ":" FNR; from = FNR }
     /^}/ { if (open != "" && FNR - from > 100) print open ": function of " FNR - from " lines"; open = "" }' \
    $sources | check "long"
[ $status = 0 ] && echo "lint: clean"
exit $status
