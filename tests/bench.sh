#!/bin/sh
# bench.sh [build]: times the experts part on six shapes beside the hardware's floor, and beside
# torch when a python3 with torch is there; then what baking each plan constant gains. build compiles
# the bundles and stops (needs NVRTC, no GPU), for a GPU machine without a toolkit.
B=${B:-build}
out=$B/bench
shapes="qwen3-30b qwen3-235b dsv3-ep8-slot32 mixtral-8x7b llama4-scout dsv3-ep32-slot9"
ablated=qwen3-30b
constants=$(sed -n 's/^constexpr [a-z ]* \(k[A-Za-z0-9]*\) = .*/\1/p' templates/plan.cuh)
mkdir -p "$out" || exit 1
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) in
    8.9) target=sm_89 ;;
    8.*) target=sm_80 ;;
    10.0) target=sm_100a ;;
    10.3) target=sm_103a ;;
    12.*) target=sm_120a ;;
    *) target=sm_90a ;;
esac

# compile SHAPE BUNDLE [OPTION...]: a bundle that lies there already serves where NVRTC does not
compile() {
    shape=$1
    bundle=$2
    shift 2
    "$B/moec" build "tests/bench/$shape.yaml" --target $target \
        --set moe_config.max_num_tokens=8192 -o "$bundle" "$@" >"$out/build.log" 2>&1 && return
    [ -e "$bundle/MANIFEST" ] && return
    cat "$out/build.log" >&2
    return 1
}
for shape in $shapes; do
    compile "$shape" "$out/$shape.moe" || exit 1
done
measured=
needed=
for name in $constants; do
    if compile $ablated "$out/$ablated-$name.moe" --unbake "$name" 2>/dev/null; then
        measured="$measured $name"
    else
        needed="$needed $name"
    fi
done
[ "$1" = build ] && exit 0

ceilings=
: >"$out/torch.tsv"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    # shellcheck disable=SC2086 # a list
    python3 tests/bench/torch_peer.py $shapes >"$out/torch.tsv" || exit 1
    ceilings=$(awk '$1 == "ceiling" { print "--tbps", $2, "--tflops", $3 }' "$out/torch.tsv")
else
    echo "no python3 with torch here: our times only"
fi
echo "date: $(date -u +%Y-%m-%d)"
first=1
for shape in $shapes; do
    # shellcheck disable=SC2086 # a list
    "$B/moec" bench "$out/$shape.moe" $ceilings >"$out/$shape.txt" || exit 1
    [ $first = 1 ] && sed -n '/^device/p' "$out/$shape.txt" &&
        printf '%-16s %6s %7s %9s %9s %7s %9s %7s\n' shape tokens hit moec floor /floor torch /torch
    first=0
    awk -v shape="$shape" -v peers="$out/torch.tsv" '
        BEGIN { while ((getline line < peers) > 0) { split(line, f, "\t")
                    if (f[1] == "peer" && f[2] == shape) torch[f[3]] = f[4] } }
        $1 ~ /^[0-9]+$/ { t = torch[$1]
            printf "%-16s %6d %7.1f %9.1f %9.1f %7.2f %9s %7s\n", shape, $1, $2, $3, $4, $5,
                t ? t : "-", t ? sprintf("%.2f", $3 / t) : "-" }' "$out/$shape.txt"
done

echo
echo "Gain of baking a constant into the source, $ablated, experts part: time as a run-time value / baked"
tokens=1,32,128,2048
list="--tokens $tokens"
# shellcheck disable=SC2086 # lists
base=$("$B/moec" bench "$out/$ablated.moe" $list $ceilings | awk '$1 ~ /^[0-9]+$/ { print $3 }')
printf '%-18s' constant
for t in $(echo $tokens | tr , ' '); do printf ' %8s' "T=$t"; done
echo
for name in $measured; do
    # shellcheck disable=SC2086 # lists
    now=$("$B/moec" bench "$out/$ablated-$name.moe" $list $ceilings | awk '$1 ~ /^[0-9]+$/ { print $3 }')
    printf '%-18s' "$name"
    # shellcheck disable=SC2086 # lists
    echo $base $now | awk '{ n = NF / 2; for (i = 1; i <= n; i++) printf " %8.3f", $(n + i) / $i; print "" }'
done
echo "array sizes, template arguments and choices of code, which only a constant can be:$needed"
