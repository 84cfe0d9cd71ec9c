#!/bin/sh
# setup.sh [TOOL...]: installs what the build and the tests need on Debian 12 or Ubuntu 24.04 and
# lacks here, and the named tools, whose packages are called as they are; silent when nothing is
# missing. A missing CUDA toolkit is reported, never installed.
set -u

multiarch=$(gcc -print-multiarch 2>/dev/null || true)
[ -n "$multiarch" ] || multiarch=$(uname -m)-linux-gnu

# have FILE...: one of them exists, below /usr/lib/MULTIARCH, /usr/lib, /usr/local/lib or /usr/include
have() {
    for name in "$@"; do
        for dir in "/usr/lib/$multiarch" /usr/lib /usr/local/lib /usr/include /usr/local/include; do
            [ -e "$dir/$name" ] && return 0
        done
    done
    return 1
}

missing=
want() { missing="$missing $1"; }
{ command -v gcc && command -v g++ && command -v make && have stdlib.h; } >/dev/null 2>&1 ||
    want build-essential
{ have yaml.h && have libyaml.a; } || want libyaml-dev
{ have lua5.4/lua.h && have liblua5.4.a; } || want liblua5.4-dev
{ have sodium.h && have libsodium.a; } || want libsodium-dev
{ have criterion/criterion.h && have libcriterion.so libcriterion.a; } || want libcriterion-dev
command -v pkg-config >/dev/null || want pkg-config
for tool in valgrind "$@"; do
    command -v "$tool" >/dev/null || want "$tool"
done

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "setup: no apt-get on this machine; install the equivalents of:$missing" >&2
        exit 1
    fi
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v 2>/dev/null; }; then
        as_root=sudo
    else
        echo "setup: missing are$missing" >&2
        echo "setup: root can install them: apt-get install -y --no-install-recommends$missing" >&2
        exit 1
    fi
    echo "setup: installing$missing"
    log=$(mktemp)
    # shellcheck disable=SC2086 # both are lists of words
    if ! { $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y \
               --no-install-recommends $missing ||
           { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get \
               install -y --no-install-recommends $missing; }; } >"$log" 2>&1; then
        tail -20 "$log" >&2
        rm -f "$log"
        echo "setup: apt-get failed; by hand: sudo apt-get install -y$missing" >&2
        exit 1
    fi
    rm -f "$log"
fi

# NVRTC: where the compiler looks for it.
nvrtc() {
    PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -q 'libnvrtc\.so' && return 0
    for dir in "${CUDA_HOME:-/none}" "${CUDA_PATH:-/none}" /usr/local/cuda /usr/local/cuda-*; do
        for lib in "$dir"/lib64 "$dir"/lib "$dir"/targets/*/lib; do
            set -- "$lib"/libnvrtc.so.*
            [ -e "$1" ] && return 0
        done
    done
    for lib in $(echo "${LD_LIBRARY_PATH:-}" | tr : ' '); do
        [ -e "$lib/libnvrtc.so" ] && return 0
    done
    return 1
}
nvrtc || cat >&2 <<'END'
setup: no CUDA toolkit here (libnvrtc.so is missing). Planning, emission and the host target work;
setup: compiling for a GPU does not. To get it, add NVIDIA's repository and install NVRTC:
setup:   https://developer.download.nvidia.com/compute/cuda/repos/  (pick debian12 or ubuntu2404)
setup:   sudo dpkg -i cuda-keyring_1.1-1_all.deb && sudo apt-get update
setup:   sudo apt-get install -y cuda-nvrtc-13-0
END
exit 0
