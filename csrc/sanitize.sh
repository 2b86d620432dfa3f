#!/bin/sh
# Builds the kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer and runs their test.
#   usage: csrc/sanitize.sh [compiler flags instead of the sanitizers']
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=${1:--fsanitize=address,undefined -fno-sanitize-recover=all -g1}
for source in isa isa_portable isa_avx2 isa_avx512 launch_step launch_unroll; do
  echo "$root/csrc/cpu/$source.cpp"
done > "$out/sources"
ls "$root"/tests/native/*.cpp >> "$out/sources"
# shellcheck disable=SC2086  # flags are words
xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c \
  '"${CXX:-c++}" -std=c++17 -O1 '"$flags"' -Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -c "$1" -o "'"$out"'/$(basename "$1").o"' _ {} \
  < "$out/sources"
# shellcheck disable=SC2086
"${CXX:-c++}" $flags "$out"/*.o -o "$out/test" -pthread
"$out/test"
