// lstm_step_ on the matrix units: the whole network, the update and the state in one pass over memory.
//
// A persistent grid: every block packs the weights into shared memory once, then each of its warps takes tiles of 32
// coordinates, one after the other, without barriers. State rows come by asynchronous copies into a mailbox of which
// every thread owns its part, one layer ahead: as soon as a lane has read a layer's h (or c) there, it sends for the next
// layer's or, from the last layer, for that of the warp's next tile. So a load has the time of a whole layer to arrive.
#include <cmath>
#include <stdexcept>
#include <string>

#include "matrix_cell.cuh"
#include "matrix_step.h"
#include "memory.cuh"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: three warps for each of its four schedulers with 168 registers a thread, or two with
// 255, which the largest size needs.
L2L_HOST_DEVICE constexpr int threads(int slots) { return slots > 5 ? 256 : 384; }

// Four state elements.
template <class T>
struct PieceType {
  using Type = float4;
};
template <>
struct PieceType<Bfloat16> {
  using Type = uint2;
};
template <class T>
using PieceOf = typename PieceType<T>::Type;

L2L_DEVICE Four to_four(const float4& piece) { return {{piece.x, piece.y, piece.z, piece.w}}; }
L2L_DEVICE Four to_four(const uint2& piece) {
  using device::bits_float;
  return {{bits_float(piece.x << 16), bits_float(piece.x & 0xffff0000u), bits_float(piece.y << 16),
           bits_float(piece.y & 0xffff0000u)}};
}
L2L_DEVICE void set(float4& piece, const Four& x) { piece = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]); }
L2L_DEVICE void set(uint2& piece, const Four& x) {
  piece = make_uint2(device::floats_bfloat16(x.at[0], x.at[1]), device::floats_bfloat16(x.at[2], x.at[3]));
}

template <class Piece>
L2L_DEVICE void copy(Piece* shared, const void* global, int bytes) {
  if constexpr (sizeof(Piece) == 16)
    device::copy_16(shared, global, bytes);
  else
    device::copy_8(shared, global, bytes);
}

// What is the same for all tiles.
struct Call {
  Network net;
  const float* weights;
  Scalar lr;
  float weight_decay, output_scale;
  bool maximize;
  Preprocessing preprocessing;
};

// The part of a tile's state that a lane holds: coordinates 4 r .. 4 r + 3 of unit q of every slot.
template <class T>
struct Part {
  T* first;       // of the first slot
  int64_t pitch;  // elements from one row to the next
  int count;      // how many of the four coordinates there are

  L2L_DEVICE T* row(int row) const { return first + row * pitch; }
};

template <class T>
L2L_DEVICE Part<T> part(const DenseEntry& entry, const Tile& tile, const Network& net) {
  const Place place;
  const int left = tile.count - kOwn * place.r, count = left < 0 ? 0 : left < kOwn ? left : kOwn;
  T* const row = static_cast<T*>(entry.state) + (net.moment_rows() + place.q) * entry.state_row;
  return {row + (count ? tile.first + kOwn * place.r : 0), entry.state_row, count};
}

// The state of a warp's tiles, one after the other, as run_layer wants it. New state waits in shared memory, too, and
// goes out when the layer is done.
template <int kSlots, class T>
class Stream {
 public:
  using Piece = PieceOf<T>;
  static constexpr int kHidden = 4 * kSlots, kThreads = threads(kSlots);

  L2L_DEVICE Stream(int layers, float4* shared, const Part<T>& first)
      : layers_(layers),
        below_(shared + threadIdx.x),
        mailbox_(reinterpret_cast<Piece*>(shared + kSlots * kThreads) + threadIdx.x),
        next_(first),
        ahead_(first) {
    send(0, 0);
    send(kHidden, kSlots);
  }

  // Goes on to the tile that was next. whole: all 32 coordinates are stored; otherwise, of the lane's four, those that
  // `keep` has a bit for.
  L2L_DEVICE void advance(const Part<T>& next, bool whole, uint32_t keep) {
    now_ = next_;
    next_ = next;
    whole_ = whole;
    keep_ = keep;
  }

  L2L_DEVICE void begin(int layer) {
    const bool last = layer + 1 == layers_;
    row_ = 2 * kHidden * layer;
    ahead_row_ = last ? 0 : row_ + 2 * kHidden;
    ahead_ = last ? next_ : now_;
    device::copies_landed<1>();  // h, not yet c
  }

  L2L_DEVICE Four below(int i) const { return to_four(below_[i * kThreads]); }
  L2L_DEVICE void put_below(int i, const Four& x) const { set(below_[i * kThreads], x); }

  L2L_DEVICE Four h(int j) const { return to_four(mailbox_[j * kThreads]); }

  L2L_DEVICE void h_read() const {
    send(ahead_row_, 0);
    device::copies_landed<1>();  // c, not yet the h just sent for
  }

  L2L_DEVICE Four c(int j) const { return to_four(mailbox_[(kSlots + j) * kThreads]); }

  L2L_DEVICE void keep(int j, const Four& c, const Four& h) const {
    set(mailbox_[(kSlots + j) * kThreads], c);
    put_below(j, h);
  }

  L2L_DEVICE void end() const {
    if (whole_) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        set(*reinterpret_cast<Piece*>(now_.row(row_ + 4 * j)), below(j));
        *reinterpret_cast<Piece*>(now_.row(row_ + kHidden + 4 * j)) = mailbox_[(kSlots + j) * kThreads];
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        store_some(now_.row(row_ + 4 * j), below(j));
        store_some(now_.row(row_ + kHidden + 4 * j), c(j));
      }
    }
    send(ahead_row_ + kHidden, kSlots);
  }

 private:
  // A group of copies: a piece for every slot from the row on, to the mailbox's pieces from `at` on.
  L2L_DEVICE void send(int row, int at) const {
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      copy(&mailbox_[(at + j) * kThreads], ahead_.row(row + 4 * j), ahead_.count * int(sizeof(T)));
    device::copies_end();
  }

  L2L_DEVICE void store_some(T* to, const Four& values) const {
#pragma unroll
    for (int n = 0; n < kOwn; ++n)
      if (keep_ >> n & 1) to[n] = from_float<T>(values.at[n]);
  }

  const int layers_;
  float4* const below_;   // this thread's, [slot][thread], like the mailbox
  Piece* const mailbox_;  // [h, then c][slot][thread]
  Part<T> now_, next_, ahead_;
  int row_, ahead_row_;
  bool whole_;
  uint32_t keep_;
};

// What the owner of one coordinate needs first, as it comes from memory.
struct Own {
  uint32_t grad;
  Moments<float> moments;
};

template <class T>
L2L_DEVICE Own load_own(const DenseEntry& entry, const Tile& tile, const Network& net) {
  Own own = {};
  const int64_t at = tile.first + device::lane();
  if (device::lane() >= tile.count) return own;
  own.grad = load_bits(entry.grad, entry.grad_dtype, at);
  if (net.has_moments()) {
    const T* const state = static_cast<const T*>(entry.state) + at;
    own.moments = {to_float(state[0]), to_float(state[entry.state_row])};
  }
  return own;
}

template <int kSlots, class T, class Table>
__global__ void __launch_bounds__(threads(kSlots), 1)
    step(const __grid_constant__ Table table, const __grid_constant__ Call call) {
  constexpr int kThreads = threads(kSlots);
  float4* const weights = reinterpret_cast<float4*>(device::shared_memory());
  const Network& net = call.net;
  // Neighbouring tiles go to different multiprocessors, so that few tiles use as many as there are.
  const int64_t stride = int64_t((kThreads / device::kWarp)) * gridDim.x;
  int64_t index = int64_t(threadIdx.x / device::kWarp) * gridDim.x + blockIdx.x;
  auto find = [&](int64_t index) {
    return index < table.tiles ? find_tile(table, index, kTile) : Tile{0, 0, 0};
  };

  Tile next = find(index);
  Own next_own = load_own<T>(table.entries[next.entry], next, net);
  float4* const rest = weights + weights_size(net);
  Packer<kSlots>(net, call.weights, weights, reinterpret_cast<float*>(rest));
  __syncthreads();
  Stream<kSlots, T> stream(net.layers, rest, part<T>(table.entries[next.entry], next, net));

  const float lr = float(read(call.lr));
  Preprocessing preprocessing = call.preprocessing;
  int corrected = -1;  // the entry whose step the corrections in it are for
  for (; index < table.tiles; index += stride) {
    const Tile tile = next;
    const DenseEntry& entry = table.entries[tile.entry];
    const int64_t own_at = tile.first + device::lane();
    const bool mine = device::lane() < tile.count;
    const uint32_t param = mine ? load_bits(entry.param, entry.param_dtype, own_at) : 0;

    float grad = from_bits(next_own.grad, entry.grad_dtype);
    if (call.maximize) grad = -grad;
    const bool keep = mine && fabsf(grad) < INFINITY;
    const uint32_t kept = device::ballot(keep);
    if (net.has_moments() && corrected != tile.entry) {
      preprocessing.correct(read(entry.step_number()));
      corrected = tile.entry;
    }
    Moments<Real> moments = {Real(next_own.moments.m), Real(next_own.moments.v)};
    float features[4];
    preprocess(net, preprocessing, Real(keep ? grad : 0.0f), moments, features);
    if (net.has_moments() && keep) {
      T* const state = static_cast<T*>(entry.state) + own_at;
      state[0] = from_float<T>(moments.m.value);
      state[entry.state_row] = from_float<T>(moments.v.value);
    }

    next = find(index + stride);
    const DenseEntry& next_entry = table.entries[next.entry];
    next_own = load_own<T>(next_entry, next, net);
    stream.advance(part<T>(next_entry, next, net), kept == ~0u, kept >> kOwn * Place().r & 15);

    const float y = run_network<kSlots>(net, weights, features, stream);
    if (keep) {
      const float theta = from_bits(param, entry.param_dtype);
      const float change = lr * (call.output_scale * y - call.weight_decay * theta);
      store_float(entry.param, entry.param_dtype, own_at, theta + change);
    }
  }
}

// ---------------------------------------------------------------- launchers

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("lstm_step_: ") + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which) {
  int device, value;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

size_t shared_bytes(const Network& net, DType state) {
  const int slots = net.hidden / 4, pieces = 2 * (state == DType::float32 ? 16 : 8) + int(sizeof(float4));
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the streams begin
  return weights_size(net) * sizeof(float4) + std::max<int64_t>(flat, slots * pieces * threads(slots));
}

template <int kSlots, class T>
void launch(const Call& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  for_each_table(entries, kTile, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const int grid = int(std::min<int64_t>(table.tiles, multiprocessors));
    check(device::launch(step<kSlots, T, Table>, grid, threads(kSlots), bytes, stream, table, call));
  });
}

template <class T>
void launch(const Call& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
  switch (call.net.hidden) {
    case 4: return launch<1, T>(call, entries, bytes, stream);
    case 8: return launch<2, T>(call, entries, bytes, stream);
    case 12: return launch<3, T>(call, entries, bytes, stream);
    case 16: return launch<4, T>(call, entries, bytes, stream);
    case 20: return launch<5, T>(call, entries, bytes, stream);
    case 32: return launch<8, T>(call, entries, bytes, stream);
    default: throw std::logic_error("matrix_step does not support this hidden size");
  }
}

}  // namespace
}  // namespace matrix

bool matrix_step_supports(const StepArguments& arguments) {
  const int hidden = arguments.net.hidden;
  const bool size = hidden == 32 || (hidden % 4 == 0 && hidden <= 20);
  return size && arguments.weights_dtype == DType::float32 &&
         matrix::shared_bytes(arguments.net, DType::float32) <=
             size_t(matrix::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

bool matrix_step_supports(const DenseEntry& entry) {
  auto small = [](DType dtype) { return dtype != DType::float64; };
  const int64_t piece = entry.state_dtype == DType::float32 ? 16 : 8;
  return small(entry.param_dtype) && small(entry.grad_dtype) && small(entry.state_dtype) &&
         reinterpret_cast<uintptr_t>(entry.state) % piece == 0 && entry.state_row % matrix::kOwn == 0;
}

void matrix_step(const StepArguments& arguments, const std::vector<DenseEntry>& entries, void* stream) {
  const Network& net = arguments.net;
  const matrix::Call call = {
      net,
      static_cast<const float*>(arguments.weights),
      arguments.lr,
      float(arguments.weight_decay),
      float(net.output_scale),
      arguments.maximize,
      matrix::Preprocessing(net),
  };
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    std::vector<DenseEntry> of_dtype;
    std::copy_if(entries.begin(), entries.end(), std::back_inserter(of_dtype), [&](const DenseEntry& entry) {
      return entry.state_dtype == dtype;
    });
    if (of_dtype.empty()) continue;
    const size_t bytes = matrix::shared_bytes(net, dtype);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == DType::float32)
      matrix::launch<float>(call, of_dtype, bytes, queue);
    else
      matrix::launch<Bfloat16>(call, of_dtype, bytes, queue);
  }
}

}  // namespace l2l
