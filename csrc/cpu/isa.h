// The choice of instruction set.
#pragma once

#include <string>
#include <vector>

#include "tables.h"

namespace l2l {

// Instruction sets that this machine can run in float32 arithmetic, the fastest first.
std::vector<std::string> cpu_isas();

// The one in use: the fastest until use_cpu_isa says otherwise.
std::string cpu_isa();

// One of those, or amx_bf16: the optimizer's step with bfloat16 products, never chosen unasked.
// Throws std::invalid_argument for a name nobody knows and std::runtime_error for one this machine cannot run.
void use_cpu_isa(const std::string& name);

template <class T>
const Kernels<T>& current_kernels();

}  // namespace l2l
