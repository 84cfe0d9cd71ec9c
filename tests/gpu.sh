#!/bin/sh
# gpu.sh [build]: the GPU's tests. build compiles their bundles and stops (needs NVRTC, no GPU), for
# a GPU machine without a toolkit; otherwise bundles are compiled when there is NVRTC and taken as
# they lie in $B/gpu when there is not. Then compute-sanitizer, where it is installed.
B=${B:-build}
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) in
    8.9) target=sm_89 ;;
    8.*) target=sm_80 ;;
    10.0) target=sm_100a ;;
    10.3) target=sm_103a ;;
    12.*) target=sm_120a ;;
    *) target=sm_90a ;;
esac
export B
if ! "$B/gpu_tests" build "$target"; then
    [ "$1" != build ] && [ -d "$B/gpu/qwen3-30b.moe" ] || exit 1
    echo "no NVRTC here: bundles are taken as they lie in $B/gpu" >&2
fi
[ "$1" = build ] && exit 0
status=0
"$B/gpu_tests" || status=1
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not installed: memory and races are not checked" >&2
    exit $status
fi
for tool in memcheck racecheck; do
    echo "compute-sanitizer $tool"
    "$sanitizer" --tool $tool --error-exitcode 9 "$B/gpu_tests" sanitize || status=1
done
exit $status
