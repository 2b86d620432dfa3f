// The kernels for AVX2 with FMA.
#include "vec.h"
#include "tables.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "vec_avx2.h"
#include "kernels.h"

namespace l2l {
const Kernels<float> kAvx2 = kernels<Vec>();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
