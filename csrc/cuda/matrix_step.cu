// lstm_step_ on the matrix units: the whole network, the update and the state in one pass over memory.
//
// A persistent grid: every block packs the weights of one network into shared memory once, then each of its warps takes
// tiles of 32 coordinates of that network, one after the other, without barriers. State comes some layers ahead, by Hopper's
// copy engine (matrix_boxes.cuh) or by asynchronous copies of 16 bytes (matrix_stream.cuh): as soon as a layer has been
// read, its place is sent for that of a later one or, from the last ones, of the warp's next tile.
#include "matrix_boxes.cuh"
#include "matrix_stream.cuh"
#include "matrix_team.cuh"

namespace l2l {
namespace matrix {
namespace {

// Up to so many tiles for each multiprocessor a team of warps takes each, which then is done sooner; from there on the
// other kernel does more in all, as it packs the weights once for many tiles. On an H100 the two cross between 16k and 33k
// coordinates, for both dtypes of the state.
constexpr int64_t kTeamTiles = 5;

// float4s of the packed weights, up to a line of 128 bytes: boxes begin there.
L2L_HOST_DEVICE constexpr int packed_size(int float4s) { return (float4s + 7) / 8 * 8; }

template <class Way, int kSlots, class T, class Table>
__global__ void __launch_bounds__(Way::threads(kSlots, sizeof(T) == 4), 1) step(
    const __grid_constant__ Table table, const __grid_constant__ StepCall call, const __grid_constant__ int depth) {
  if constexpr (!Way::kThere) return;  // is never launched
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

  Tile next = find(start);
  Own next_own = load_own<T>(table.entries[next.entry], next, net);
  float4* const rest = weights + packed_size(Sizes<A>::all(net));
  Packer<A, kSlots>(net, call.starts, cell.weights, weights, reinterpret_cast<float*>(rest));
  Way::packed();
  __syncthreads();
  int64_t ahead = start - stride;
  auto tiles = [&] { return find(ahead += stride); };
  typename Way::template Of<kSlots, T, Table, decltype(tiles)> stream(table, net, depth, rest, tiles);

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
    stream.advance(tile, Changes::of(changes));

    const bool still = unmoved(net, moments);
    float y = run_network<A, kSlots>(net, weights, features, linear, stream);
    if (still) y = 0;
    if (changes) store(entry.param, entry.param_dtype, at, moved(theta, y, lr, call));
  }
  stream.finish();
}

// ---------------------------------------------------------------- launchers

template <class Way>
int64_t shared_bytes(const Network& net, DType state, int depth) {
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the streams begin
  const int weights = state == DType::float32 ? Sizes<Exact>::all(net) : Sizes<Quick>::all(net);
  return packed_size(weights) * int64_t(sizeof(float4)) + std::max(flat, Way::shared_bytes(net, state, depth));
}

// As deep as is useful and fits.
template <class Way>
int depth_for(const Network& net, DType state) {
  int depth = 1;
  while (!Way::deep_enough(net, state, depth) && shared_bytes<Way>(net, state, depth + 1) <= device::shared_limit())
    ++depth;
  return depth;
}

// By a team for each tile, if there are few; else by warps that take many.
template <class Way, int kSlots, class T>
void launch(
    const StepCall& call, const std::vector<typename Way::Entry>& entries, int networks, DType state,
    cudaStream_t stream) {
  const int depth = depth_for<Way>(call.cell.net, state);
  const auto bytes = size_t(shared_bytes<Way>(call.cell.net, state, depth));
  for_each_table(entries, networks, kWidth, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const int64_t multiprocessors = device::multiprocessors();
    const int64_t each = std::max<int64_t>(1, multiprocessors / table.networks);
    const auto grid = unsigned(table.networks * std::min(table.tiles_each, each));
    if constexpr (std::is_same<Way, Copies>::value)
      if (table.tiles <= kTeamTiles * multiprocessors)
        return check(
            device::launch(
                step_by_teams<kSlots, T, Table>, unsigned(table.tiles), team(kSlots), exchange_bytes(kSlots), stream,
                table, call),
            "lstm_step_");
    check(
        device::launch(
            step<Way, kSlots, T, Table>, grid, Way::threads(kSlots, sizeof(T) == 4), bytes, stream, table, call, depth),
        "lstm_step_");
  });
}

// The entries with maps of their boxes; none where not all can have one, or where they are not worth it.
template <int kSlots, class T>
std::vector<BoxEntry> with_boxes(const Network& net, const std::vector<DenseEntry>& entries, DType state) {
  int64_t coordinates = 0;
  for (const DenseEntry& entry : entries) coordinates += entry.count;
  if (coordinates <= kTeamTiles * device::multiprocessors() * kWidth ||
      !device::has_boxes(step<Boxes, kSlots, T, Table<BoxEntry, kSmallTable>>) ||
      shared_bytes<Boxes>(net, state, 2) > device::shared_limit())
    return {};
  std::vector<BoxEntry> found(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    static_cast<DenseEntry&>(found[i]) = entries[i];
    const int64_t pitch = entries[i].state_row * int64_t(sizeof(T));
    if (pitch % 16 || reinterpret_cast<uintptr_t>(entries[i].state) % 16 || entries[i].count > INT32_MAX ||
        !device::map_boxes(
            found[i].boxes, entries[i].state, sizeof(T), entries[i].count, net.state_rows(), pitch, 2 * net.hidden))
      return {};
  }
  return found;
}

template <int kSlots, class T>
void launch(
    const StepCall& call, const std::vector<DenseEntry>& entries, int networks, DType state, cudaStream_t stream) {
  const std::vector<BoxEntry> boxes = with_boxes<kSlots, T>(call.cell.net, entries, state);
  if (boxes.empty()) return launch<Copies, kSlots, T>(call, entries, networks, state, stream);
  launch<Boxes, kSlots, T>(call, boxes, networks, state, stream);
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
         matrix::shared_bytes<matrix::Copies>(arguments.net, DType::float32, 1) <= device::shared_limit();
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
