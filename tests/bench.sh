#!/bin/sh
# bench.sh [build]: times the experts part on six shapes, on three in fp8 too, beside the hardware's
# floor, and beside torch when a python3 with torch is there, on the terminal and in bench.json; then
# what baking each plan constant gains. build compiles the bundles and stops (needs NVRTC, no GPU),
# for a GPU machine without a toolkit.
B=${B:-build}
out=$B/bench
shapes="qwen3-30b qwen3-235b dsv3-ep8-slot32 mixtral-8x7b llama4-scout dsv3-ep32-slot9"
fp8_shapes="qwen3-30b-fp8 dsv3-ep8-slot32-fp8 dsv3-ep32-slot9-fp8" # torch has none to compare with
# Where each constant of plan.cuh is measured: "CONSTANT MODEL"; the others are array sizes.
constants="kHidden tests/bench/qwen3-30b
kInter tests/bench/qwen3-30b
kTopK tests/bench/qwen3-30b
kActivation tests/bench/qwen3-30b
kBias tests/bench/qwen3-30b
kInputWeight tests/bench/qwen3-30b
kFormat tests/bench/qwen3-30b
kSharedInter plans/models/deepseek-v2-lite
kRouter plans/models/deepseek-v2-lite"
mkdir -p "$out" || exit 1
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) in
    8.9) target=sm_89 ;;
    8.*) target=sm_80 ;;
    10.0) target=sm_100a ;;
    10.3) target=sm_103a ;;
    12.*) target=sm_120a ;;
    *) target=sm_90a ;;
esac

# compile MODEL BUNDLE [OPTION...]: a bundle that lies there already serves where NVRTC does not
compile() {
    model=$1
    bundle=$2
    shift 2
    "$B/moec" build "$model.yaml" --target $target --set moe_config.max_num_tokens=8192 \
        -o "$bundle" "$@" >"$out/build.log" 2>&1 && return
    [ -e "$bundle/MANIFEST" ] && return
    cat "$out/build.log" >&2
    return 1
}
for shape in $shapes $fp8_shapes; do
    compile "tests/bench/$shape" "$out/$shape.moe" || exit 1
done
echo "$constants" | while read -r name model; do
    compile "$model" "$out/baked-${model##*/}.moe" --policy tests/bench/portable.lua &&
        compile "$model" "$out/$name.moe" --policy tests/bench/portable.lua --unbake "$name" ||
        exit 1
done || exit 1
[ "$1" = build ] && exit 0

ceilings=
fp8_ceilings=
: >"$out/torch.tsv"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    # shellcheck disable=SC2086 # a list
    python3 tests/bench/torch_peer.py $shapes >"$out/torch.tsv" || exit 1
    ceilings=$(awk '$1 == "ceiling" { print "--tbps", $2, "--tflops", $3 }' "$out/torch.tsv")
    fp8_ceilings=$(awk '$1 == "ceiling" { print "--tbps", $2, ($4 > 0 ? "--tflops " $4 : "") }' "$out/torch.tsv")
else
    echo "no python3 with torch here: our times only"
fi
echo "date: $(date -u +%Y-%m-%d)"
first=1
: >"$out/bench.json"
for shape in $shapes $fp8_shapes; do
    rates=$ceilings
    case $shape in *-fp8) rates=$fp8_ceilings ;; esac
    # shellcheck disable=SC2086 # a list
    "$B/moec" bench "$out/$shape.moe" --json $rates >"$out/$shape.json" || exit 1
    [ $first = 1 ] && sed -n 's/^{"device":"\([^"]*\)".*/device: \1/p' "$out/$shape.json" &&
        printf '%-19s %6s %7s %9s %9s %7s %9s %7s\n' shape tokens hit moec floor /floor torch /torch
    printf '%s\n"%s":' "$([ $first = 1 ] && echo '{' || echo ',')" "$shape" >>"$out/bench.json"
    cat "$out/$shape.json" >>"$out/bench.json"
    first=0
    awk -v shape="$shape" -v peers="$out/torch.tsv" '
        function field(name, from) {
            from = index($0, "\"" name "\":")
            return from ? substr($0, from + length(name) + 3) + 0 : 0
        }
        BEGIN { while ((getline line < peers) > 0) { split(line, f, "\t")
                    if (f[1] == "peer" && f[2] == shape) torch[f[3]] = f[4] } }
        /"experts_us"/ { tokens = field("tokens"); t = torch[tokens]
            us = field("experts_us"); floor = field("experts_floor_us")
            printf "%-19s %6d %7.1f %9.1f %9.1f %7.2f %9s %7s\n", shape, tokens,
                field("experts_hit"), us, floor, floor ? us / floor : 0,
                t ? t : "-", t ? sprintf("%.2f", us / t) : "-" }' "$out/$shape.json"
done
echo '}' >>"$out/bench.json"

# forward BUNDLE: medians of the whole forward at the batch sizes below, on one line
tokens=1,32,128,2048
forward() {
    # shellcheck disable=SC2086 # a list
    "$B/moec" bench "$1" --tokens $tokens --layer "$2" --json $ceilings |
        sed -n 's/.*"forward_us":\([0-9.]*\).*/\1/p' | tr '\n' ' '
}
cubins() { cat "$1"/"$target"/*.cubin | wc -c; }
echo
echo "What baking a constant into the source gains: as a run-time value / baked, of the forward's time"
echo "and of the cubins' bytes. The baked one against itself shows the spread."
printf '%-14s %-18s' constant model
for t in $(echo $tokens | tr , ' '); do printf ' %8s' "T=$t"; done
printf ' %8s\n' bytes
last=
echo "$constants" | while read -r name model; do
    shape=${model##*/}
    baked=$out/baked-$shape.moe
    layer=$(sed -n 's/^moe_layers: \([0-9]*\).*/\1/p' "$model.yaml")
    if [ "$shape" != "$last" ]; then
        base=$(forward "$baked" "${layer:-0}")
        last=$shape
        set -- "-" "$baked" "$name" "$out/$name.moe"
    else
        set -- "$name" "$out/$name.moe"
    fi
    while [ $# -gt 0 ]; do
        # shellcheck disable=SC2046 # lists
        echo "$base $(forward "$2" "${layer:-0}")" | awk -v name="$1" -v shape="$shape" \
            -v bytes="$(cubins "$2")" -v base_bytes="$(cubins "$baked")" '
            { printf "%-14s %-18s", name, shape
              n = NF / 2; for (i = 1; i <= n; i++) printf " %8.3f", $(n + i) / $i
              printf " %8.3f\n", bytes / base_bytes }'
        shift 2
    done
done
echo "array sizes, which only a constant can be: kExperts, kGroups"
