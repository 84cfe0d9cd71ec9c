#!/bin/sh
# demo.sh: plans a real model over a cluster from recorded loads, compiles the plan of another, runs
# one of its layers, on the GPU or, without one, on the host, and checks the numbers against the
# reference. B is the build folder.
set -e
moec=$B/moec
out=$B/demo
mkdir -p "$out"
# A cache of its own: what is timed is compiled here and now.
export XDG_CACHE_HOME="$PWD/$out/cache"
rm -rf "$XDG_CACHE_HOME"
step() { printf '\n== %s\n' "$*"; }
show() {
    printf '$ moec %s\n' "$*"
    "$moec" "$@"
}

# The GPU's own architecture, or sm_90a, and the host; the host alone without NVRTC.
target=sm_90a
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 2>/dev/null) in
8.9) target=sm_89 ;;
8.*) target=sm_80 ;;
10.0) target=sm_100a ;;
10.3) target=sm_103a ;;
12.*) target=sm_120a ;;
esac
gpu=$(nvidia-smi -L 2>/dev/null | head -1)
if tests/setup.sh 2>&1 | grep -q libnvrtc; then
    target=host
    echo "No CUDA toolkit here: the plan is compiled for the host only."
else
    target=$target,host
fi

step "Loads as a server would record them, and where they put the experts of DeepSeek-V3 on 32 GPUs"
show stats synth --model plans/models/deepseek-v3.yaml -o "$out/loads.json"
show plan plans/deepseek-v3-ep32.yaml --set "loads=$out/loads.json" --format trtllm \
    -o "$out/moe_load_balancer.yaml"
show explain plans/deepseek-v3-ep32.yaml --set "loads=$out/loads.json"

step "Plan, emit and compile: Qwen3-30B-A3B, every layer, for $target"
show build plans/qwen3-30b-1gpu.yaml --target $target -o "$out/qwen3-30b.moe"

step "What was decided"
show explain "$out/qwen3-30b.moe" --target ${target%%,*}

if [ -n "$gpu" ]; then
    step "Run and check on $gpu"
    show verify "$out/qwen3-30b.moe"
else
    step "Run and check on the host (no GPU here), from the very source a GPU runs"
    show verify "$out/qwen3-30b.moe" --device host --tokens 1,2
fi
