// One step of one tile of coordinates, forward and backward.
//
// A tile is a matrix with one row per feature, hidden unit or gate and kWide vectors (or fewer) of coordinates in a row, so
// a weight is broadcast once and meets NV vectors, and four rows of a matrix at a time meet every vector that is loaded.
#pragma once

namespace l2l {
namespace {

// acc[g][v] += sum over k of weights[k][g] * rows[k][v]: one group of four matrix rows times a tile.
template <class V, int NV>
L2L_INLINE void multiply(V (&acc)[kGroup][NV], const typename V::Scalar* weights, const typename V::Scalar* rows, int count) {
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
    rows += NV * V::kLanes;
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

// One step of a tile; each pointer is a block of rows, NV * kLanes scalars each. None aliases another.
template <class T>
struct TileStep {
  const T* grad;       // [1], finite
  const T* state;      // [state_rows]
  T* new_state;        // [state_rows], written
  T* features;         // [inputs], written
  T* projected;        // [groups(hidden) * 4], written (with projection)
  T* activations;      // a layer: [5 * hidden], gates in order of their rows, then tanh c; written. Null: not kept
  T* output;           // [1], written: y, the head's output (after tanh, with output "tanh")
  Corrections<T> corrections;
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
      Moments<V> moments = advance<V>({V::load(tile.state + at), V::load(tile.state + width + at)}, grad, scale);
      moments.m.store(tile.new_state + at);
      moments.v.store(tile.new_state + width + at);
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
    multiply(acc, weights + kGroup, tile.features, net.inputs());
    for (int g = 0; g < kGroup; ++g)
      for (int v = 0; v < NV; ++v) elu(acc[g][v]).store(tile.projected + (group * kGroup + g) * width + v * V::kLanes);
  }
}

template <class V, int NV, bool kKeep>
void forward_layer(
    const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer,
    const typename V::Scalar* inputs) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const int hidden = net.hidden, count = net.layer_inputs(layer);
  const auto* weights = packed.gates[layer];
  const auto* h = tile.state + net.h_row(layer) * width;
  for (int unit = 0; unit < hidden; ++unit) {
    V gate[kGates][NV];
    broadcast(gate, weights);
    multiply(gate, weights + kGroup, inputs, count);
    multiply(gate, weights + (1 + count) * kGroup, h, hidden);
    weights += (1 + count + hidden) * kGroup;
    const auto* c = tile.state + (net.c_row(layer) + unit) * width;
    auto* h_new = tile.new_state + (net.h_row(layer) + unit) * width;
    auto* c_new = tile.new_state + (net.c_row(layer) + unit) * width;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const int at = v * V::kLanes;
      Unit<V> next;
      if constexpr (kKeep) {
        Activations<V> kept;
        next = lstm_unit(gate[kInput][v], gate[kForget][v], gate[kCell][v], gate[kOutput][v], V::load(c + at), kept);
        auto* to = tile.activations + (layer * (kGates + 1) * hidden + unit) * width + at;
        kept.i.store(to + kInput * hidden * width);
        kept.f.store(to + kForget * hidden * width);
        kept.g.store(to + kCell * hidden * width);
        kept.o.store(to + kOutput * hidden * width);
        kept.tanh_c.store(to + kGates * hidden * width);
      } else {
        next = lstm_unit(gate[kInput][v], gate[kForget][v], gate[kCell][v], gate[kOutput][v], V::load(c + at));
      }
      next.h.store(h_new + at);
      next.c.store(c_new + at);
    }
  }
}

template <class V, int NV>
void forward_head(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const auto* top = tile.new_state + net.h_row(net.layers - 1) * width;
  V y[NV];
  for (int v = 0; v < NV; ++v) y[v] = V(packed.head_bias);
  for (int k = 0; k < net.hidden; ++k) {
    V w = V::broadcast(packed.head + k);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) y[v] = fma(w, V::load(top + k * width + v * V::kLanes), y[v]);
  }
  for (int v = 0; v < NV; ++v) (net.tanh_output ? tanh_of(y[v]) : y[v]).store(tile.output + v * V::kLanes);
}

template <class V, int NV, bool kKeep>
void forward(const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile) {
  const Network& net = packed.net;
  forward_features<V, NV>(packed, tile);
  const auto* inputs = tile.features;
  if (net.projection) {
    forward_projection<V, NV>(packed, tile);
    inputs = tile.projected;
  }
  for (int layer = 0; layer < net.layers; ++layer) {
    forward_layer<V, NV, kKeep>(packed, tile, layer, inputs);
    inputs = tile.new_state + net.h_row(layer) * NV * V::kLanes;
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
