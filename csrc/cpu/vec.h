// What every vector type includes. A unit for one instruction set includes, in this order: this file's standard
// headers, the pragma that turns the instructions on, its vector type as `Vec`, then kernels.h. Everything after the
// pragma is in an unnamed namespace and calls no library template: a function compiled for AVX-512 must never be the
// one copy that the linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define L2L_INLINE inline __attribute__((always_inline))
