#include "../../csrc/cpu/vec.h"
#include "../../csrc/cpu/tables.h"
#include "approximations.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif

#include "../../csrc/cpu/vec_avx512.h"
#include "../../csrc/cpu/kernels.h"
#include "approximations_of.h"

const Approximations kAvx512Approximations = approximations_of<l2l::Vec>("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif
