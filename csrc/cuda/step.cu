// The step of a whole param group: one launch for all tensors that share a memory order with their gradient and state,
// one for the others. What the matrix units can do goes to matrix_step.cu, of any network, dtype and layout the rest.
#include <limits>

#include "../lstm_step.h"
#include "matrix_step.h"
#include "table.h"
#include "tile.cuh"

namespace l2l {
namespace {

template <class T>
struct StepCall {
  Cell<T> cell;
  Scalar lr;
  T weight_decay;
  bool maximize;
  void* workspace;
  int64_t scratch;  // bytes of each block's
};

template <class T, bool on_chip, class Entry, int bytes>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, on_chip>)
    step_kernel(const __grid_constant__ StepCall<T> call, const __grid_constant__ Table<Entry, bytes> table) {
  Cell<T> cell = call.cell;
  const int64_t weights_each = cell.layout().count();
  const int state_rows = cell.net.state_rows();
  const StepRows<T> rows = forward_step_rows(cell.net, scratch_at<on_chip, T>(call.workspace, call.scratch));
  const T lr = T(read(call.lr));

  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const Tile tile = find_tile(table, t, kWidth);
    cell.weights = call.cell.weights + table.network(t) * weights_each;
    const Entry& tensor = table.entries[tile.entry];
    const bool inside = device::lane() < tile.count;
    const Offsets at = tensor.offsets(tile.first + (inside ? device::lane() : 0));
    const T grad = inside ? load<T>(tensor.grad, tensor.grad_dtype, at.grad) : T(0);
    const Gradient<T> gradient(cell.net, call.maximize ? -grad : grad, tensor.state_dtype);
    load_rows(rows.state, state_rows, tensor.state, tensor.state_dtype, at.state, tensor.state_row, inside);
    __syncthreads();

    forward(cell, rows, gradient, read(tensor.step_number()));

    const bool changes = inside && gradient.live;
    if (warp() == 0) {
      const T u = cell.output_scale * forward_head(cell, rows);
      if (changes) {
        const T theta = load<T>(tensor.param, tensor.param_dtype, at.param);
        add(tensor.param, tensor.param_dtype, at.param, lr * (u - call.weight_decay * theta));
      }
    }
    store_rows(rows.new_state, state_rows, tensor.state, tensor.state_dtype, at.state, tensor.state_row, changes);
  }
}

template <class T>
Scratch step_scratch(const Network& net) {
  return scratch_of<T>(forward_rows(net) * kStride<T>);
}

template <class T>
void step(const StepArguments& arguments, void* workspace, cudaStream_t stream) {
  const Network& net = arguments.net;
  const Scratch scratch = step_scratch<T>(net);
  const StepCall<T> call = {
      Cell<T>::of(net, arguments.weights), arguments.lr, T(arguments.weight_decay), arguments.maximize, workspace,
      scratch.each};
  auto launch = [&](const auto& table) {
    const dim3 grid(unsigned(scratch.blocks(table.tiles))), block(unsigned(warps_for(net) * device::kWarp));
    auto with = [&](auto kernel, int64_t shared) {
      check(device::launch(kernel, grid, block, size_t(shared), stream, call, table), "lstm_step_");
    };
    using Entry = std::decay_t<decltype(table.entries[0])>;
    constexpr int bytes = std::decay_t<decltype(table)>::kBytes;
    if (scratch.on_chip()) return with(step_kernel<T, true, Entry, bytes>, scratch.each);
    with(step_kernel<T, false, Entry, bytes>, 0);
  };
  Entries all = entries(arguments);
  if (matrix_step_supports(arguments)) {
    const auto supported = [](const DenseEntry& entry) { return matrix_step_supports(entry); };
    matrix_step(arguments, take(all.dense, arguments.networks, supported), stream);
  }
  for_each_table(all.dense, arguments.networks, kWidth, launch);
  for_each_table(all.strided, arguments.networks, kWidth, launch);
}

}  // namespace

int64_t lstm_step_cuda_workspace(const StepArguments& arguments) {
  const Network& net = arguments.net;
  const bool wide = arguments.weights_dtype == DType::float64;
  const Scratch scratch = wide ? step_scratch<double>(net) : step_scratch<float>(net);
  return scratch.workspace(std::numeric_limits<int64_t>::max());  // of tables that are still to be made
}

void lstm_step_cuda(const StepArguments& arguments, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return step<double>(arguments, workspace, on);
  step<float>(arguments, workspace, on);
}

}  // namespace l2l
