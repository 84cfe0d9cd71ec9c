#!/bin/sh
# lint.sh: what a reviewer should not have to look for. Prints every finding, fails on any.
cd "$(dirname "$0")/.." || exit 1
findings=$(mktemp)
trap 'rm -f "$findings"' EXIT
sources=$(git ls-files -co --exclude-standard -- '*.c' '*.h' '*.cu' '*.cuh' '*.S')
scripts=$(git ls-files -co --exclude-standard -- '*.sh' .ci/run)
# report WHAT: the lines of stdin are findings
report() { sed "s|^|lint: $1: |" >>"$findings"; }

# The lists below are meant to fall apart into words.
# shellcheck disable=SC2046,SC2086
{
    if command -v clang-format >/dev/null; then
        for file in $sources; do
            [ "${file%.S}" != "$file" ] || clang-format "$file" | cmp -s - "$file" || echo "$file"
        done | report "make format would change"
    else
        echo "lint: clang-format is not installed: formatting is not checked"
    fi
    if command -v shellcheck >/dev/null; then
        shellcheck -s sh -f gcc $scripts | report "shellcheck"
    else
        echo "lint: shellcheck is not installed: scripts are not checked"
    fi
    grep -nEw 'TODO|FIXME|XXX|HACK' $sources $scripts Makefile | grep -v '^tests/lint.sh:' |
        report "unfinished"
    grep -nE "$(printf '\t')|[[:space:]]+\$" $sources $scripts | report "tab or space at the end"
    # A function starts at a line without indent that ends in "{" after a ")".
    awk 'FNR == 1 { from = 0 }
         /^[^ #\/}].*\) \{$/ || /^ .*\) \{$/ && !from { if (!from) from = FNR }
         /^}/ { if (from && FNR - from > 100) print FILENAME ":" from ": " FNR - from " lines"
                from = 0 }' /dev/null $(echo "$sources" | grep '\.c$') | report "long function"
}
# One header only may hold asm or ask where it is compiled: the others ask the preprocessor nothing.
grep -nE '\<(asm|__asm(__)?|MOE_HOST_?[A-Z]*|__(CUDA|NVCC|has_|x86|aarch|GNUC|clang)[A-Za-z0-9_]*)\>|^ *# *(if|elif)' \
    templates/* | grep -v -e '^templates/prim.cuh:' -e '^templates/\(args\|assign\).h:[0-9]*:#ifndef MOE_[A-Z]*_H$' |
    report "only templates/prim.cuh may say"

if [ -s "$findings" ]; then
    cat "$findings" >&2
    exit 1
fi
echo "lint: clean"
