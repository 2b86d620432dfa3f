#!/bin/sh
# Builds the kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer and runs their test.
#   usage: csrc/sanitize.sh [compiler flags instead of the sanitizers']
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=${1:--fsanitize=address,undefined -fno-sanitize-recover=all -g1}
warnings="-Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"  # the intrinsics' own headers trip these
compile() {
  # shellcheck disable=SC2086  # flags are words
  "${CXX:-c++}" -std=c++17 -O1 $flags $warnings -c "$1" -o "$out/$(basename "$1").o"
}
jobs=
for source in isa isa_portable isa_avx2 isa_avx512 isa_avx512_bf16 isa_amx_bf16 launch_step launch_unroll; do
  compile "$root/csrc/cpu/$source.cpp" & jobs="$jobs $!"
done
for source in "$root"/tests/native/*.cpp; do
  compile "$source" & jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
# shellcheck disable=SC2086
"${CXX:-c++}" $flags "$out"/*.o -o "$out/test" -pthread
"$out/test"
