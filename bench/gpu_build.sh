#!/bin/sh
# Builds, on a machine that needs no GPU, all that bench/gpu.sh would otherwise compile on the GPU's time.
#   usage: bench/gpu_build.sh FOLDER
# PYTHON (default python3) names an interpreter of the GPU machine's Python and torch versions, ARCH its GPU (default
# 9.0, Hopper). FOLDER then holds the module, the program of bench/kernels.cu, and `key`, which says what they were
# built from and for: bench/gpu.sh takes them only where its own key is the same.
set -eu
[ $# -eq 1 ] || { sed -n '2,7p' "$0"; exit 64; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$root"
python=${PYTHON:-python3}
arch=${ARCH:-9.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r csrc l2l_fast setup.py pyproject.toml README.md LICENSE MANIFEST.in "$work"
rm -f "$work"/l2l_fast/*.so
(
  cd "$work"
  # torch runs ninja as a program, which an interpreter that is called by its path need not have on PATH.
  PATH=$(dirname "$(command -v "$python")"):$PATH FORCE_CUDA=1 L2L_FAST_REQUIRE_EXT=1 TORCH_CUDA_ARCH_LIST=$arch \
    "$python" setup.py -q build_ext --inplace
)
strip --strip-unneeded "$work"/l2l_fast/_C.*.so
cp "$work"/l2l_fast/_C.*.so "$out"

number=$(echo "$arch" | tr -d .)
nvcc=$("$python" -c 'import sys; sys.path.insert(0, "csrc/cuda"); import toolkit; print(toolkit.find().nvcc)')
objects=$(find "$work/build" -name '*.o' -path '*cuda*' ! -name ops.o ! -name stream.o)
# shellcheck disable=SC2086  # a list of files
"$nvcc" -std=c++17 -O3 --expt-relaxed-constexpr "-gencode=arch=compute_$number,code=sm_$number" bench/kernels.cu $objects \
  -o "$out/kernels"
strip "$out/kernels"
"$python" bench/gpu_key.py "$arch" >"$out/key"
ls -l "$out"
