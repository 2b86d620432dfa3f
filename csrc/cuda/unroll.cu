// T steps of N coordinates, forward: a block takes a tile through all its steps, its state in the block's scratch.
#include "../lstm_unroll.h"
#include "matrix_unroll.h"
#include "tile.cuh"

namespace l2l {
namespace {

template <class T>
struct UnrollCall {
  Cell<T> cell;
  UnrollArguments arguments;
  Matrix updates, last;
  void* workspace;
  int64_t scratch;  // bytes of each block's
};

template <class T, bool on_chip>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, on_chip>)
    unroll_kernel(const __grid_constant__ UnrollCall<T> call) {
  const Cell<T>& cell = call.cell;
  const UnrollArguments& arguments = call.arguments;
  const int state_rows = cell.net.state_rows();
  const double first_step = read(arguments.first_step);
  StepRows<T> rows = forward_step_rows(cell.net, scratch_at<on_chip, T>(call.workspace, call.scratch));

  for (int64_t first = int64_t(blockIdx.x) * kWidth; first < arguments.count; first += int64_t(gridDim.x) * kWidth) {
    const int64_t i = first + device::lane();
    const bool inside = i < arguments.count;
    __syncthreads();  // the head of the tile before has been read
    load_rows(
        rows.state, state_rows, arguments.state.data, arguments.state.dtype, i * arguments.state.row,
        arguments.state.column, inside);
    __syncthreads();
    for (int64_t t = 0; t < arguments.steps; ++t) {
      const Gradient<T> gradient(cell.net, inside ? element<T>(arguments.grads, t, i) : T(0), arguments.state.dtype);
      forward(cell, rows, gradient, first_step + double(t));
      if (warp() == 0) {
        const T u = cell.output_scale * forward_head(cell, rows);
        if (inside) element<T>(call.updates, t, i) = gradient.live ? u : T(0);
      }
      T* spent = rows.state;
      rows.state = rows.new_state;
      rows.new_state = spent;
    }
    store_rows(
        rows.state, state_rows, call.last.data, call.last.dtype, i * call.last.row, call.last.column, inside);
  }
}

template <class T>
Scratch unroll_scratch(const Network& net) {
  return scratch_of<T>(forward_rows(net) * kStride<T>);
}

template <class T>
void unroll(
    const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, void* workspace,
    cudaStream_t stream) {
  if (arguments.count == 0) return;
  const Scratch scratch = unroll_scratch<T>(arguments.net);
  const UnrollCall<T> call = {
      Cell<T>::of(arguments.net, arguments.weights), arguments, updates, last, workspace, scratch.each};
  const dim3 grid(unsigned(scratch.blocks(tiles_of(arguments.count))));
  const dim3 block(unsigned(warps_for(arguments.net) * device::kWarp));
  const bool on_chip = scratch.on_chip();
  const auto kernel = on_chip ? unroll_kernel<T, true> : unroll_kernel<T, false>;
  check(device::launch(kernel, grid, block, on_chip ? size_t(scratch.each) : 0, stream, call), "lstm_unroll");
}

}  // namespace

int64_t lstm_unroll_cuda_workspace(const UnrollArguments& arguments) {
  if (matrix_unroll_supports(arguments)) return 0;
  const bool wide = arguments.weights_dtype == DType::float64;
  const Scratch scratch = wide ? unroll_scratch<double>(arguments.net) : unroll_scratch<float>(arguments.net);
  return scratch.workspace(tiles_of(arguments.count));
}

void lstm_unroll_cuda(
    const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, void* workspace, void* stream) {
  if (matrix_unroll_supports(arguments)) return matrix_unroll(arguments, updates, last, stream);
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return unroll<double>(arguments, updates, last, workspace, on);
  unroll<float>(arguments, updates, last, workspace, on);
}

}  // namespace l2l
