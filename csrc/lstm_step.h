// Launcher of the optimizer's step: theta <- theta + lr * (u - weight_decay * theta), (u, state) <- m(grad, state).
#pragma once

#include "network.h"
#include "parallel.h"
#include "update_size.h"

namespace l2l {

constexpr int kMaxDims = 64;

// One tensor, strided. The caller owns data and strides, and keeps them alive through the call.
struct Strided {
  void* data;
  DType dtype;
  const int64_t* strides;  // [dims], in elements
};

// One parameter with its gradient and state. Coordinates of all three are numbered by the same sizes.
struct StepTensor {
  int dims;              // 1 .. kMaxDims
  const int64_t* sizes;  // [dims]
  int64_t count;         // product of sizes
  Strided param;         // read and written; no two coordinates share memory; any dtype
  Strided grad;          // read; any dtype, may alias no other pointer
  Strided state;         // read and written; state_rows() rows over the coordinates; float32, bfloat16 or float64
  int64_t state_row;     // elements from one state row to the next
  Scalar step;           // number of this step, counted from 1
  int network;           // whose weights it has
};

struct StepArguments {
  Network net;
  const void* weights;  // [networks][WeightLayout::count()], read
  int networks;
  DType weights_dtype;  // float32 or float64; the arithmetic is done in it
  const StepTensor* tensors;  // those of a network one after another
  int64_t tensor_count;
  Scalar lr;
  double weight_decay;
  bool maximize;
};

// A coordinate whose gradient is not finite keeps its value and its state.
void lstm_step_cpu(const StepArguments& arguments, const Parallel& parallel);

// The sizes of the updates of a group's tensors.
struct UpdateSizes {
  UpdateSize size;
  void* const* squares;  // of each tensor v, in the weights' dtype, moved on; or nullptr: size.rms for all
};

// The step with the updates of every tensor scaled to the root mean square r:
//   theta <- theta + lr * (r * u / RMS(u) - weight_decay * theta)
// The coordinates that are kept count as u = 0; where all of u is 0, only weight decay is left. Needs one of the
// arithmetic's scalars a coordinate of the largest tensors while it runs. The sums are in a fixed order.
void lstm_step_scaled_cpu(const StepArguments& arguments, const UpdateSizes& sizes, const Parallel& parallel);

// r of every tensor, of networks with moments, after their step: reads gradients, states and step numbers.
//   sizes: with squares.
//   found: [tensor_count], written, in the weights' dtype; 0 of what has no coordinates.
void lstm_update_sizes_cpu(
    const StepArguments& arguments, const UpdateSizes& sizes, void* found, const Parallel& parallel);

// The same on a GPU: data, weights and scalars in its memory, structs and strides in the host's, where they are needed
// until the return only. Queued on the stream (a cudaStream_t) without waiting for it, so that a CUDA graph can capture
// it. Throws std::runtime_error when a launch fails.
//   workspace: lstm_step_cuda_workspace(arguments) bytes that nobody else uses until the stream has passed; none for
//   networks whose tile fits in shared memory.
int64_t lstm_step_cuda_workspace(const StepArguments& arguments);
void lstm_step_cuda(const StepArguments& arguments, void* workspace, void* stream);

// lstm_step_scaled_cpu's rule on a GPU, in five launches for any number of tensors: scratch, step, sums of squares,
// sizes, moves. The squares are in its memory, the array of their addresses in the host's. Its workspace is one of the
// arithmetic's scalars a coordinate and some more.
int64_t lstm_step_scaled_cuda_workspace(const StepArguments& arguments);
void lstm_step_scaled_cuda(
    const StepArguments& arguments, const UpdateSizes& sizes, void* workspace, void* stream);

// lstm_update_sizes_cpu's on a GPU, in three launches: sums of 0, sums of squares, sizes.
int64_t lstm_update_sizes_cuda_workspace(const StepArguments& arguments);
void lstm_update_sizes_cuda(
    const StepArguments& arguments, const UpdateSizes& sizes, void* found, void* workspace, void* stream);

}  // namespace l2l
