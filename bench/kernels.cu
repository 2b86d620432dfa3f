// The CUDA kernels without torch and Python: what they move and how long they take, a line for each measurement.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90,code=sm_90 bench/kernels.cu \
//     csrc/cuda/step.cu csrc/cuda/matrix_step.cu csrc/cuda/unroll.cu csrc/cuda/matrix_unroll.cu \
//     csrc/cuda/unroll_backward.cu -o build/kernels
//   build/kernels [copy] [pattern] [step] [rows] [repeat] [teams] [unroll] [trace NAME COORDINATES]
//
// It starts in a fraction of a second, so that many variants of a kernel, each an executable of its own, can be
// compared within a minute of a GPU. Medians of CUDA events; the network is the paper's, its weights random.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/cuda/boxes.cuh"
#include "../csrc/element.h"
#include "../csrc/lstm_step.h"
#include "../csrc/lstm_unroll.h"

using namespace l2l;

#define CHECK(call)                                                                                      \
  do {                                                                                                   \
    const cudaError_t error = (call);                                                                    \
    if (error != cudaSuccess) {                                                                          \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error));     \
      std::exit(1);                                                                                      \
    }                                                                                                    \
  } while (false)

namespace {

// ---------------------------------------------------------------- memory and time

struct Buffer {
  void* data = nullptr;
  size_t bytes;
  explicit Buffer(size_t bytes) : bytes(bytes) { CHECK(cudaMalloc(&data, std::max<size_t>(bytes, 1))); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

__device__ uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Uniform in [-scale, scale]; with `decades`, times a power of ten between 10^-decades and 1.
__global__ void fill_float(float* to, int64_t count, uint32_t seed, float scale, float decades) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const float x = mixed(uint32_t(i) * 2 + seed) * 0x1p-31f - 1;
    to[i] = scale * x * exp10f(-decades * mixed(uint32_t(i) * 2 + 1 + seed) * 0x1p-32f);
  }
}
__global__ void fill_bfloat16(uint16_t* to, int64_t count, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = uint16_t(__float_as_uint(scale * (mixed(uint32_t(i) * 2 + seed) * 0x1p-31f - 1)) >> 16);
}

// A sum over the words, each mixed with its place: the same only for the same bits (but for one case in 2^64).
__global__ void digest(const uint32_t* words, int64_t count, unsigned long long* sum) {
  unsigned long long mine = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    mine += (unsigned long long)mixed(words[i] + mixed(uint32_t(i))) << (i & 31);
  atomicAdd(sum, mine);
}

unsigned long long digest_of(const Buffer& buffer) {
  Buffer sum(8);
  CHECK(cudaMemset(sum.data, 0, 8));
  digest<<<1024, 256>>>(buffer.as<uint32_t>(), int64_t(buffer.bytes / 4), sum.as<unsigned long long>());
  unsigned long long found;
  CHECK(cudaMemcpy(&found, sum.data, 8, cudaMemcpyDeviceToHost));
  return found;
}

// Microseconds of one call: the median over `rounds` rounds of `calls` calls each.
double microseconds(const std::function<void()>& call, int rounds = 9, double at_least = 2e3) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  auto time = [&](int calls) {
    CHECK(cudaEventRecord(begin));
    for (int i = 0; i < calls; ++i) call();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    return 1e3 * milliseconds / calls;
  };
  time(2);
  const int calls = std::max(1, std::min(200, int(at_least / time(2))));
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) times.push_back(time(calls));
  std::sort(times.begin(), times.end());
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return times[times.size() / 2];
}

double copy_rate = 0;  // bytes a second, read and written

double measure_copy(size_t bytes) {
  Buffer from(bytes), to(bytes);
  fill_float<<<1024, 256>>>(from.as<float>(), int64_t(bytes / 4), 1, 1, 0);
  const double us = microseconds([&] { CHECK(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice)); });
  return 2 * double(bytes) / us * 1e6;
}

void line(const char* what, const char* how, int64_t coordinates, double us, double bytes) {
  const double rate = bytes / us * 1e6;
  std::printf(
      "%-10s %-40s %9lld  %9.2f us  %7.1f GB/s", what, how, (long long)coordinates, us, rate / 1e9);
  if (copy_rate > 0 && bytes > 0) std::printf("  %5.1f%% of copy", 100 * rate / copy_rate);
  std::printf("\n");
  std::fflush(stdout);
}

// ---------------------------------------------------------------- the step's memory, without its arithmetic

// Where the 16 bytes of a lane are, in float4s: of tile t, coordinates 4 r .. 4 r + 3 of row 4 s + q.
struct Layout {
  const char* name;
  int64_t tile, slot, r, q;
};

// Reads and writes again kRows rows of 32-coordinate pieces, as the kernels do: a warp a tile, a lane 16 bytes; kAhead
// loads of a lane are under way at a time.
template <int kRows, int kAhead>
__global__ void __launch_bounds__(256) pattern(float4* state, Layout layout, int64_t tiles) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t own = lane / 4 * layout.r + lane % 4 * layout.q;
  for (int64_t tile = warp * int64_t(gridDim.x) + blockIdx.x; tile < tiles; tile += int64_t(gridDim.x) * warps) {
    float4* const at = state + tile * layout.tile + own;
#pragma unroll 1
    for (int first = 0; first < kRows / 4; first += kAhead) {
      float4 held[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) held[i] = at[(first + i) * layout.slot];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        held[i].x += 1;
        at[(first + i) * layout.slot] = held[i];
      }
    }
  }
}

// The same by the copy engine: a box is a tile's 80 rows or half of them. A warp sends for the boxes of `together`
// neighbouring tiles at once, while those that came before are written again from where they came.
constexpr int kBoxRows = 40, kBoxFloats = kBoxRows * 32;

template <int kWarps, int kTogether>
__global__ void __launch_bounds__(kWarps * 32) box_pattern(const __grid_constant__ device::BoxMap map, int64_t tiles) {
  constexpr int kBoxes = 2 * kTogether, kDepth = 2;
  float* const boxes = reinterpret_cast<float*>(device::shared_memory());
  const int warp = threadIdx.x / 32;
  device::Arrival* const arrivals = reinterpret_cast<device::Arrival*>(boxes + kWarps * kDepth * kBoxes * kBoxFloats);
  float* const mine = boxes + warp * kDepth * kBoxes * kBoxFloats;
  device::Arrival* const arrived = arrivals + warp * kDepth * kBoxes;
  const bool leader = device::lane() == 0;
  if (leader)
    for (int i = 0; i < kDepth * kBoxes; ++i) device::arrival_begin(arrived + i);
  __syncwarp();
  const int64_t groups = tiles / kTogether, stride = int64_t(gridDim.x) * kWarps;
  auto send = [&](int64_t group, int place) {
    if (group < groups && leader)
      for (int i = 0; i < kBoxes; ++i)
        device::box_load(
            mine + (place * kBoxes + i) * kBoxFloats, map, (group * kTogether + i % kTogether) * 32,
            i / kTogether * kBoxRows, kBoxFloats * 4, arrived + place * kBoxes + i);
  };
  int64_t group = warp * int64_t(gridDim.x) + blockIdx.x;
  send(group, 0);
  uint32_t parity = 0;
  for (int place = 0; group < groups; group += stride) {
    if (leader) device::box_stores_read();
    send(group + stride, place ^ 1);
    for (int i = 0; i < kBoxes; ++i) {
      device::arrival_wait(arrived + place * kBoxes + i, parity);
      mine[(place * kBoxes + i) * kBoxFloats + device::lane()] += 1;
    }
    device::boxes_written();
    __syncwarp();
    if (leader)
      for (int i = 0; i < kBoxes; ++i)
        device::box_store(
            map, (group * kTogether + i % kTogether) * 32, i / kTogether * kBoxRows,
            mine + (place * kBoxes + i) * kBoxFloats);
    place ^= 1;
    if (place == 0) parity ^= 1;
  }
  if (leader) device::box_stores_read();
}

template <int kWarps, int kTogether>
void box_patterns(float* state, int64_t count, int64_t row) {
  device::BoxMap map;
  const auto kernel = box_pattern<kWarps, kTogether>;
  if (!device::has_boxes(kernel) || !device::map_boxes(map, state, 4, count, 2 * kBoxRows, row * 4, kBoxRows)) return;
  const size_t bytes = kWarps * 4 * kTogether * (kBoxFloats * 4 + 8);
  const double us = microseconds([&] {
    CHECK(device::launch(kernel, 132, kWarps * 32, bytes, nullptr, map, count / 32));
  }, 5);
  char name[80];
  std::snprintf(name, sizeof name, "boxes of 40 rows, %d together, 1 x %d", kTogether, kWarps);
  line("pattern", name, count, us, 4.0 * kBoxRows * 4 * count);
}

void patterns() {
  constexpr int kRows = 80;
  const int64_t count = 10'000'000, tiles = count / 32;  // whole lines of 128 bytes, of which a tile's row is one
  const int64_t row = count / 4, odd = row + 4;
  Buffer state(size_t(kRows) * (count + 1024) * 4);
  CHECK(cudaMemset(state.data, 0, state.bytes));
  const Layout layouts[] = {
      {"rows, lines of 64 B", 8, 4 * odd, 1, odd},
      {"rows, lines of 128 B", 8, 4 * (row + 8), 1, row + 8},
      {"rows 4 KB further apart", 8, 4 * (row + 8 * 33), 1, row + 8 * 33},
      {"four rows side by side", 32, 4 * row + 32, 4, 1},
      {"tiles of 10 KB", 8 * kRows, 32, 1, 8}};
  for (const Layout& layout : layouts)
    for (int ahead : {5, 20})
      for (int blocks : {1, 2}) {
        const auto kernel = ahead == 5 ? pattern<kRows, 5> : pattern<kRows, 20>;
        const double us =
            microseconds([&] { kernel<<<132 * blocks, 256>>>(state.as<float4>(), layout, tiles); }, 5);
        char name[80];
        std::snprintf(name, sizeof name, "%s, %d ahead, %d x 8", layout.name, ahead, blocks);
        line("pattern", name, count, us, 2.0 * kRows * 4 * count);
      }
  box_patterns<10, 1>(state.as<float>(), count, 4 * (row + 8));
  box_patterns<4, 1>(state.as<float>(), count, 4 * (row + 8));
  box_patterns<5, 2>(state.as<float>(), count, 4 * (row + 8));
  box_patterns<2, 4>(state.as<float>(), count, 4 * (row + 8));
  CHECK(cudaDeviceSynchronize());
}

// ---------------------------------------------------------------- the ops

constexpr Network kPaper = {Features::log_sign, 20, 2, false, false, false, 0.1, 10, 0.95, 0.95, 1e-8};

// Tensors of a group, in one buffer each.
struct Group {
  Network net;
  DType dtype;
  int64_t count, row;
  Buffer param, grad, state, weights, numbers;
  std::vector<int64_t> sizes;
  std::vector<StepTensor> tensors;
  int64_t stride = 1;

  // further: elements from one state row to the next beside those of whole lines.
  Group(std::vector<int64_t> shapes, DType state_dtype, Network net = kPaper, int64_t further = 0)
      : net(net),
        dtype(state_dtype),
        count(total(shapes)),
        row(rounded(shapes) + further),
        param(row * 4),
        grad(row * 4),
        state(size_t(net.state_rows()) * row * size_of(state_dtype)),
        weights(WeightLayout{net}.count() * 4),
        numbers(8),
        sizes(shapes) {
    reset();
    fill_float<<<1024, 256>>>(grad.as<float>(), row, 2, 1, 5);
    fill_float<<<8, 256>>>(weights.as<float>(), WeightLayout{net}.count(), 3, 0.4f, 0);
    const float both[2] = {1e-3f, 3};
    CHECK(cudaMemcpy(numbers.data, both, 8, cudaMemcpyHostToDevice));
    int64_t at = 0;
    for (int64_t& size : sizes) {
      const Scalar step = {numbers.as<float>() + 1, Number::float32};
      tensors.push_back(
          {1, &size, size, {param.as<float>() + at, DType::float32, &stride},
           {grad.as<float>() + at, DType::float32, &stride},
           {state.as<char>() + at * size_of(dtype), dtype, &stride}, row, step, 0});
      at += lines(size);
    }
    CHECK(cudaDeviceSynchronize());
  }
  static int64_t total(const std::vector<int64_t>& shapes) {
    int64_t sum = 0;
    for (int64_t size : shapes) sum += size;
    return sum;
  }
  static int64_t lines(int64_t size) { return (size + 31) / 32 * 32; }  // of 128 bytes
  static int64_t rounded(const std::vector<int64_t>& shapes) {
    int64_t sum = 0;
    for (int64_t size : shapes) sum += lines(size);
    return sum;
  }
  void reset() {
    fill_float<<<1024, 256>>>(param.as<float>(), row, 5, 1, 0);
    if (dtype == DType::float32)
      fill_float<<<1024, 256>>>(state.as<float>(), int64_t(state.bytes / 4), 4, 0.5f, 0);
    else
      fill_bfloat16<<<1024, 256>>>(state.as<uint16_t>(), int64_t(state.bytes / 2), 4, 0.5f);
  }
  void step() const {
    lstm_step_cuda(
        {net, weights.data, 1, DType::float32, tensors.data(), int64_t(tensors.size()),
         {numbers.as<float>(), Number::float32}, 0, false},
        nullptr, nullptr);
  }
  double bytes() const { return count * (2.0 * net.state_rows() * size_of(dtype) + 12); }
};

const char* name_of(DType dtype) { return dtype == DType::float32 ? "float32 state" : "bfloat16 state"; }

void steps() {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (int64_t count : {100'000, 1'000'000, 10'000'000, 30'000'000}) {
      Group group({count}, dtype);
      line("step", name_of(dtype), count, microseconds([&] { group.step(); }), group.bytes());
    }
}

// The step with state rows some lines of 128 bytes further apart than they need be.
void rows() {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (int64_t count : {int64_t(10'000'000), int64_t(1) << 23})
      for (int lines : {0, 1, 2, 3, 4, 5, 8, 16, 32, 33}) {
        Group group({count}, dtype, kPaper, int64_t(lines) * 128 / size_of(dtype));
        char name[80];
        std::snprintf(name, sizeof name, "%s, rows %d lines further", name_of(dtype), lines);
        line("rows", name, count, microseconds([&] { group.step(); }, 5), group.bytes());
      }
}

// 20 runs from the same start at 10M must agree in every bit: a race between blocks or warps shows itself here.
bool repeats() {
  bool same = true;
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    Group group({10'000'000}, dtype);
    std::vector<unsigned long long> found;
    for (int run = 0; run < 20; ++run) {
      group.reset();
      for (int i = 0; i < 3; ++i) group.step();
      found.push_back(digest_of(group.state) * 31 + digest_of(group.param));
    }
    const bool all = std::all_of(found.begin(), found.end(), [&](auto x) { return x == found[0]; });
    std::printf("repeat     %-40s   %9d  20 runs of 3 steps: %s (%016llx)\n", name_of(dtype), 10'000'000,
                all ? "the same to the last bit" : "DIFFER", found[0]);
    same = same && all;
  }
  return same;
}

void teams() {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (int64_t count : {1'000, 4'000, 8'000, 16'000, 33'000, 66'000, 132'000}) {
      Group group({count}, dtype);
      line("small", name_of(dtype), count, microseconds([&] { group.step(); }), group.bytes());
    }
  Group mnist({15'680, 20, 200, 10}, DType::float32);
  line("small", "MNIST network, 4 tensors", mnist.count, microseconds([&] { mnist.step(); }), mnist.bytes());
}

void unrolls(const std::vector<int64_t>& counts) {
  const int64_t steps = 20;
  for (int64_t count : counts) {
    const int rows = kPaper.state_rows();
    Buffer grads(steps * count * 4), state(rows * count * 4), updates(steps * count * 4), last(rows * count * 4);
    Buffer weights(WeightLayout{kPaper}.count() * 4), d_weights(weights.bytes), number(4);
    fill_float<<<1024, 256>>>(grads.as<float>(), steps * count, 2, 1, 5);
    fill_float<<<1024, 256>>>(state.as<float>(), rows * count, 4, 0.5f, 0);
    fill_float<<<8, 256>>>(weights.as<float>(), int64_t(weights.bytes / 4), 3, 0.4f, 0);
    const float one = 1;
    CHECK(cudaMemcpy(number.data, &one, 4, cudaMemcpyHostToDevice));
    const UnrollArguments arguments = {
        kPaper, weights.data, DType::float32, steps, count, {number.data, Number::float32},
        {grads.data, DType::float32, count, 1}, {state.data, DType::float32, 1, count}};
    const Matrix to = {updates.data, DType::float32, count, 1}, end = {last.data, DType::float32, 1, count};
    Buffer space(lstm_unroll_cuda_workspace(arguments));
    auto forward = [&] { lstm_unroll_cuda(arguments, to, end, space.data, nullptr); };
    line("unroll", "forward, 20 steps", count, microseconds(forward), 0);
    const UnrollGradients gradients = {to, {nullptr, DType::float32, 0, 0}, {nullptr, DType::float32, 0, 0},
                                       {nullptr, DType::float32, 0, 0}, d_weights.data};
    Buffer more(lstm_unroll_backward_cuda_workspace(arguments, gradients));
    auto backward = [&] { lstm_unroll_backward_cuda(arguments, gradients, more.data, nullptr); };
    const double us = microseconds(backward);
    line("unroll", "backward, 20 steps", count, us, 0);
    const double flops = 2.0 * steps * count * (5 * 4980);  // forward twice, two products back, the outer product
    std::printf("           of which %.2f TFLOP/s of multiply-adds; digest %016llx\n", flops / us / 1e6,
                digest_of(d_weights));
  }
}

// A few calls and nothing else, for a profiler.
void trace(const std::string& name, int64_t count) {
  if (name == "unroll") return unrolls({count});
  Group group({count}, name == "bfloat16" ? DType::bfloat16 : DType::float32);
  for (int i = 0; i < 3; ++i) group.step();
  CHECK(cudaDeviceSynchronize());
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> wanted(argv + 1, argv + argc);
  if (wanted.size() == 3 && wanted[0] == "trace") return trace(wanted[1], std::atoll(wanted[2].c_str())), 0;
  if (wanted.empty()) wanted = {"copy", "pattern", "step", "rows", "repeat", "teams", "unroll"};
  auto wants = [&](const char* name) { return std::find(wanted.begin(), wanted.end(), name) != wanted.end(); };
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors, %.0f MB of L2\n", device.name, device.multiProcessorCount,
              device.l2CacheSize / 1048576.0);
  if (wants("copy")) {
    for (size_t bytes : {size_t(512) << 20, size_t(4) << 30}) {
      copy_rate = measure_copy(bytes);
      std::printf("copy of %zu MB: %.1f GB/s read and written\n", bytes >> 20, copy_rate / 1e9);
    }
  }
  if (wants("pattern")) patterns();
  if (wants("step")) steps();
  if (wants("rows")) rows();
  bool good = true;
  if (wants("repeat")) good = repeats();
  if (wants("teams")) teams();
  if (wants("unroll")) unrolls({512, 16'000, 100'000});
  CHECK(cudaDeviceSynchronize());
  return good ? 0 : 1;
}
