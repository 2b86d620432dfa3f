// lstm_unroll on the matrix units.
#pragma once

#include "../lstm_unroll.h"

namespace l2l {

// Hidden sizes of matrix_slots.cuh with float32 weights, where weights and one tile's state fit in shared memory.
bool matrix_unroll_supports(const UnrollArguments& arguments);

// As lstm_unroll_cuda, without a workspace.
void matrix_unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, void* stream);

}  // namespace l2l
