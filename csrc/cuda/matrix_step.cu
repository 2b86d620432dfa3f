// lstm_step_ on the matrix units: the whole network, the update and the state in one pass over memory.
//
// A persistent grid: every block packs the weights into shared memory once, then each of its warps takes tiles of 32
// coordinates, one after the other, without barriers. State rows come by asynchronous copies into a mailbox of which
// every thread owns its part, one layer ahead: as soon as a lane has read a layer's h (or c) there, it sends for the
// next layer's or, from the last layer, for that of the warp's next tile. So a load has a whole layer's time to arrive.
#include "matrix_team.cuh"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: three warps for each of its four schedulers with 168 registers a thread, or two with
// 255, which the largest size needs.
L2L_HOST_DEVICE constexpr int threads(int slots) { return slots > 5 ? 256 : 384; }

// Up to so many tiles for each multiprocessor a team of warps takes each, which then is done sooner; from there on the
// other kernel does more in all, as it packs the weights once for many tiles.
constexpr int64_t kTeamTiles = 8;

template <class Piece>
L2L_DEVICE void copy(Piece* shared, const void* global, int bytes) {
  if constexpr (sizeof(Piece) == 16)
    device::copy_16(shared, global, bytes);
  else
    device::copy_8(shared, global, bytes);
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

  // Goes on to the tile that was next; only what changes of it is stored.
  L2L_DEVICE void advance(const Part<T>& next, const Changes& changes) {
    now_ = next_;
    next_ = next;
    changes_ = changes;
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
    if (changes_.all) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        set(*reinterpret_cast<Piece*>(now_.row(row_ + 4 * j)), below(j));
        *reinterpret_cast<Piece*>(now_.row(row_ + kHidden + 4 * j)) = mailbox_[(kSlots + j) * kThreads];
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        store_some(now_.row(row_ + 4 * j), below(j), changes_.of_four);
        store_some(now_.row(row_ + kHidden + 4 * j), c(j), changes_.of_four);
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

  const int layers_;
  float4* const below_;   // this thread's, [slot][thread], like the mailbox
  Piece* const mailbox_;  // [h, then c][slot][thread]
  Part<T> now_, next_, ahead_;
  int row_, ahead_row_;
  Changes changes_;
};

template <int kSlots, class T, class Table>
__global__ void __launch_bounds__(threads(kSlots), 1)
    step(const __grid_constant__ Table table, const __grid_constant__ StepCall call) {
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
  Packer<kSlots>(net, call.starts, cell.weights, weights, reinterpret_cast<float*>(rest));
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
    const bool changes = inside && gradient.live;
    if (net.has_moments() && scale_entry != tile.entry) {
      scale = cell.moments_at(read(entry.step_number()));
      scale_entry = tile.entry;
    }
    Moments<V> moments = next_own.moments;
    float features[4];
    preprocess(cell, scale, V(gradient.value), moments, features);
    if (net.has_moments() && changes) store_moments<T>(entry, at, moments);

    next = find(index + stride);
    const DenseEntry& next_entry = table.entries[next.entry];
    next_own = load_own<T>(next_entry, next, net);
    stream.advance(part<T>(next_entry, next, net), Changes::of(changes));

    const bool still = unmoved(net, moments);
    float y = run_network<kSlots>(net, weights, features, stream);
    if (still) y = 0;
    if (changes) store(entry.param, entry.param_dtype, at, moved(theta, y, lr, call));
  }
  device::copies_landed<0>();  // those of no bytes that were sent for beyond the last tile
}

// ---------------------------------------------------------------- launchers

size_t shared_bytes(const Network& net, DType state) {
  const int slots = net.hidden / 4, pieces = 2 * (state == DType::float32 ? 16 : 8) + int(sizeof(float4));
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the streams begin
  return weights_size(net) * sizeof(float4) + std::max<int64_t>(flat, slots * pieces * threads(slots));
}

template <int kSlots, class T>
void launch(const StepCall& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
  for_each_table(entries, kWidth, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const int64_t multiprocessors = device::multiprocessors();
    const auto grid = unsigned(std::min(table.tiles, multiprocessors));
    check(
        table.tiles <= kTeamTiles * multiprocessors
            ? device::launch(
                  step_by_teams<kSlots, T, Table>, unsigned(table.tiles), team(kSlots), exchange_bytes(kSlots), stream,
                  table, call)
            : device::launch(step<kSlots, T, Table>, grid, threads(kSlots), bytes, stream, table, call),
        "lstm_step_");
  });
}

template <class T>
void launch(const StepCall& call, const std::vector<DenseEntry>& entries, size_t bytes, cudaStream_t stream) {
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
  const matrix::StepCall call = {
      Cell<float>::of(net, arguments.weights), matrix::Starts::of(net), arguments.lr, float(arguments.weight_decay),
      arguments.maximize};
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
