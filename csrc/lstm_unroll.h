// Launchers of the learned optimizer through time: T steps of N coordinates, forward and backward.
//
//   (u[t], state[t+1]) = m(grads[t], state[t]; weights),  t = 0 .. T-1
#pragma once

#include "network.h"
#include "parallel.h"

namespace l2l {

// A matrix of the dtype of the weights [T, N], or of states [N, S] (then `row` runs over the N coordinates and `column`
// over the S rows of state); strides in elements. The caller owns the memory; data is null where an argument is absent.
struct Matrix {
  void* data;
  DType dtype;
  int64_t row;
  int64_t column;
};

struct UnrollArguments {
  Network net;
  const void* weights;  // [WeightLayout::count()], read
  DType weights_dtype;  // float32 or float64; the arithmetic is done in it
  int64_t steps;        // T
  int64_t count;        // N
  Scalar first_step;    // number of the first step, counted from 1
  Matrix grads;         // [T, N], read
  Matrix state;         // [N, S], read: float32, bfloat16 or float64
};

// updates [T, N] and last [N, S] (of any of the state dtypes) are written whole; they alias nothing.
void lstm_unroll_cpu(
    const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, const Parallel& parallel);

// The same on a GPU: every pointer into its memory. Queued on the stream (a cudaStream_t) without waiting for it, so
// that a CUDA graph can capture it. Throws std::runtime_error when a launch fails.
//   workspace: lstm_unroll_cuda_workspace(arguments) bytes that nobody else uses until the stream has passed; none for
//   networks whose tile fits in shared memory.
int64_t lstm_unroll_cuda_workspace(const UnrollArguments& arguments);
void lstm_unroll_cuda(
    const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, void* workspace, void* stream);

struct UnrollGradients {
  Matrix d_updates;  // [T, N], read
  Matrix d_last;     // [N, S], read; data may be null: zero
  Matrix d_grads;    // [T, N], written whole; data may be null: not needed
  Matrix d_state;    // [N, S], written whole; data may be null: not needed
  void* d_weights;   // [WeightLayout::count()] of the weights' dtype, written whole; may be null: not needed
};

// Keeps nothing of the forward run: each tile of coordinates is run forward again, then backward. The gradient of the
// weights is the same to the last bit for any number of threads.
void lstm_unroll_backward_cpu(
    const UnrollArguments& arguments, const UnrollGradients& gradients, const Parallel& parallel);

// The same on a GPU, as above. The workspace does not grow with N beyond some hundreds of MB (of steps, 330 KB each for
// the paper's network). The gradient of the weights is the same to the last bit in every run, on whatever number of
// multiprocessors.
int64_t lstm_unroll_backward_cuda_workspace(const UnrollArguments& arguments, const UnrollGradients& gradients);
void lstm_unroll_backward_cuda(
    const UnrollArguments& arguments, const UnrollGradients& gradients, void* workspace, void* stream);

}  // namespace l2l
