// lstm_step_ on the matrix units: the whole network, the update and the state in one pass over memory.
//
// A persistent grid: every block packs the weights into shared memory once, then each of its warps takes tiles of 32
// coordinates, one after the other, without barriers. State rows come by asynchronous copies into a mailbox of which
// every thread owns its part, one layer ahead: as soon as a lane has read a layer's h (or c) there, it sends for the next
// layer's or, from the last layer, for that of the warp's next tile. So a load has the time of a whole layer to arrive.
#include "matrix_cell.cuh"
#include "matrix_step.h"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: three warps for each of its four schedulers with 168 registers a thread, or two with
// 255, which the largest size needs.
L2L_HOST_DEVICE constexpr int threads(int slots) { return slots > 5 ? 256 : 384; }

// Four state elements.
template <class T>
using PieceOf = std::conditional_t<sizeof(T) == 4, float4, uint2>;

L2L_DEVICE Four to_four(const float4& piece) { return {{piece.x, piece.y, piece.z, piece.w}}; }
L2L_DEVICE Four to_four(const uint2& piece) {
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

struct Call {
  Cell<float> cell;
  Scalar lr;
  float weight_decay;
  bool maximize;
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
      if (keep_ >> n & 1) narrow(values.at[n], to[n]);
  }

  const int layers_;
  float4* const below_;   // this thread's, [slot][thread], like the mailbox
  Piece* const mailbox_;  // [h, then c][slot][thread]
  Part<T> now_, next_, ahead_;
  int row_, ahead_row_;
  bool whole_;
  uint32_t keep_;
};

// What the owner of a coordinate needs of it first.
struct Own {
  float grad;
  Moments<V> moments;
};

template <class T>
L2L_DEVICE Own load_own(const DenseEntry& entry, const Tile& tile, const Network& net) {
  Own own = {0, {V(0), V(0)}};
  if (device::lane() >= tile.count) return own;
  const int64_t at = tile.first + device::lane();
  own.grad = load<float>(entry.grad, entry.grad_dtype, at);
  if (net.has_moments()) {
    const T* const state = static_cast<const T*>(entry.state) + at;
    own.moments = {V(widen(state[0])), V(widen(state[entry.state_row]))};
  }
  return own;
}

template <int kSlots, class T, class Table>
__global__ void __launch_bounds__(threads(kSlots), 1)
    step(const __grid_constant__ Table table, const __grid_constant__ Call call) {
  float4* const weights = reinterpret_cast<float4*>(device::shared_memory());
  const Cell<float>& cell = call.cell;
  const Network& net = cell.net;
  // Neighbouring tiles go to different multiprocessors, so that few tiles keep as many as possible at work.
  int64_t index = int64_t(warp()) * gridDim.x + blockIdx.x;
  const int64_t stride = int64_t(warps()) * gridDim.x;
  auto find = [&](int64_t index) { return index < table.tiles ? find_tile(table, index, kWidth) : Tile{0, 0, 0}; };

  Tile next = find(index);
  Own next_own = load_own<T>(table.entries[next.entry], next, net);
  float4* const rest = weights + weights_size(net);
  Packer<kSlots>(net, cell.weights, weights, reinterpret_cast<float*>(rest));
  __syncthreads();
  Stream<kSlots, T> stream(net.layers, rest, part<T>(table.entries[next.entry], next, net));

  const float lr = float(read(call.lr));
  MomentScale<V> scale;
  int scale_entry = -1;  // whose step it is for
  for (; index < table.tiles; index += stride) {
    const Tile tile = next;
    const DenseEntry& entry = table.entries[tile.entry];
    const int64_t at = tile.first + device::lane();
    const bool inside = device::lane() < tile.count;
    const float theta = inside ? load<float>(entry.param, entry.param_dtype, at) : 0;

    const Gradient<float> gradient(call.maximize ? -next_own.grad : next_own.grad);
    const bool keep = inside && gradient.live;
    if (net.has_moments() && scale_entry != tile.entry) {
      scale = cell.moments_at(read(entry.step_number()));
      scale_entry = tile.entry;
    }
    Moments<V> moments = next_own.moments;
    float features[4];
    preprocess(cell, scale, V(gradient.value), moments, features);
    if (net.has_moments() && keep) {
      T* const state = static_cast<T*>(entry.state) + at;
      narrow(moments.m.v, state[0]);
      narrow(moments.v.v, state[entry.state_row]);
    }

    next = find(index + stride);
    const DenseEntry& next_entry = table.entries[next.entry];
    next_own = load_own<T>(next_entry, next, net);
    const uint32_t kept = device::ballot(keep);
    stream.advance(part<T>(next_entry, next, net), kept == ~0u, kept >> kOwn * Place().r & 15);

    const float y = run_network<kSlots>(net, weights, features, stream);
    if (keep)
      store(entry.param, entry.param_dtype, at, theta + lr * (cell.output_scale * y - call.weight_decay * theta));
  }
}

// ---------------------------------------------------------------- launchers

size_t shared_bytes(const Network& net, DType state) {
  const int slots = net.hidden / 4, pieces = 2 * (state == DType::float32 ? 16 : 8) + int(sizeof(float4));
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the streams begin
  return weights_size(net) * sizeof(float4) + std::max<int64_t>(flat, slots * pieces * threads(slots));
}

template <int kSlots, class T>
void launch(const Call& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
  for_each_table(entries, kWidth, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const auto grid = unsigned(std::min<int64_t>(table.tiles, device::multiprocessors()));
    check(device::launch(step<kSlots, T, Table>, grid, threads(kSlots), bytes, stream, table, call), "lstm_step_");
  });
}

template <class T>
void launch(const Call& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
  switch (call.cell.net.hidden) {
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
             size_t(device::shared_limit());
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
      Cell<float>::of(net, arguments.weights), arguments.lr, float(arguments.weight_decay), arguments.maximize};
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
      matrix::launch<BFloat16>(call, of_dtype, bytes, queue);
  }
}

}  // namespace l2l
