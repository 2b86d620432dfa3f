// One step of one tile of coordinates, forward and backward.
//
// A tile is a matrix with one row per feature, hidden unit or gate and kWide vectors (or fewer) of coordinates in a
// row, so a weight is broadcast once and meets NV vectors, and four rows of a matrix at a time meet every vector that
// is loaded.
#pragma once

namespace l2l {
namespace {

// acc[g][v] += sum over k of weights[k][g] * rows[k * stride][v]: one group of four matrix rows times a tile.
template <class V, int NV>
L2L_INLINE void multiply(
    V (&acc)[kGroup][NV], const typename V::Scalar* weights, const typename V::Scalar* rows, int64_t stride,
    int count) {
  for (int k = 0; k < count; ++k) {
    V x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = V::load(rows + v * V::kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      V w = V::broadcast(weights + g);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v] = fma(w, x[v], acc[g][v]);
    }
    weights += kGroup;
    rows += stride;
  }
}

template <class V, int NV>
L2L_INLINE void broadcast(V (&acc)[kGroup][NV], const typename V::Scalar* bias) {
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[g][v] = bias ? V::broadcast(bias + g) : V(0);
}

template <class V>
L2L_INLINE MomentScale<V> moment_scale(const Network& net, Corrections<typename V::Scalar> c) {
  return {V(net.beta1), V(net.beta2), V(1 - net.beta1), V(1 - net.beta2), V(net.eps), V(c.first), V(c.second)};
}

template <class V, class T>
L2L_INLINE LogSignScale<V> log_sign_scale(const Packed<T>& packed) {
  return {V(packed.inverse_p), V(packed.threshold), V(packed.steep)};
}

// Where the state of the tile that comes next lies in memory. Eighty rows are too many streams for the hardware to
// follow, so each unit of this tile calls for the rows of its twin in the next one.
struct Ahead {
  const char* state;  // null: not known
  int64_t row_bytes;
  int tile_bytes;

  L2L_INLINE void fetch(int row) const {
    if (!state) return;
    for (int at = 0; at < tile_bytes; at += 64) __builtin_prefetch(state + row * row_bytes + at, 1, 2);
  }
};

// One step of a tile; each pointer is a block of rows, NV * kLanes scalars each. None aliases another, but new_state
// may be state itself.
template <class T>
struct TileStep {
  const T* grad;   // [1], finite
  const T* state;  // [state_rows], state_stride scalars from one to the next
  T* new_state;    // [state_rows], likewise, written
  int64_t state_stride;
  T* features;     // [inputs], written
  T* projected;    // [groups(hidden) * 4], written (with projection)
  T* activations;  // [5 * hidden], written: gates in order of their rows, then tanh c; one block a layer if kept
  T* output;       // [1], written: y, the head's output (after tanh, with output "tanh")
  Corrections<T> corrections;
  Ahead ahead;
  T* pairs;  // [pair_rows], written (by a product of pairs only)
};

template <class V, int NV>
void forward_features(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const auto scale = moment_scale<V>(net, tile.corrections);
  const auto log_scale = log_sign_scale<V>(packed);
  for (int at = 0; at < width; at += V::kLanes) {
    V grad = V::load(tile.grad + at);
    auto* feature = tile.features + at;
    if (net.features == Features::identity) grad.store(feature);
    if (net.has_moments()) {
      Moments<V> moments =
          advance<V>({V::load(tile.state + at), V::load(tile.state + tile.state_stride + at)}, grad, scale);
      moments.m.store(tile.new_state + at);
      moments.v.store(tile.new_state + tile.state_stride + at);
      Ratios<V> ratio = ratios(moments, grad, scale);
      ratio.momentum.store(feature);
      ratio.gradient.store(feature + width);
      feature += 2 * width;
    }
    if (net.has_log_sign()) {
      LogSign<V> pair = log_sign(grad, log_scale);
      pair.log.store(feature);
      pair.sign.store(feature + width);
    }
  }
}

template <class V, int NV>
void forward_projection(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  for (int group = 0; group < groups(net.hidden); ++group) {
    const auto* weights = packed.projection + group * (1 + net.inputs()) * kGroup;
    V acc[kGroup][NV];
    broadcast(acc, weights);
    multiply(acc, weights + kGroup, tile.features, width, net.inputs());
    for (int g = 0; g < kGroup; ++g)
      for (int v = 0; v < NV; ++v) elu(acc[g][v]).store(tile.projected + (group * kGroup + g) * width + v * V::kLanes);
  }
}

// The sizes of the paper's network are compiled in (kInputs, kHidden), so that its loops are unrolled; 0 stands for
// whatever comes.
template <class V, int NV, int kInputs, int kHidden>
void multiply_gates(
    const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer,
    const typename V::Scalar* inputs, int64_t input_stride, typename V::Scalar* gates) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const int count = kInputs ? kInputs : net.layer_inputs(layer), hidden = kHidden ? kHidden : net.hidden;
  const auto* weights = packed.gates[layer];
  const auto* h = tile.state + net.h_row(layer) * tile.state_stride;
  for (int unit = 0; unit < hidden; ++unit) {
    tile.ahead.fetch(net.h_row(layer) + unit);
    tile.ahead.fetch(net.c_row(layer) + unit);
    V acc[kGates][NV];
    broadcast(acc, weights);
    multiply(acc, weights + kGroup, inputs, input_stride, count);
    multiply(acc, weights + (1 + count) * kGroup, h, tile.state_stride, hidden);
    weights += (1 + count + hidden) * kGroup;
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v].store(gates + (g * hidden + unit) * width + v * V::kLanes);
  }
}

// Pre-activations of a layer's gates, scaled: row gate * hidden + unit. Another Product may stand in for this one.
struct ScalarProduct {
  // Whether it takes the weights as Packed's pairs, and is too short to spread calls for the next tile over.
  static constexpr bool kPairs = false;

  template <class V, int NV>
  static void gates(
      const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer,
      const typename V::Scalar* inputs, int64_t input_stride, typename V::Scalar* gates) {
    const int hidden = packed.net.hidden, count = packed.net.layer_inputs(layer);
    if (hidden == 20 && count == 20) {
      multiply_gates<V, NV, 20, 20>(packed, tile, layer, inputs, input_stride, gates);
    } else if (hidden == 20 && count == 2) {
      multiply_gates<V, NV, 2, 20>(packed, tile, layer, inputs, input_stride, gates);
    } else {
      multiply_gates<V, NV, 0, 0>(packed, tile, layer, inputs, input_stride, gates);
    }
  }
};

// Three passes, products, then c, then h: an activation is a long chain, of which many must be under way together. The
// first pass reads the whole old h, so the last may write the new one over it.
template <class V, int NV, bool kKeep, class Product>
void forward_layer(
    const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer,
    const typename V::Scalar* inputs, int64_t input_stride) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const int hidden = net.hidden;
  auto* gates = tile.activations + (kKeep ? layer * (kGates + 1) * hidden * width : 0);

  Product::template gates<V, NV>(packed, tile, layer, inputs, input_stride, gates);

  const int gate = hidden * width;
  for (int unit = 0; unit < hidden; ++unit) {
    const auto* c = tile.state + (net.c_row(layer) + unit) * tile.state_stride;
    auto* c_new = tile.new_state + (net.c_row(layer) + unit) * tile.state_stride;
    if constexpr (Product::kPairs) tile.ahead.fetch(net.c_row(layer) + unit);
#pragma GCC unroll 8
    for (int at = 0; at < width; at += V::kLanes) {
      auto* a = gates + unit * width + at;
      V i = V::load(a + kInput * gate), f = V::load(a + kForget * gate), g = V::load(a + kCell * gate);
      if constexpr (kKeep) {
        Activations<V> kept;
        lstm_c(i, f, g, V::load(c + at), kept).store(c_new + at);
        kept.i.store(a + kInput * gate);
        kept.f.store(a + kForget * gate);
        kept.g.store(a + kCell * gate);
      } else {
        lstm_c(i, f, g, V::load(c + at)).store(c_new + at);
      }
    }
  }
  for (int unit = 0; unit < hidden; ++unit) {
    const auto* c_new = tile.new_state + (net.c_row(layer) + unit) * tile.state_stride;
    auto* h_new = tile.new_state + (net.h_row(layer) + unit) * tile.state_stride;
    if constexpr (Product::kPairs) tile.ahead.fetch(net.h_row(layer) + unit);
#pragma GCC unroll 8
    for (int at = 0; at < width; at += V::kLanes) {
      auto* a = gates + unit * width + at;
      V o = V::load(a + kOutput * gate);
      if constexpr (kKeep) {
        Activations<V> kept;
        lstm_h(o, V::load(c_new + at), kept).store(h_new + at);
        kept.o.store(a + kOutput * gate);
        kept.tanh_c.store(a + kGates * gate);
      } else {
        lstm_h(o, V::load(c_new + at)).store(h_new + at);
      }
    }
  }
}

template <class V, int NV>
void forward_head(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  const Network& net = packed.net;
  const auto* top = tile.new_state + net.h_row(net.layers - 1) * tile.state_stride;
  V y[NV];
  for (int v = 0; v < NV; ++v) y[v] = V(packed.head_bias);
  for (int k = 0; k < net.hidden; ++k) {
    V w = V::broadcast(packed.head + k);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) y[v] = fma(w, V::load(top + k * tile.state_stride + v * V::kLanes), y[v]);
  }
  for (int v = 0; v < NV; ++v) (net.tanh_output ? tanh_of(y[v]) : y[v]).store(tile.output + v * V::kLanes);
}

template <class V, int NV, bool kKeep, class Product = ScalarProduct>
void forward(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  const Network& net = packed.net;
  forward_features<V, NV>(packed, tile);
  const auto* inputs = tile.features;
  int64_t stride = NV * V::kLanes;
  if (net.projection) {
    forward_projection<V, NV>(packed, tile);
    inputs = tile.projected;
  }
  for (int layer = 0; layer < net.layers; ++layer) {
    forward_layer<V, NV, kKeep, Product>(packed, tile, layer, inputs, stride);
    inputs = tile.new_state + net.h_row(layer) * tile.state_stride;
    stride = tile.state_stride;
  }
  forward_head<V, NV>(packed, tile);
}

// Sets gradients that are not finite to zero and marks them; true when there are any.
template <class V, class T>
bool skip_not_finite(T* grad, int width, bool* skip) {
  bool every = true;
  for (int at = 0; at < width; at += V::kLanes) every &= all(less(abs(V::load(grad + at)), V(INFINITY)));
  if (every) return false;
  for (int i = 0; i < width; ++i) {
    skip[i] = !(std::fabs(grad[i]) < T(INFINITY));
    if (skip[i]) grad[i] = 0;
  }
  return true;
}

}  // namespace
}  // namespace l2l
