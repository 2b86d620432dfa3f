// The step with every tensor's update scaled to one root mean square: the step of the group onto scratch of -0.0, which
// then holds u, and two launches for all of its tensors, whatever their number: sums of squares, and the moves.
#include "../lstm_step.h"
#include "table.h"
#include "tile.cuh"

namespace l2l {
namespace {

constexpr int kThreads = 256, kBlocksEach = 8;  // of a block; on a multiprocessor
constexpr int kChunk = 8192;                    // coordinates of a block at a time
constexpr int64_t kLine = 128;                  // bytes; each tensor's scratch begins on one

constexpr int64_t up_to(int64_t multiple, int64_t bytes) { return (bytes + multiple - 1) / multiple * multiple; }
constexpr int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

// The sum over a block's threads, in one order, for each of them.
L2L_DEVICE double block_sum(double value) {
  double* sums = reinterpret_cast<double*>(device::shared_memory());
  for (int mask = device::kWarp / 2; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  __syncthreads();  // the sums before have been read
  if (device::lane() == 0) sums[warp()] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < warps(); ++w) total += sums[w];
  return total;
}

// Scratch of -0.0, and the number 1, which is the step's lr.
template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(T* scratch, int64_t count, T* one) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (first == 0) *one = T(1);
  for (int64_t i = first; i < count; i += int64_t(gridDim.x) * blockDim.x) scratch[i] = T(-0.0);
}

// Of each chunk its share of the tensor's mean square. entry.grad: u; entry.state: a double for each chunk.
template <class T, class Entry, int bytes>
__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ Table<Entry, bytes> table) {
  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const Tile chunk = find_tile(table, t, kChunk);
    const Entry& tensor = table.entries[chunk.entry];
    const T* u = static_cast<const T*>(tensor.grad) + chunk.first;
    double sum = 0;
    for (int i = threadIdx.x; i < chunk.count; i += blockDim.x) sum += double(u[i]) * double(u[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) static_cast<double*>(tensor.state)[chunk.first / kChunk] = sum / double(tensor.count);
  }
}

template <class T>
struct Move {
  Scalar lr;
  T rms, weight_decay;
};

// theta <- theta + lr (rms u / RMS(u) - weight_decay theta). entry.grad: u; entry.step: the shares of its tensor's mean
// square, entry.state_row of them.
template <class T, class Entry, int bytes>
__global__ void __launch_bounds__(kThreads)
    move_kernel(const __grid_constant__ Move<T> move, const __grid_constant__ Table<Entry, bytes> table) {
  const T lr = T(read(move.lr)), decay = lr * move.weight_decay;
  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const Tile chunk = find_tile(table, t, kChunk);
    const Entry& tensor = table.entries[chunk.entry];
    const double* shares = static_cast<const double*>(tensor.step);
    double mean = 0;
    for (int64_t i = threadIdx.x; i < tensor.state_row; i += blockDim.x) mean += shares[i];
    const T root = T(std::sqrt(block_sum(mean)));
    // Not a comparison that NaN fails: a NaN in the weights must show. The smallest: reference.SMALLEST.
    const T factor = root < T(0x1p-126) ? T(0) : lr * move.rms / root;
    for (int i = threadIdx.x; i < chunk.count; i += blockDim.x) {
      const Offsets at = tensor.offsets(chunk.first + i);
      const T u = static_cast<const T*>(tensor.grad)[at.grad];
      if (u == T(0) && std::signbit(u)) continue;  // held: its gradient is not finite
      const T theta = decay == T(0) ? T(0) : load<T>(tensor.param, tensor.param_dtype, at.param);
      add(tensor.param, tensor.param_dtype, at.param, factor * u - decay * theta);
    }
  }
}

// ---------------------------------------------------------------- host

// Where things lie in the workspace, in bytes from its start.
struct Layout {
  int64_t shares, scratch, step, end;  // behind the number 1; the last is the step's own workspace

  Layout(const StepArguments& arguments) {
    const int64_t scalar = arguments.weights_dtype == DType::float64 ? 8 : 4;
    shares = scratch = kLine;
    int64_t coordinates = 0;
    for (int64_t i = 0; i < arguments.tensor_count; ++i) {
      scratch += chunks_of(arguments.tensors[i].count) * int64_t(sizeof(double));
      coordinates += up_to(kLine / scalar, arguments.tensors[i].count);
    }
    scratch = up_to(kLine, scratch);
    step = scratch + coordinates * scalar;
    end = step + lstm_step_cuda_workspace(arguments);
  }
};

template <class T>
void step_scaled(const StepArguments& arguments, double rms, void* workspace, cudaStream_t stream) {
  constexpr DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  constexpr Number number = sizeof(T) == 8 ? Number::float64 : Number::float32;
  const Layout layout(arguments);
  char* start = static_cast<char*>(workspace);
  T *one = reinterpret_cast<T*>(start), *scratch = reinterpret_cast<T*>(start + layout.scratch);
  double* shares = reinterpret_cast<double*>(start + layout.shares);

  std::vector<Flat> flats;
  std::vector<std::vector<int64_t>> rows;
  std::vector<StepTensor> onto, moved;
  std::vector<DenseEntry> squared;
  flats.reserve(arguments.tensor_count);
  rows.reserve(arguments.tensor_count);
  int64_t coordinates = 0;
  for (int64_t i = 0; i < arguments.tensor_count; ++i) {
    if (arguments.tensors[i].count == 0) continue;
    flats.emplace_back(arguments.tensors[i]);
    const StepTensor& tensor = flats.back().tensor;
    const int64_t count = tensor.count, chunks = chunks_of(count);
    rows.push_back(in_a_row(tensor.dims, tensor.sizes));
    const Strided u = {scratch + coordinates, dtype, rows.back().data()};
    onto.push_back(tensor);
    onto.back().param = u;
    moved.push_back({tensor.dims, tensor.sizes, count, tensor.param, u, u, chunks, {shares, Number::float64}, 0});
    squared.push_back({nullptr, u.data, shares, nullptr, count, 0, 0, dtype, dtype, dtype, number});
    coordinates += up_to(kLine / int64_t(sizeof(T)), count);
    shares += chunks;
  }

  const int64_t most = int64_t(device::multiprocessors()) * kBlocksEach;
  auto run = [&](auto kernel, int64_t blocks, const auto&... parameters) {
    const dim3 grid(unsigned(std::max<int64_t>(1, std::min(blocks, most)))), block(kThreads);
    const size_t sums = kThreads / device::kWarp * sizeof(double);
    check(device::launch(kernel, grid, block, sums, stream, parameters...), "lstm_step_scaled_");
  };
  run(fill_kernel<T>, coordinates / kThreads, scratch, coordinates, one);

  StepArguments step = arguments;
  step.tensors = onto.data();
  step.tensor_count = int64_t(onto.size());
  step.lr = {one, number};
  step.weight_decay = 0;
  lstm_step_cuda(step, start + layout.step, stream);

  for_each_table(squared, 1, kChunk, [&](const auto& table) {
    using Entry = std::decay_t<decltype(table.entries[0])>;
    run(square_kernel<T, Entry, std::decay_t<decltype(table)>::kBytes>, table.tiles, table);
  });
  const Move<T> move = {arguments.lr, T(rms), T(arguments.weight_decay)};
  auto move_all = [&](const auto& table) {
    using Entry = std::decay_t<decltype(table.entries[0])>;
    run(move_kernel<T, Entry, std::decay_t<decltype(table)>::kBytes>, table.tiles, move, table);
  };
  StepArguments moves = arguments;
  moves.tensors = moved.data();
  moves.tensor_count = int64_t(moved.size());
  moves.networks = 1;  // whose weights a tensor has is past
  Entries all = entries(moves);
  for_each_table(all.dense, 1, kChunk, move_all);
  for_each_table(all.strided, 1, kChunk, move_all);
}

}  // namespace

int64_t lstm_step_scaled_cuda_workspace(const StepArguments& arguments) { return Layout(arguments).end; }

void lstm_step_scaled_cuda(const StepArguments& arguments, double rms, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return step_scaled<double>(arguments, rms, workspace, on);
  step_scaled<float>(arguments, rms, workspace, on);
}

}  // namespace l2l
