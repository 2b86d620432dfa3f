// The step for AVX-512 with products in bfloat16 by vdpbf16ps.
#include "vec.h"
#include "tables.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")
#endif

#include "vec_avx512.h"
#include "kernels.h"
#include "product_pairs.h"

namespace l2l {
const StepKernel<float> kAvx512Bf16 = step_kernel<Vec, PairProduct>();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
