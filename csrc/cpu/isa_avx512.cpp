// The kernels for AVX-512.
#include "vec.h"
#include "tables.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif

#include "vec_avx512.h"
#include "kernels.h"

namespace l2l {
const Kernels<float> kAvx512 = kernels<Vec>();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
