// The step for AVX-512 with products in bfloat16 on AMX.
#include "vec.h"
#include "tables.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,fma")
#endif

#include "vec_avx512.h"
#include "kernels.h"
#include "product_amx.h"

namespace l2l {
const StepKernel<float> kAmxBf16 = step_kernel<Vec, BlockProduct>();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
