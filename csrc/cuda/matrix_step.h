// The step on the matrix units: which tensors it takes, and its launcher.
#pragma once

#include "table.h"

namespace l2l {

// Hidden sizes of matrix_slots.cuh, as many layers as fit in shared memory, float32 weights; parameters and
// gradients of up to 32 bits and a state of float32 or bfloat16 whose rows are aligned to four coordinates. The other
// tensors of a group stay with step.cu.
bool matrix_step_supports(const StepArguments& arguments);
bool matrix_step_supports(const DenseEntry& entry);

// Entries as in DenseEntry, all supported, as many for each network. Throws std::runtime_error when a launch fails.
void matrix_step(const StepArguments& arguments, const std::vector<DenseEntry>& entries, void* stream);

}  // namespace l2l
