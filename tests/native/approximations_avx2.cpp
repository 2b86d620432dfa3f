#include "../../csrc/cpu/vec.h"
#include "../../csrc/cpu/tables.h"
#include "approximations.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "../../csrc/cpu/vec_avx2.h"
#include "../../csrc/cpu/kernels.h"
#include "approximations_of.h"

const Approximations kAvx2Approximations = approximations_of<l2l::Vec>("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
