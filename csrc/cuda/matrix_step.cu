// lstm_step_ on the matrix units: the whole network, the update and the state in one pass over memory.
//
// A persistent grid: every block packs the weights of one network into shared memory once, then each of its warps takes
// tiles of 32 coordinates of that network, one after the other, without barriers. State rows come by asynchronous copies into a mailbox of which
// every thread owns its part, some layers ahead: as soon as a lane has read a layer's h (or c) there, it sends for that
// of a later layer or, from the last ones, of the warp's next tile. So a load has the time of several layers to arrive.
#include "matrix_team.cuh"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: three warps for each of its four schedulers with 168 registers a thread, or two with
// 255, which the largest size needs.
L2L_HOST_DEVICE constexpr int threads(int slots) { return slots > 5 ? 256 : 384; }

// Up to so many tiles for each multiprocessor a team of warps takes each, which then is done sooner; from there on the
// other kernel does more in all, as it packs the weights once for many tiles. On an H100 the two cross between 16k and 33k
// coordinates, for both dtypes of the state.
constexpr int64_t kTeamTiles = 5;

// Layers that a warp may send for ahead of the one that it works on, and bytes that a block should have under way:
// latency times bandwidth asks for some 15 KB a multiprocessor, but a wait must also outlast a crowded memory's moods.
constexpr int kMaxDepth = 4;
constexpr int64_t kUnderWay = 96 << 10;

template <class Piece>
L2L_DEVICE void copy(Piece* shared, const void* global, int bytes) {
  if constexpr (sizeof(Piece) == 16)
    device::copy_16(shared, global, bytes);
  else
    device::copy_8(shared, global, bytes);
}

// The state of a warp's tiles, one after the other, as run_layer wants it. New state waits in shared memory, too, and
// goes out when the layer is done. The mailbox is a ring of `depth` layers: h and c are sent for that many layers before
// they are needed, across tiles. parts(): where the next of the warp's tiles is; of no coordinates beyond the last.
template <int kSlots, class T, class Parts>
class Stream {
 public:
  using Piece = PieceOf<T>;
  static constexpr int kHidden = 4 * kSlots, kThreads = threads(kSlots);

  L2L_DEVICE Stream(int layers, int depth, float4* shared, Parts& parts)
      : layers_(layers),
        depth_(depth),
        below_(shared + threadIdx.x),
        ring_(reinterpret_cast<Piece*>(shared + kSlots * kThreads) + threadIdx.x),
        parts_(parts),
        ahead_(parts()) {
#pragma unroll 1
    for (int i = 0; i < depth; ++i) {
      send(0);
      send(kSlots);
      go_on();
    }
  }

  // Goes on to the warp's next tile; only what changes of it is stored.
  L2L_DEVICE void advance(const Part<T>& tile, const Changes& changes) {
    now_ = tile;
    changes_ = changes;
  }

  L2L_DEVICE void begin(int layer) {
    row_ = 2 * kHidden * layer;
    wait();
  }

  L2L_DEVICE Four below(int i) const { return to_four(below_[i * kThreads]); }
  L2L_DEVICE void put_below(int i, const Four& x) const { set(below_[i * kThreads], x); }

  L2L_DEVICE Four h(int j) const { return to_four(mailbox()[j * kThreads]); }

  L2L_DEVICE void h_read() const {
    send(0);
    wait();
  }

  L2L_DEVICE Four c(int j) const { return to_four(mailbox()[(kSlots + j) * kThreads]); }

  L2L_DEVICE void keep(int j, const Four& c, const Four& h) const {
    set(mailbox()[(kSlots + j) * kThreads], c);
    put_below(j, h);
  }

  L2L_DEVICE void end() {
    if (changes_.all) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        set(*reinterpret_cast<Piece*>(now_.row(row_ + 4 * j)), below(j));
        *reinterpret_cast<Piece*>(now_.row(row_ + kHidden + 4 * j)) = mailbox()[(kSlots + j) * kThreads];
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        store_some(now_.row(row_ + 4 * j), below(j), changes_.of_four);
        store_some(now_.row(row_ + kHidden + 4 * j), c(j), changes_.of_four);
      }
    }
    send(kSlots);
    go_on();
  }

 private:
  L2L_DEVICE Piece* mailbox() const { return ring_ + place_ * 2 * kSlots * kThreads; }

  // A group of copies into the current mailbox: of the layer ahead its h (half 0) or c (half kSlots), a piece a slot.
  L2L_DEVICE void send(int half) const {
    const int row = 2 * kHidden * ahead_layer_ + 4 * half;
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      copy(&mailbox()[(half + j) * kThreads], ahead_.row(row + 4 * j), ahead_.count * int(sizeof(T)));
    device::copies_end();
  }

  // The next mailbox, and the next layer to send for.
  L2L_DEVICE void go_on() {
    if (++place_ == depth_) place_ = 0;
    if (++ahead_layer_ < layers_) return;
    ahead_layer_ = 0;
    ahead_ = parts_();
  }

  // For what was sent for longest ago: h before begin, c after h_read, with 2 depth - 1 newer groups either time.
  L2L_DEVICE void wait() const {
    switch (depth_) {
      case 1: return device::copies_landed<1>();
      case 2: return device::copies_landed<3>();
      case 3: return device::copies_landed<5>();
      default: return device::copies_landed<2 * kMaxDepth - 1>();
    }
  }

  const int layers_, depth_;
  float4* const below_;  // this thread's, [slot][thread], like each mailbox
  Piece* const ring_;    // [depth][h, then c][slot][thread]
  Parts& parts_;
  Part<T> now_, ahead_;
  int place_ = 0, ahead_layer_ = 0, row_;
  Changes changes_;
};

template <int kSlots, class T, class Table>
__global__ void __launch_bounds__(threads(kSlots), 1) step(
    const __grid_constant__ Table table, const __grid_constant__ StepCall call, const __grid_constant__ int depth) {
  using A = ArithmeticOf<T>;
  float4* const weights = reinterpret_cast<float4*>(device::shared_memory());
  const int blocks = gridDim.x / table.networks;  // of a network
  const int of_table = blockIdx.x % table.networks;
  Cell<float> cell = call.cell;
  cell.weights += (table.first_network + of_table) * cell.layout().count();
  const Network& net = cell.net;
  // Neighbouring tiles go to different multiprocessors, so that few tiles keep as many as possible at work.
  const int64_t first = of_table * table.tiles_each, end = first + table.tiles_each;
  const int64_t start = first + int64_t(warp()) * blocks + blockIdx.x / table.networks;
  const int64_t stride = int64_t(warps()) * blocks;
  auto find = [&](int64_t index) { return index < end ? find_tile(table, index, kWidth) : Tile{0, 0, 0}; };
  auto part_of = [&](const Tile& tile) { return part<T>(table.entries[tile.entry], tile, net); };

  Tile next = find(start);
  Own next_own = load_own<T>(table.entries[next.entry], next, net);
  float4* const rest = weights + Sizes<A>::all(net);
  Packer<A, kSlots>(net, call.starts, cell.weights, weights, reinterpret_cast<float*>(rest));
  __syncthreads();
  int64_t ahead = start - stride;
  auto parts = [&] { return part_of(find(ahead += stride)); };
  Stream<kSlots, T, decltype(parts)> stream(net.layers, depth, rest, parts);

  const float lr = float(read(call.lr));
  MomentScale<V> scale;
  int scale_entry = -1;  // whose step it is for
  for (int64_t index = start; index < end; index += stride) {
    const Tile tile = next;
    const DenseEntry& entry = table.entries[tile.entry];
    const int64_t at = tile.first + device::lane();
    const bool inside = device::lane() < tile.count;
    const float theta = inside ? load<float>(entry.param, entry.param_dtype, at) : 0;

    const Gradient<float> gradient(net, call.maximize ? -next_own.grad : next_own.grad);
    const bool changes = inside && gradient.live;
    if (net.has_moments() && scale_entry != tile.entry) {
      scale = cell.moments_at(read(entry.step_number()));
      scale_entry = tile.entry;
    }
    Moments<V> moments = next_own.moments;
    float features[4];
    preprocess(cell, scale, V(gradient.value), moments, features);
    if (net.has_moments() && changes) store_moments<T>(entry, at, moments);
    const float linear = linear_path(cell, call.starts, features);

    next = find(index + stride);
    next_own = load_own<T>(table.entries[next.entry], next, net);
    stream.advance(part_of(tile), Changes::of(changes));

    const bool still = unmoved(net, moments);
    float y = run_network<A, kSlots>(net, weights, features, linear, stream);
    if (still) y = 0;
    if (changes) store(entry.param, entry.param_dtype, at, moved(theta, y, lr, call));
  }
  device::copies_landed<0>();  // those of no bytes that were sent for beyond the last tile
}

// ---------------------------------------------------------------- launchers

// Of the mailbox of one layer.
int64_t mailbox_bytes(const Network& net, DType state) {
  const int slots = net.hidden / 4;
  return int64_t(2) * slots * threads(slots) * (state == DType::float32 ? 16 : 8);
}

int64_t shared_bytes(const Network& net, DType state, int depth) {
  const int slots = net.hidden / 4;
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the streams begin
  const int64_t streams = slots * threads(slots) * int64_t(sizeof(float4)) + depth * mailbox_bytes(net, state);
  const int weights = state == DType::float32 ? Sizes<Exact>::all(net) : Sizes<Quick>::all(net);
  return weights * int64_t(sizeof(float4)) + std::max(flat, streams);
}

// As deep as is useful and fits.
int depth_for(const Network& net, DType state) {
  int depth = 1;
  while (depth < kMaxDepth && depth * mailbox_bytes(net, state) < kUnderWay &&
         shared_bytes(net, state, depth + 1) <= device::shared_limit())
    ++depth;
  return depth;
}

template <int kSlots, class T>
void launch(
    const StepCall& call, const std::vector<DenseEntry>& entries, int networks, DType state, cudaStream_t stream) {
  const int depth = depth_for(call.cell.net, state);
  const auto bytes = size_t(shared_bytes(call.cell.net, state, depth));
  for_each_table(entries, networks, kWidth, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const int64_t multiprocessors = device::multiprocessors();
    const int64_t each = std::max<int64_t>(1, multiprocessors / table.networks);
    const auto grid = unsigned(table.networks * std::min(table.tiles_each, each));
    check(
        table.tiles <= kTeamTiles * multiprocessors
            ? device::launch(
                  step_by_teams<kSlots, T, Table>, unsigned(table.tiles), team(kSlots), exchange_bytes(kSlots), stream,
                  table, call)
            : device::launch(step<kSlots, T, Table>, grid, threads(kSlots), bytes, stream, table, call, depth),
        "lstm_step_");
  });
}

template <class T>
void launch(
    const StepCall& call, const std::vector<DenseEntry>& entries, int networks, DType state, cudaStream_t stream) {
  const bool known = with_slots(call.cell.net.hidden, [&](auto slots) {
    launch<decltype(slots)::value, T>(call, entries, networks, state, stream);
  });
  if (!known) throw std::logic_error("matrix_step does not support this hidden size");
}

}  // namespace
}  // namespace matrix

bool matrix_step_supports(const StepArguments& arguments) {
  const bool size = matrix::with_slots(arguments.net.hidden, [](auto) {});
  return size && arguments.weights_dtype == DType::float32 &&
         matrix::shared_bytes(arguments.net, DType::float32, 1) <= device::shared_limit();
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
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == DType::float32)
      matrix::launch<float>(call, of_dtype, arguments.networks, dtype, queue);
    else
      matrix::launch<BFloat16>(call, of_dtype, arguments.networks, dtype, queue);
  }
}

}  // namespace l2l
