// The step with every tensor's update scaled to a root mean square of its own: the step of the group onto scratch of
// -0.0, which then holds u, and three launches for all of its tensors, whatever their number: sums of squares, sizes, and
// the moves.
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

// Scratch of -0.0, sums of 0, and the number 1, which is the step's lr.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fill_kernel(T* scratch, int64_t count, double* sums, int64_t sum_count, T* one) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  if (first == 0) *one = T(1);
  for (int64_t i = first; i < sum_count; i += stride) sums[i] = 0;
  for (int64_t i = first; i < count; i += stride) scratch[i] = T(-0.0);
}

// Of every chunk of an array its sum of squares. entry.grad: the array; entry.state: a double for each chunk.
template <class T, class Entry, int bytes>
__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ Table<Entry, bytes> table) {
  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const Tile chunk = find_tile(table, t, kChunk);
    const Entry& array = table.entries[chunk.entry];
    double sum = 0;
    for (int i = threadIdx.x; i < chunk.count; i += blockDim.x) {
      const double x = double(load<T>(array.grad, array.grad_dtype, array.offsets(chunk.first + i).grad));
      sum += x * x;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) static_cast<double*>(array.state)[chunk.first / kChunk] = sum;
  }
}

// One tensor on its way from sums to a factor, or to r.
struct SizeEntry {
  const double* sums;  // of the chunks of u, then, with a square, of the gradient and of m: [3][chunks]
  void* square;        // v, or nullptr
  void* found;         // written
  const void* step;
  int64_t coordinates, chunks;
  int64_t count, first_tile;  // 1, and its place in the table
  double limit;               // of the gradient's norm: from it on it counts as not finite
  Number step_kind;
};

template <class T>
struct Sizing {
  Scalar lr;  // or without data: r is what is wanted
  UpdateSize size;
  double beta1;
};

// Of every tensor the factor lr r / RMS(u), or r.
template <class T, int bytes>
__global__ void __launch_bounds__(kThreads)
    size_kernel(const __grid_constant__ Sizing<T> sizing, const __grid_constant__ Table<SizeEntry, bytes> table) {
  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const SizeEntry& tensor = table.entries[t];
    double sums[3] = {};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (k > 0 && !tensor.square) break;
      double sum = 0;
      for (int64_t i = threadIdx.x; i < tensor.chunks; i += blockDim.x) sum += tensor.sums[k * tensor.chunks + i];
      sums[k] = block_sum(sum);
    }
    if (threadIdx.x != 0) continue;
    T& found = *static_cast<T*>(tensor.found);
    const double n = tensor.coordinates > 0 ? double(tensor.coordinates) : 1;
    double r = sizing.size.rms;
    if (tensor.square) {
      const bool finite = std::sqrt(sums[1]) < tensor.limit;
      const double step = read({tensor.step, tensor.step_kind});
      r = sizing.size.next(*static_cast<T*>(tensor.square), sums[1] / n, finite, sums[2] / n, step, sizing.beta1);
    }
    const T root = T(std::sqrt(sums[0] / n));
    // Not a comparison that NaN fails: a NaN in the weights must show. The smallest: reference.SMALLEST.
    found = !sizing.lr.data ? T(r) : root < T(0x1p-126) ? T(0) : T(read(sizing.lr)) * T(r) / root;
  }
}

template <class T>
struct Move {
  Scalar lr;
  T weight_decay;
};

// theta <- theta + factor u - lr weight_decay theta. entry.grad: u; entry.step: its tensor's factor.
template <class T, class Entry, int bytes>
__global__ void __launch_bounds__(kThreads)
    move_kernel(const __grid_constant__ Move<T> move, const __grid_constant__ Table<Entry, bytes> table) {
  const T decay = T(read(move.lr)) * move.weight_decay;
  for (int64_t t = blockIdx.x; t < table.tiles; t += gridDim.x) {
    const Tile chunk = find_tile(table, t, kChunk);
    const Entry& tensor = table.entries[chunk.entry];
    const T factor = *static_cast<const T*>(tensor.step);
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

// At least as many chunks as an array of these sizes is cut into, whatever its strides: one of more dimensions than an
// entry holds becomes several entries, at most one for each index of its shortest dimensions.
int64_t most_chunks(const StepTensor& tensor) {
  std::vector<int64_t> sizes(tensor.sizes, tensor.sizes + tensor.dims);
  std::sort(sizes.begin(), sizes.end());
  int64_t entries = 1;
  for (int d = 0; d < tensor.dims - StridedEntry::kDims; ++d) entries *= sizes[d];
  return tensor.count / kChunk + entries;
}

int64_t sums_of(const StepArguments& arguments) {
  int64_t count = 0;
  for (int64_t i = 0; i < arguments.tensor_count; ++i) count += 3 * most_chunks(arguments.tensors[i]);
  return count;
}

// Where things lie in the workspace, in bytes from its start.
struct Layout {
  int64_t factors, sums, scratch, step, end;  // behind the number 1; the last is the step's own workspace
  int64_t coordinates;

  Layout(const StepArguments& arguments) : factors(kLine), coordinates(0) {
    const int64_t scalar = arguments.weights_dtype == DType::float64 ? 8 : 4;
    for (int64_t i = 0; i < arguments.tensor_count; ++i)
      coordinates += up_to(kLine / scalar, arguments.tensors[i].count);
    sums = up_to(kLine, factors + arguments.tensor_count * scalar);
    scratch = up_to(kLine, sums + sums_of(arguments) * int64_t(sizeof(double)));
    step = scratch + coordinates * scalar;
    end = step + lstm_step_cuda_workspace(arguments);
  }
};

// Gives every chunk of an array a place of its own for its sum: entry.step, the array's first, has become entry.state.
template <class Entry>
void give_places(std::vector<Entry>& entries) {
  const void* array = nullptr;
  double* next = nullptr;
  for (Entry& entry : entries) {
    if (entry.step != array) {
      array = entry.step;
      next = const_cast<double*>(static_cast<const double*>(array));
    }
    entry.state = next;
    next += chunks_of(entry.count);
  }
}

StepArguments with_tensors(StepArguments arguments, const std::vector<StepTensor>& tensors) {
  arguments.tensors = tensors.data();
  arguments.tensor_count = int64_t(tensors.size());
  return arguments;
}

// Launches over tables of tensors.
struct Launcher {
  cudaStream_t stream;
  const char* op;

  template <class Kernel, class... Parameters>
  void run(Kernel kernel, int64_t blocks, const Parameters&... parameters) const {
    const int64_t most = int64_t(device::multiprocessors()) * kBlocksEach;
    const dim3 grid(unsigned(std::max<int64_t>(1, std::min(blocks, most)))), block(kThreads);
    const size_t bytes = kThreads / device::kWarp * sizeof(double);
    check(device::launch(kernel, grid, block, bytes, stream, parameters...), op);
  }

  template <class Launch>
  void run_all(const Entries& all, const Launch& launch) const {
    for_each_table(all.dense, 1, kChunk, launch);
    for_each_table(all.strided, 1, kChunk, launch);
  }
};

// The arrays of a group whose squares are summed, and what becomes of the sums.
template <class T>
struct Sums {
  std::vector<StepTensor> arrays;
  std::vector<SizeEntry> sized;
  double* next;  // place in the workspace

  // from: as the caller has it; tensor: the same with few dimensions; u: its update, or none.
  void add(const StepArguments& arguments, const StepTensor& from, const StepTensor& tensor, const Strided* u,
           void* square, T* found) {
    const int64_t chunks = most_chunks(from);
    auto sum = [&](const Strided& array, int k) {
      const Scalar place = {next + k * chunks, Number::float64};
      arrays.push_back({tensor.dims, tensor.sizes, tensor.count, array, array, array, 0, place, 0});
    };
    if (u) sum(*u, 0);
    if (square && tensor.count > 0) sum(tensor.grad, 1), sum(tensor.state, 2);  // the state's first row: m
    sized.push_back({next, square, found, tensor.step.data, tensor.count, chunks, 1, 0,
                     arguments.net.gradient_limit(sizeof(T) == 8, tensor.state.dtype), tensor.step.kind});
    next += 3 * chunks;
  }

  void launch(const StepArguments& arguments, const Sizing<T>& sizing, const Launcher& launcher) const {
    Entries all = entries(with_tensors(arguments, arrays));
    give_places(all.dense);
    give_places(all.strided);
    launcher.run_all(all, [&](const auto& table) {
      using Entry = std::decay_t<decltype(table.entries[0])>;
      launcher.run(square_kernel<T, Entry, std::decay_t<decltype(table)>::kBytes>, table.tiles, table);
    });
    for_each_table(sized, 1, 1, [&](const auto& table) {
      launcher.run(size_kernel<T, std::decay_t<decltype(table)>::kBytes>, table.tiles, sizing, table);
    });
  }
};

template <class T>
void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes, void* workspace, cudaStream_t stream) {
  constexpr DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  constexpr Number number = sizeof(T) == 8 ? Number::float64 : Number::float32;
  const Launcher launcher = {stream, "lstm_step_scaled_"};
  const Layout layout(arguments);
  char* start = static_cast<char*>(workspace);
  T *one = reinterpret_cast<T*>(start), *scratch = reinterpret_cast<T*>(start + layout.scratch);
  T* factor = reinterpret_cast<T*>(start + layout.factors);
  double* const first_sum = reinterpret_cast<double*>(start + layout.sums);

  std::vector<Flat> flats;
  std::vector<std::vector<int64_t>> rows;
  std::vector<StepTensor> onto, moved;
  Sums<T> sums = {{}, {}, first_sum};
  flats.reserve(arguments.tensor_count);
  rows.reserve(arguments.tensor_count);
  T* u_start = scratch;
  for (int64_t i = 0; i < arguments.tensor_count; ++i, ++factor) {
    const StepTensor& from = arguments.tensors[i];
    if (from.count == 0) continue;
    flats.emplace_back(from);
    const StepTensor& tensor = flats.back().tensor;
    rows.push_back(in_a_row(tensor.dims, tensor.sizes));
    const Strided u = {u_start, dtype, rows.back().data()};
    u_start += up_to(kLine / int64_t(sizeof(T)), tensor.count);
    onto.push_back(tensor);
    onto.back().param = u;
    moved.push_back({tensor.dims, tensor.sizes, tensor.count, tensor.param, u, u, 0, {factor, number}, 0});
    sums.add(arguments, from, tensor, &u, sizes.squares ? sizes.squares[i] : nullptr, factor);
  }
  launcher.run(
      fill_kernel<T>, layout.coordinates / kThreads, scratch, layout.coordinates, first_sum, sums_of(arguments), one);

  StepArguments step = with_tensors(arguments, onto);
  step.lr = {one, number};
  step.weight_decay = 0;
  lstm_step_cuda(step, start + layout.step, stream);

  sums.launch(arguments, {arguments.lr, sizes.size, arguments.net.beta1}, launcher);
  const Move<T> move = {arguments.lr, T(arguments.weight_decay)};
  launcher.run_all(entries(with_tensors(arguments, moved)), [&](const auto& table) {
    using Entry = std::decay_t<decltype(table.entries[0])>;
    launcher.run(move_kernel<T, Entry, std::decay_t<decltype(table)>::kBytes>, table.tiles, move, table);
  });
}

template <class T>
void update_sizes(
    const StepArguments& arguments, const UpdateSizes& sizes, void* found, void* workspace, cudaStream_t stream) {
  const Launcher launcher = {stream, "lstm_update_sizes_"};
  std::vector<Flat> flats;
  flats.reserve(arguments.tensor_count);
  Sums<T> sums = {{}, {}, static_cast<double*>(workspace)};
  for (int64_t i = 0; i < arguments.tensor_count; ++i) {
    flats.emplace_back(arguments.tensors[i]);
    T* const to = static_cast<T*>(found) + i;
    sums.add(arguments, arguments.tensors[i], flats.back().tensor, nullptr, sizes.squares[i], to);
  }
  check(cudaMemsetAsync(workspace, 0, lstm_update_sizes_cuda_workspace(arguments), stream), launcher.op);
  sums.launch(arguments, {{nullptr, Number::float64}, sizes.size, arguments.net.beta1}, launcher);
}

}  // namespace

int64_t lstm_step_scaled_cuda_workspace(const StepArguments& arguments) { return Layout(arguments).end; }

void lstm_step_scaled_cuda(
    const StepArguments& arguments, const UpdateSizes& sizes, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return step_scaled<double>(arguments, sizes, workspace, on);
  step_scaled<float>(arguments, sizes, workspace, on);
}

int64_t lstm_update_sizes_cuda_workspace(const StepArguments& arguments) {
  return sums_of(arguments) * int64_t(sizeof(double));
}

void lstm_update_sizes_cuda(
    const StepArguments& arguments, const UpdateSizes& sizes, void* found, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return update_sizes<double>(arguments, sizes, found, workspace, on);
  update_sizes<float>(arguments, sizes, found, workspace, on);
}

}  // namespace l2l
