// T steps of N coordinates, forward, on the matrix units: a team of warps, one for each slot of units, takes a tile of
// 32 coordinates through all its steps, its state and the packed weights in shared memory.
//
// h is kept twice, old and new in turn, so that one barrier a layer is enough. The first warp prepares the features of
// the next step meanwhile, the last one sends out the update of the step before.
#include "matrix_unroll.h"

#include "matrix_cell.cuh"
#include "matrix_slots.cuh"

namespace l2l {
namespace matrix {
namespace {

struct UnrollCall {
  Cell<float> cell;
  Starts starts;
  UnrollArguments arguments;
  Matrix updates, last;
};

// What the team shares, in float4s: [slot][lane] each.
template <int kSlots>
struct Shared {
  float4* h;         // [2][layers], of even and odd steps
  float4* c;         // [layers]
  float4* inputs;    // [2]: the features' slot, or those of the projected features
  uint32_t* finite;  // [2]: bit l: lane l's gradient is finite
  uint32_t* moves;   // [2]: the same, and its u is not 0 for want of any
  float* linear;     // [2][lane]: what the linear path adds to y (with one)
  int layers;

  static constexpr int kTeam = team(kSlots);
  static int size(const Network& net) {
    const int linear = net.linear_path ? 2 * kWidth * int(sizeof(float)) / int(sizeof(float4)) : 0;
    return (3 * net.layers + 2) * kTeam + 1 + linear;
  }
  L2L_DEVICE Shared(float4* at, int layers)
      : h(at),
        c(h + 2 * layers * kTeam),
        inputs(c + layers * kTeam),
        finite(reinterpret_cast<uint32_t*>(inputs + 2 * kTeam)),
        moves(finite + 2),
        linear(reinterpret_cast<float*>(finite + 4)),
        layers(layers) {}

  L2L_DEVICE float4* h_of(int64_t step, int layer) const { return h + ((step & 1) * layers + layer) * kTeam; }
  L2L_DEVICE float& linear_of(int64_t step) const {
    return linear[(step & 1) * kWidth + device::lane()];  // of the lane's own coordinate
  }
  L2L_DEVICE float4* inputs_of(int64_t step) const { return inputs + (step & 1) * kTeam; }
};

L2L_DEVICE Four get(const float4* slots, int slot) {
  const float4 x = slots[slot * device::kWarp + device::lane()];
  return {{x.x, x.y, x.z, x.w}};
}
L2L_DEVICE void put(float4* slots, int slot, const Four& x) {
  slots[slot * device::kWarp + device::lane()] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
}

// Slots as head and project_two want them.
struct Slots {
  float4* at;
  L2L_DEVICE Four below(int slot) const { return get(at, slot); }
  L2L_DEVICE void put_below(int slot, const Four& x) const { put(at, slot, x); }
};

// This warp's part of a layer. finite: of the lane's four coordinates; the others keep their state.
template <int kSlots, int kInputs>
L2L_DEVICE void run_part(
    const float4* weights, const float4* below, const float4* h_old, float4* h_new, float4* c, uint32_t finite) {
  constexpr int kChunks = chunks<Exact>(kInputs, kSlots);
  const int j = warp();
  const Operand<Exact, kInputs, kSlots> operand([&](int i) { return get(below, i); }, [&](int i) { return get(h_old, i); });
  const float4* const from = weights + j * kChunks * 2 * device::kWarp + device::lane();
  const Four c_old = get(c, j), old = get(h_old, j);
  Four c_new, h;
  run_slot<Exact>(
      operand.parts, weights[Sizes<Exact>::layer_fragments(kInputs, kSlots) + 4 * j + Place().q],
      [&](int m, int half) { return from[(2 * m + half) * device::kWarp]; }, c_old, c_new, h);
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    if (finite >> n & 1) continue;
    c_new.at[n] = c_old.at[n];
    h.at[n] = old.at[n];
  }
  put(c, j, c_new);
  put(h_new, j, h);
  __syncthreads();
}

// Four coordinates of a row of state, and back.
L2L_DEVICE Four load_row(const Matrix& state, int64_t first, int row, int64_t count) {
  Four four = {};
#pragma unroll
  for (int n = 0; n < kOwn; ++n)
    if (first + n < count)
      four.at[n] = load<float>(state.data, state.dtype, (first + n) * state.row + row * state.column);
  return four;
}
L2L_DEVICE void store_row(const Matrix& state, int64_t first, int row, int64_t count, const Four& four) {
#pragma unroll
  for (int n = 0; n < kOwn; ++n)
    if (first + n < count) store(state.data, state.dtype, (first + n) * state.row + row * state.column, four.at[n]);
}

template <int kSlots>
__global__ void __launch_bounds__(team(kSlots), kSlots <= 5 ? 2 : 1) unroll(const __grid_constant__ UnrollCall call) {
  const Cell<float>& cell = call.cell;
  const Network& net = cell.net;
  const UnrollArguments& arguments = call.arguments;
  const int64_t count = arguments.count, steps = arguments.steps;
  const bool first_warp = warp() == 0, last_warp = warp() == kSlots - 1;
  float4* const weights = reinterpret_cast<float4*>(device::shared_memory());
  float4* const rest = weights + Sizes<Exact>::all(net);
  Packer<Exact, kSlots>(net, call.starts, cell.weights, weights, reinterpret_cast<float*>(rest));
  const Shared<kSlots> shared(rest, net.layers);
  const float4* const head_weights = rest - Sizes<Exact>::head(kSlots);
  const double first_step = read(arguments.first_step);

  for (int64_t tile = int64_t(blockIdx.x) * kWidth; tile < count; tile += int64_t(gridDim.x) * kWidth) {
    const int64_t own = tile + device::lane(), four = tile + kOwn * Place().r;
    const bool inside = own < count;
    const int unit = 4 * warp() + Place().q;
    __syncthreads();  // the weights are packed, the tile before is done
    for (int layer = 0; layer < net.layers; ++layer) {
      put(shared.h_of(0, layer), warp(), load_row(arguments.state, four, net.h_row(layer) + unit, count));
      put(shared.c + layer * team(kSlots), warp(), load_row(arguments.state, four, net.c_row(layer) + unit, count));
    }

    // Of the first warp.
    Moments<V> moments = {V(0), V(0)};
    const Matrix& state = arguments.state;
    if (first_warp && net.has_moments() && inside)
      moments = {
          V(load<float>(state.data, state.dtype, own * state.row)),
          V(load<float>(state.data, state.dtype, own * state.row + state.column))};
    auto grad_of = [&](int64_t t) { return inside && t < steps ? element<float>(arguments.grads, t, own) : 0; };
    float grad = first_warp ? grad_of(0) : 0;
    auto prepare = [&](int64_t t) {
      const Gradient<float> gradient(net, grad);
      grad = grad_of(t + 1);
      MomentScale<V> scale = cell.moments;
      if (net.has_moments()) scale = cell.moments_at(first_step + double(t));
      Moments<V> moved = moments;
      float features[4];
      preprocess(cell, scale, V(gradient.value), moved, features);
      if (gradient.live) moments = moved;
      if (net.linear_path) shared.linear_of(t) = linear_path(cell, call.starts, features);
      const Four input = feature_slot(features, net.inputs());
      const uint32_t finite = device::ballot(gradient.live);
      const uint32_t moves = device::ballot(gradient.live && !unmoved(net, moved));
      if (device::lane() == 0) {
        shared.finite[t & 1] = finite;
        shared.moves[t & 1] = moves;
      }
      const Slots inputs = {shared.inputs_of(t)};
      if (!net.projection) return inputs.put_below(0, input);
      const auto operand = features_chunk<Exact>(input);
#pragma unroll
      for (int p = 0; p < kSlots; p += 2) 
        project_two<Exact, kSlots>(p, operand, PackedProjection<Exact>(weights, kSlots), inputs);
    };
    if (first_warp && steps > 0) prepare(0);
    __syncthreads();

    for (int64_t t = 0; t < steps; ++t) {
      const uint32_t of_four = shared.finite[t & 1] >> kOwn * Place().r & 15;
      const bool moves = shared.moves[t & 1] >> device::lane() & 1;
      const float linear = net.linear_path && last_warp ? shared.linear_of(t) : 0;
      if (first_warp && t + 1 < steps) prepare(t + 1);
      const float4* at = weights;
      int layer = 0;
      if (net.projection) {
        at += Sizes<Exact>::projection(kSlots);
      } else {
        run_part<kSlots, 1>(at, shared.inputs_of(t), shared.h_of(t, 0), shared.h_of(t + 1, 0), shared.c, of_four);
        at += Sizes<Exact>::layer(1, kSlots);
        layer = 1;
      }
#pragma unroll 1
      for (; layer < net.layers; ++layer) {
        run_part<kSlots, kSlots>(
            at, layer ? shared.h_of(t + 1, layer - 1) : shared.inputs_of(t), shared.h_of(t, layer),
            shared.h_of(t + 1, layer), shared.c + layer * team(kSlots), of_four);
        at += Sizes<Exact>::layer(kSlots, kSlots);
      }
      if (last_warp) {
        const Slots top = {shared.h_of(t + 1, net.layers - 1)};
        const float y = head<kSlots>(net, reinterpret_cast<const float*>(head_weights), top, linear);
        if (inside) element<float>(call.updates, t, own) = moves ? cell.output_scale * y : 0.0f;
      }
    }

    for (int layer = 0; layer < net.layers; ++layer) {
      store_row(call.last, four, net.h_row(layer) + unit, count, get(shared.h_of(steps, layer), warp()));
      store_row(call.last, four, net.c_row(layer) + unit, count, get(shared.c + layer * team(kSlots), warp()));
    }
    if (first_warp && net.has_moments() && inside) {
      store(call.last.data, call.last.dtype, own * call.last.row, moments.m.v);
      store(call.last.data, call.last.dtype, own * call.last.row + call.last.column, moments.v.v);
    }
  }
}

// ---------------------------------------------------------------- launchers

template <int kSlots>
int64_t shared_bytes(const Network& net) {
  const int64_t flat = WeightLayout{net}.count() * int64_t(sizeof(float));  // there before the state
  return (Sizes<Exact>::all(net) + std::max<int64_t>(Shared<kSlots>::size(net), (flat + 15) / 16)) * sizeof(float4);
}

template <int kSlots>
void launch(const UnrollCall& call, cudaStream_t stream) {
  const int64_t tiles = tiles_of(call.arguments.count), multiprocessors = device::multiprocessors();
  const auto grid = unsigned(std::min(tiles, 4 * multiprocessors));
  const auto bytes = size_t(shared_bytes<kSlots>(call.cell.net));
  check(device::launch(unroll<kSlots>, grid, team(kSlots), bytes, stream, call), "lstm_unroll");
}

}  // namespace
}  // namespace matrix

bool matrix_unroll_supports(const UnrollArguments& arguments) {
  bool fits = false;
  matrix::with_slots(arguments.net.hidden, [&](auto slots) {
    fits = matrix::shared_bytes<decltype(slots)::value>(arguments.net) <= device::shared_limit();
  });
  return fits && arguments.weights_dtype == DType::float32;
}

void matrix_unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, void* stream) {
  if (arguments.count == 0) return;
  const matrix::UnrollCall call = {
      Cell<float>::of(arguments.net, arguments.weights), matrix::Starts::of(arguments.net), arguments, updates,
      last};
  matrix::with_slots(arguments.net.hidden, [&](auto slots) {
    matrix::launch<decltype(slots)::value>(call, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace l2l
