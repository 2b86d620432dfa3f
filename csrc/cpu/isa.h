// The choice of instruction set.
#pragma once

#include <string>
#include <vector>

#include "tables.h"

namespace l2l {

// Instruction sets that this machine can run in float32 arithmetic, the fastest first.
std::vector<std::string> cpu_isas();

// Those that make the products of the optimizer's step in bfloat16, the fastest first; never chosen unasked.
std::vector<std::string> cpu_bf16_isas();

// The one in use: the fastest of cpu_isas until use_cpu_isa says otherwise.
std::string cpu_isa();

// One of either list, or "bf16": the first of the second.
// Throws std::invalid_argument for a name nobody knows and std::runtime_error for one this machine cannot run.
void use_cpu_isa(const std::string& name);

// Makes float32 multiply-adds on registers alone and returns how many: what the machine can do at most.
int64_t multiply_adds(int64_t rounds);

template <class T>
const StepKernel<T>& current_step();
template <class T>
const UnrollKernels<T>& current_unroll();

}  // namespace l2l
