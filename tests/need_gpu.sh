#!/bin/sh
# need_gpu.sh TARGET: fails with one clear line when this machine has no GPU to run on.
if [ -e /dev/nvidia0 ] || [ -e /dev/dxg ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then
    exit 0
fi
echo "make $1: this machine has no NVIDIA GPU; 'make test' runs the kernels on the host" >&2
exit 1
