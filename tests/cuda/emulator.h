// Runs CUDA kernels on the CPU, for machines without a GPU: the same names as csrc/cuda/device.cuh and the little of the
// CUDA runtime that launchers use. Include it through -DL2L_CUDA_EMULATOR='"..."'; the .cu files then compile as C++.
//
// It is made to find mistakes, not to be fast:
// - blocks run one after the other in a shuffled order, and the threads of a block as fibers which run, in a newly
//   shuffled order, until the next barrier: without a barrier some reader runs before its writer;
// - shared memory is NaN when a block begins, and exactly as long as was asked for (seen by AddressSanitizer);
// - asynchronous copies land only when they are waited for, boxes likewise, and boxes are stored only when that is;
// - warp operations that not all 32 lanes reach together, and barriers that some thread never reaches, abort;
// - the special functions are off by a pseudo-random error of the size that the hardware's may have.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define L2L_DEVICE inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

namespace l2l {
namespace emulator {

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

// Rows of a tensor, and which box of them is where in shared memory.
struct BoxMap {
  char* data;
  int element;
  int64_t count, rows, pitch;
  int box_rows;

  int bytes() const { return 32 * box_rows * element; }
};
struct Box {
  const BoxMap* map;
  int64_t column;
  int row;
  char* shared;
};

struct Thread {
  ucontext_t context;
  dim3 index;
  int number;
  bool done = false;
  const void* waits_for = nullptr;  // what it waits at, for the message
  int64_t ticket = 0;               // it may go on when the barrier's generation has passed this
  std::vector<std::vector<Copy>> groups{1};
  std::vector<Box> stores;        // that have not been waited for
  int written = 0, stored = 0;    // boxes_written so far; and at its warp's last box_store
};

// A barrier: who arrives waits until all have.
struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
};

// One warp's exchange: each lane lays down its operands, all meet, each reads all 32. Two of them in turn, so that a fast
// lane may lay down its next operands while a slow one still reads.
struct Warp {
  Barrier barrier;
  alignas(64) char operands[2][32][64];
  int64_t turns[32] = {};
  const char* operation[2] = {};
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned char* shared = nullptr;
  std::map<const void*, std::pair<int64_t, std::vector<Box>>> arrivals;  // how many have come, and who is on the way
  int64_t came = 0;                                                      // of all
  ucontext_t scheduler;
  Thread* running = nullptr;
  std::function<void()> body;
};

inline thread_local Block* block = nullptr;
inline thread_local dim3 block_index, block_size, grid_size;
inline std::mt19937& random() {
  static thread_local std::mt19937 generator(1);
  return generator;
}

inline Thread& self() { return *block->running; }

inline void give_way() { swapcontext(&self().context, &block->scheduler); }

inline void meet(Barrier& barrier, const char* at) {
  const int64_t ticket = barrier.generation;
  self().waits_for = at;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == ticket) give_way();
  self().waits_for = nullptr;
}

// Lays down this lane's operand and returns all 32, [lane].
template <class T>
const T (&exchange(const T& operand, const char* operation))[32] {
  static_assert(sizeof(T) == 64, "operands are padded to 64 bytes");
  Warp& warp = block->warps[self().number / 32];
  const int lane = self().number % 32, turn = int(warp.turns[lane]++ & 1);
  std::memcpy(warp.operands[turn][lane], &operand, sizeof operand);
  if (warp.barrier.arrived == 0) warp.operation[turn] = operation;
  if (std::strcmp(warp.operation[turn], operation) != 0) stop("lanes of a warp meet in different operations");
  meet(warp.barrier, operation);
  return reinterpret_cast<const T(&)[32]>(warp.operands[turn]);
}

inline void enter() {
  block->body();
  self().done = true;
  // CUDA counts exited threads as arrived at the block's barrier; a warp's operations need every lane.
  Barrier& barrier = block->barrier;
  --barrier.members;
  if (barrier.members > 0 && barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  for (;;) give_way();
}

inline void run_block(size_t shared_bytes, const std::function<void()>& body) {
  constexpr size_t kStack = 256 * 1024;
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;  // of all blocks: fresh memory is slow
  const int threads = int(block_size.x * block_size.y * block_size.z);
  if (threads % 32 != 0) stop("a block must be of whole warps");
  Block fresh;
  block = &fresh;
  fresh.body = body;
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1))) stop("no memory");
  const std::unique_ptr<void, void (*)(void*)> owner(shared, std::free);
  std::memset(shared, 0xff, shared_bytes);
  fresh.shared = static_cast<unsigned char*>(shared);
  fresh.threads.resize(threads);
  fresh.warps.resize(threads / 32);
  for (Warp& warp : fresh.warps) warp.barrier.members = 32;
  fresh.barrier.members = threads;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = fresh.threads[i];
    order[i] = thread.number = i;
    thread.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    if (i == int(stacks.size())) stacks.emplace_back(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[i].get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  auto progress = [&] {
    int64_t sum = fresh.barrier.generation + fresh.came;
    for (const Warp& warp : fresh.warps) sum += warp.barrier.generation;
    return sum;
  };
  for (int left = threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), random());
    const int before = left;
    const int64_t so_far = progress();
    left = 0;
    for (int i : order) {
      Thread& thread = fresh.threads[i];
      if (!thread.done) {
        fresh.running = &thread;
        swapcontext(&fresh.scheduler, &thread.context);
      }
      left += !thread.done;
    }
    if (left == before && progress() == so_far && left > 0) {
      for (const Thread& thread : fresh.threads)
        if (!thread.done)
          std::fprintf(stderr, "thread %d waits at %s\n", thread.number, thread.waits_for ? static_cast<const char*>(thread.waits_for) : "?");
      stop("some threads of a block or warp never arrive where others wait");
    }
  }
  for (const Thread& thread : fresh.threads)
    if (!thread.stores.empty()) stop("a thread ends while shared memory is still read by its stores");
  block = nullptr;
}

template <class T>
struct alignas(64) Padded {
  T value;
  char rest[64 - sizeof(T)];
};

// A relative error of at most `ulps` units in the last place, always the same one for the same value.
inline float off_by(float value, float ulps) {
  if (!std::isfinite(value) || value == 0) return value;
  const float unit = std::ldexp(1.0f, std::ilogb(value) - 23);
  uint32_t mixed;
  std::memcpy(&mixed, &value, sizeof mixed);
  mixed = (mixed ^ mixed >> 15) * 0x2c1b3c6du;
  mixed = (mixed ^ mixed >> 12) * 0x297a2d39u;
  const float off = value + ulps * unit * (float(mixed >> 8) * 0x1p-23f - 1);
  return std::fabs(off) < std::ldexp(1.0f, -126) ? std::copysign(0.0f, off) : off;
}

inline float float16(uint32_t bits) {
  const int exponent = bits >> 10 & 31, rest = bits & 1023;
  const float size = exponent == 31 ? (rest ? NAN : INFINITY)
      : exponent == 0                ? std::ldexp(float(rest), -24)
                                     : std::ldexp(float(1024 + rest), exponent - 25);
  return bits >> 15 & 1 ? -size : size;
}

inline float flush(float x) { return std::fabs(x) < std::ldexp(1.0f, -126) ? std::copysign(0.0f, x) : x; }

}  // namespace emulator

namespace device {

constexpr int kWarp = 32;

inline int lane() { return emulator::self().number % kWarp; }

template <class T>
T shuffle(T value, int from_lane) {
  const emulator::Padded<T> mine{value, {}};
  return emulator::exchange(mine, "shuffle")[from_lane & 31].value;
}

template <class T>
T shuffle_xor(T value, int mask) {
  const emulator::Padded<T> mine{value, {}};
  return emulator::exchange(mine, "shuffle_xor")[lane() ^ mask].value;
}

inline uint32_t ballot(bool value) {
  const emulator::Padded<bool> mine{value, {}};
  const auto& all = emulator::exchange(mine, "ballot");
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= uint32_t(all[i].value) << i;
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// d += a b for fragments whose registers hold kPacked elements each: element(register, i) is the i-th.
template <int kPacked, class Element>
void multiply(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* operation, const Element& element) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  emulator::Padded<Fragments> mine{};
  std::copy(a, a + 4, mine.value.a);
  std::copy(b, b + 2, mine.value.b);
  const auto& all = emulator::exchange(mine, operation);
  constexpr int kHalf = 4 * kPacked;  // k of one register of the four lanes
  const int r = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = r + 8 * (i / 2), column = 2 * q + i % 2;
    double sum = d[i];
    for (int k = 0; k < 2 * kHalf; ++k) {
      const int owner = k % kHalf / kPacked;
      const uint32_t of_a = all[row % 8 * 4 + owner].value.a[row / 8 + 2 * (k / kHalf)];
      const uint32_t of_b = all[column * 4 + owner].value.b[k / kHalf];
      sum += double(element(of_a, k % kPacked)) * double(element(of_b, k % kPacked));
    }
    d[i] = float(sum);  // the hardware does not round to nearest, but cuts
    if (std::fabs(d[i]) > std::fabs(sum)) d[i] = std::nextafter(d[i], 0.0f);
  }
}

inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<1>(d, a, b, "multiply_tf32", [](uint32_t bits, int) { return bits_float(bits & ~0x1fffu); });
}

inline void multiply_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(d, a, b, "multiply_float16", [](uint32_t bits, int i) { return emulator::float16(bits >> 16 * i); });
}

inline int count_ones(uint32_t bits) { return __builtin_popcount(bits); }

template <int size>
void copy(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % size || reinterpret_cast<uintptr_t>(global) % size)
    emulator::stop("an asynchronous copy's address is not aligned to its size");
  if (bytes < 0 || bytes > size) emulator::stop("an asynchronous copy of more bytes than its size");
  std::memset(shared, 0xff, size);  // what was there may be gone at any time from now on
  emulator::self().groups.back().push_back({shared, global, bytes, size});
}

inline void copy_16(void* shared, const void* global, int bytes = 16) { copy<16>(shared, global, bytes); }
inline void copy_8(void* shared, const void* global, int bytes = 8) { copy<8>(shared, global, bytes); }

inline void copies_end() { emulator::self().groups.emplace_back(); }

template <int pending>
void copies_landed() {
  auto& groups = emulator::self().groups;
  while (int(groups.size()) - 1 > pending) {  // the last one is still open
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

using emulator::BoxMap;
using Arrival = uint64_t;
constexpr bool kBoxes = true;

template <class... Parameters>
bool has_boxes(void (*)(Parameters...)) {
  const char* boxes = std::getenv("L2L_EMULATED_BOXES");
  return !boxes || std::strcmp(boxes, "0") != 0;
}

inline bool map_boxes(
    BoxMap& map, void* data, int element_bytes, int64_t count, int64_t rows, int64_t pitch, int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || pitch % 16 || box_rows > 256)
    emulator::stop("boxes of rows that the copy engine cannot take");
  map = {static_cast<char*>(data), element_bytes, count, rows, pitch, box_rows};
  return true;
}

inline void arrival_begin(Arrival* arrival) { emulator::block->arrivals[arrival] = {}; }

inline void arrival_wait(Arrival* arrival, uint32_t parity) {
  if (!emulator::block->arrivals.count(arrival)) emulator::stop("a wait for an arrival that has not begun");
  auto& [came, under_way] = emulator::block->arrivals[arrival];
  emulator::self().waits_for = "arrival_wait";
  while ((came & 1) == parity) {
    if (under_way.empty()) {
      emulator::give_way();
      continue;
    }
    const emulator::Box box = under_way.front();
    const BoxMap& map = *box.map;
    under_way.erase(under_way.begin());
    for (int i = 0; i < map.box_rows * kWarp; ++i) {
      const int64_t row = box.row + i / kWarp, column = box.column + i % kWarp;
      char* const to = box.shared + i * map.element;
      if (row < map.rows && column < map.count)
        std::memcpy(to, map.data + row * map.pitch + column * map.element, map.element);
      else
        std::memset(to, 0, map.element);
    }
    ++came;
    ++emulator::block->came;
  }
  emulator::self().waits_for = nullptr;
}

inline void check_box(const BoxMap& map, int row, const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 128) emulator::stop("a box in shared memory is not aligned to 128 bytes");
  if (row < 0 || row + map.box_rows > map.rows) emulator::stop("a box beyond a tensor's rows");
}

inline void box_load(void* shared, const BoxMap& map, int64_t column, int row, int bytes, Arrival* arrival) {
  check_box(map, row, shared);
  if (bytes != map.bytes()) emulator::stop("a box of another size than was said");
  char* const to = static_cast<char*>(shared);
  for (const emulator::Thread& thread : emulator::block->threads)
    for (const emulator::Box& store : thread.stores)
      if (to < store.shared + store.map->bytes() && store.shared < to + bytes)
        emulator::stop("a box is sent for to where a store still reads");
  std::memset(to, 0xff, bytes);
  emulator::block->arrivals.at(arrival).second.push_back({&map, column, row, to});
  ++emulator::block->came;
}

inline void boxes_written() { ++emulator::self().written; }

inline void box_store(const BoxMap& map, int64_t column, int row, const void* shared) {
  check_box(map, row, shared);
  const int warp = emulator::self().number / kWarp;
  for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
    emulator::Thread& thread = emulator::block->threads[i];
    if (thread.written == thread.stored) emulator::stop("a box is stored that a lane may still be writing");
    thread.stored = thread.written;
  }
  emulator::self().stores.push_back({&map, column, row, static_cast<char*>(const_cast<void*>(shared))});
}

inline void box_stores_read() {
  for (const emulator::Box& box : emulator::self().stores)
    for (int i = 0; i < box.map->box_rows * kWarp; ++i) {
      const int64_t column = box.column + i % kWarp, row = box.row + i / kWarp;
      if (column < box.map->count)
        std::memcpy(
            box.map->data + row * box.map->pitch + column * box.map->element, box.shared + i * box.map->element,
            box.map->element);
    }
  emulator::self().stores.clear();
}

inline float fast_exp2(float x) { return emulator::off_by(std::exp2(emulator::flush(x)), 2); }
inline float fast_reciprocal(float x) { return emulator::off_by(1 / emulator::flush(x), 1); }

inline float fast_tanh(float x) {
  const float y = emulator::off_by(std::tanh(x), 0x1p12f);
  return y > 1 ? 1 : y < -1 ? -1 : y;
}

inline uint32_t floats_bfloat16(float low, float high) {
  auto rounded = [](float value) -> uint32_t {
    const uint32_t bits = float_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline uint32_t floats_float16(float low, float high) {
  auto rounded = [](float value) -> uint32_t {
    if (value != value) return 0x7fff;
    const float size = std::min(std::fabs(value), 65504.0f);
    // Its units in the last place, in float16: whole numbers below 2^11 that are exact in float32.
    const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return uint32_t(std::signbit(value)) << 15 | std::min((uint32_t(exponent + 14) << 10) + units, 0x7bffu);
  };
  return rounded(high) << 16 | rounded(low);
}

inline float min_nan(float x, float y) { return x != x || y != y ? NAN : std::fmin(x, y); }

inline unsigned char* shared_memory() { return emulator::block->shared; }

// Few, so that the warps of a persistent grid take many tiles each.
inline int multiprocessors() { return 2; }

// An H100's, or what L2L_EMULATED_SHARED says.
inline int64_t shared_limit() {
  const char* bytes = std::getenv("L2L_EMULATED_SHARED");
  return bytes ? std::atoll(bytes) : 227 * 1024;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
    const Arguments&... arguments) {
  if (shared_bytes > 227 * 1024 || block.x * block.y * block.z > 1024) return cudaErrorInvalidValue;
  emulator::grid_size = grid;
  emulator::block_size = block;
  std::vector<unsigned> order(size_t(grid.x) * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), emulator::random());
  for (unsigned i : order) {
    emulator::block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    emulator::run_block(shared_bytes, [&] { kernel(Parameters(arguments)...); });
  }
  return cudaSuccess;
}

}  // namespace device
}  // namespace l2l

#define threadIdx (::l2l::emulator::self().index)
#define blockIdx (::l2l::emulator::block_index)
#define blockDim (::l2l::emulator::block_size)
#define gridDim (::l2l::emulator::grid_size)

inline void __syncthreads() { l2l::emulator::meet(l2l::emulator::block->barrier, "__syncthreads"); }
inline void __syncwarp() {
  const l2l::emulator::Padded<int> mine{};
  l2l::emulator::exchange(mine, "__syncwarp");
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
