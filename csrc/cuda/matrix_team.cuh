// The step of few coordinates: a tile by a team of warps, one for each slot of units.
//
// The weights of its own slot's gates, which each warp needs once, come straight from the flat vector through the
// cache, with the state of the first two layers at the same time, so that there is one wait for memory. The warps of a
// team exchange their new h through shared memory, one barrier a layer.
#pragma once

#include "matrix_slots.cuh"
#include "matrix_state.cuh"

namespace l2l {
namespace matrix {
namespace {

// Two rounds of what the warps exchange, [slot][lane].
L2L_HOST_DEVICE constexpr int exchange_bytes(int slots) { return 2 * team(slots) * int(sizeof(float4)); }

// What a warp needs of one layer, but for its c, of which the products need not wait.
template <class T, int kSlots, int kInputs>
struct Needed {
  using A = ArithmeticOf<T>;
  static constexpr int kChunks = chunks<A>(kInputs, kSlots);

  Four h[kSlots];
  float4 bias;
  float weights[2][kChunks][A::kGroup];  // [half][chunk]

  // whole: the tile has all its coordinates.
  L2L_DEVICE Needed(const Cell<float>& cell, const Starts& starts, int layer, const Part<T>& state, bool whole) {
    const int row = 8 * kSlots * layer, j = warp();
    const Place place;
    if (whole) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) h[i] = load_all(state.row(row + 4 * i));
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) h[i] = load_some(state.row(row + 4 * i), state.count);
    }
    const LayerWeights<A, kSlots, kInputs> from(cell.weights + starts.layer(layer), cell.net.layer_inputs(layer));
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int s = 0; s < kChunks * A::kGroup; ++s)
        weights[half][s / A::kGroup][s % A::kGroup] = from.weight(j, half, place.r, s, place.q);
    const int unit = 4 * j + place.q;
    bias = make_float4(
        from.bias(unit, kInput), from.bias(unit, kForget), from.bias(unit, kCell), from.bias(unit, kOutput));
  }
};

// What the team exchanges: every round, all put slots below, then meet, then read them.
template <int kSlots>
class Exchange {
 public:
  L2L_DEVICE explicit Exchange(float4* shared) : put_(shared), get_(shared + team(kSlots)) {}

  L2L_DEVICE void put_below(int slot, const Four& x) const { set(put_[slot * device::kWarp + device::lane()], x); }
  L2L_DEVICE Four below(int slot) const { return to_four(get_[slot * device::kWarp + device::lane()]); }
  L2L_DEVICE void meet() {
    __syncthreads();
    float4* const got = get_;
    get_ = put_;
    put_ = got;
  }

 private:
  float4 *put_, *get_;
};

// This warp's part of a layer; below(i): slot i from below.
template <int kSlots, int kInputs, class T, class Below>
L2L_DEVICE void run_part(
    const Needed<T, kSlots, kInputs>& needed, const Below& below, int layer, const Part<T>& state, const Changes& changes,
    Exchange<kSlots>& exchange) {
  using A = ArithmeticOf<T>;
  constexpr int kHidden = 4 * kSlots;
  const int row = 2 * kHidden * layer + 4 * warp();
  const Four c_old = load_some(state.row(row + kHidden), state.count);
  const Operand<A, kInputs, kSlots> operand(below, [&](int j) { return needed.h[j]; });
  Four c, h;
  run_slot<A>(
      operand.parts, needed.bias,
      [&](int m, int half) { return A::fragment(needed.weights[half][m], kInputs - A::kGroup * m); }, c_old, c, h);
  exchange.put_below(warp(), h);
  exchange.meet();  // every warp has read the old state, too
  if (changes.all) {
    set(*reinterpret_cast<PieceOf<T>*>(state.row(row)), h);
    set(*reinterpret_cast<PieceOf<T>*>(state.row(row + kHidden)), c);
  } else {
    store_some(state.row(row), h, changes.of_four);
    store_some(state.row(row + kHidden), c, changes.of_four);
  }
}

template <int kSlots, class T, class Table>
__global__ void __launch_bounds__(team(kSlots), kSlots <= 5 ? 2 : 1)  // teams on a multiprocessor
    step_by_teams(const __grid_constant__ Table table, const __grid_constant__ StepCall call) {
  Cell<float> cell = call.cell;
  cell.weights += table.network(blockIdx.x) * cell.layout().count();
  const Network& net = cell.net;
  const Tile tile = find_tile(table, blockIdx.x, kWidth);
  const DenseEntry& entry = table.entries[tile.entry];
  const int64_t own_at = tile.first + device::lane();
  const bool inside = device::lane() < tile.count, whole = tile.count == kWidth, first = warp() == 0;

  // All that comes from memory is sent for before the first of it is used.
  const Own own = load_own<T>(entry, tile, net);
  const Part<T> state = part<T>(entry, tile, net);
  const Needed<T, kSlots, 1> lowest(cell, call.starts, 0, state, whole);
  int layer = net.projection ? 0 : 1;
  Needed<T, kSlots, kSlots> needed(cell, call.starts, std::min(layer, net.layers - 1), state, whole);

  const Gradient<float> gradient(net, call.maximize ? -own.grad : own.grad);
  const bool changed = inside && gradient.live;
  const Changes changes = Changes::of(changed);
  MomentScale<V> scale = cell.moments;
  if (net.has_moments()) scale = cell.moments_at(read(entry.step_number()));
  Moments<V> moments = own.moments;
  float features[4];
  preprocess(cell, scale, V(gradient.value), moments, features);
  const Four input = feature_slot(features, net.inputs());
  const float linear = first ? linear_path(cell, call.starts, features) : 0;

  Exchange<kSlots> exchange(reinterpret_cast<float4*>(device::shared_memory()));
  if (net.projection) {
    using A = ArithmeticOf<T>;
    const ProjectionWeights<A, kSlots> projection(net, cell.weights);
    if (warp() % 2 == 0) project_two<A, kSlots>(warp(), features_chunk<A>(input), projection, exchange);
    exchange.meet();
  } else {
    run_part(lowest, [&](int) { return input; }, 0, state, changes, exchange);
  }
  const float theta = inside && first ? load<float>(entry.param, entry.param_dtype, own_at) : 0;
  while (layer < net.layers) {
    run_part(needed, [&](int i) { return exchange.below(i); }, layer, state, changes, exchange);
    if (++layer < net.layers) needed = Needed<T, kSlots, kSlots>(cell, call.starts, layer, state, whole);
  }

  if (!first) return;
  const float lr = float(read(call.lr));
  float y = head<kSlots>(net, cell.weights + call.starts.head, exchange, linear);
  if (!changed) return;
  if (unmoved(net, moments)) y = 0;
  store(entry.param, entry.param_dtype, own_at, moved(theta, y, lr, call));
  if (net.has_moments()) store_moments<T>(entry, own_at, moments);
}

}  // namespace
}  // namespace matrix
}  // namespace l2l
