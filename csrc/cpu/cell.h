// One step of one tile of coordinates, forward and backward.
//
// A tile is a matrix with one row per feature, hidden unit or gate and kWide vectors (or fewer) of coordinates in a
// row, so a weight is broadcast once and meets NV vectors, and four rows of a matrix at a time meet every vector that
// is loaded.
#pragma once

#include "../element.h"
#include "../lstm_cell.h"
#include "packed.h"
#include "vec.h"

namespace l2l {
namespace {

// Weights times what a layer takes in. Another Product may stand in for this one.
struct ScalarProduct {
  template <class V>
  using Gate = V;
  static constexpr WeightOrder kOrder = WeightOrder::scalars;
  template <class V>
  using Weight = typename V::Scalar;

  template <class V>
  static L2L_INLINE const Weight<V>* weights(const Packed<typename V::Scalar>& packed, int layer) {
    return packed.gates[layer];
  }
  template <class V>
  static L2L_INLINE V broadcast(const Weight<V>* w) {
    return V::broadcast(w);
  }
  template <class V>
  static L2L_INLINE V add(V w, V x, V sum) {
    return fma(w, x, sum);
  }
  static L2L_INLINE constexpr int columns(int inputs, int hidden) { return inputs + hidden; }

  // `count` rows to `to`; returns where they end.
  template <class V, int NV>
  static L2L_INLINE typename V::Scalar* gather(
      const typename V::Scalar* from, int64_t stride, int count, typename V::Scalar* to) {
    for (int k = 0; k < count; ++k, from += stride, to += NV * V::kLanes)
#pragma GCC unroll 8
      for (int at = 0; at < NV * V::kLanes; at += V::kLanes) V::load(from + at).store(to + at);
    return to;
  }
};

// acc[g][v] += sum over k of weights[k][g] * rows[k * stride][v]: one group of four matrix rows times a tile. What a
// weight, a row's number and a product are is the Product's to say.
template <class Product, class V, int NV>
L2L_INLINE void multiply(
    V (&acc)[kGroup][NV], const typename Product::template Weight<V>* weights, const typename V::Scalar* rows,
    int64_t stride, int count) {
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) {
    V x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = V::load(rows + v * V::kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      V w = Product::template broadcast<V>(weights + g);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v] = Product::add(w, x[v], acc[g][v]);
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

// Where the rows of the tile that comes next lie in memory. Eighty rows are too many streams for the hardware to follow,
// so each unit of this tile calls for the rows of its twin in the next one.
struct Ahead {
  const char* rows;  // null: not known
  int64_t row_bytes;
  int tile_bytes;

  L2L_INLINE void fetch(int row) const {
    if (!rows) return;
    for (int at = 0; at < tile_bytes; at += 64) __builtin_prefetch(rows + row * row_bytes + at, 1, 2);
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
  T* columns;      // [column_rows], written: what a layer's matrix is multiplied with
  T* activations;  // [5 * hidden], written: gates in order of their rows, then tanh c; one block a layer if kept
  T* output;       // [1], written: y, of head and linear path (after tanh, with output "tanh")
  Corrections<T> corrections;
  Ahead ahead;
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
    multiply<ScalarProduct>(acc, weights + kGroup, tile.features, width, net.inputs());
    for (int g = 0; g < kGroup; ++g)
      for (int v = 0; v < NV; ++v) elu(acc[g][v]).store(tile.projected + (group * kGroup + g) * width + v * V::kLanes);
  }
}

// One unit's activations, a vector at a time.
template <class V, bool kKeep>
struct Unit {
  using T = typename V::Scalar;
  T* gates;  // scaled pre-activations, `gate` scalars from one gate to the next; if kept, activations are written there
  int64_t gate;
  const T* c;
  T *c_new, *h_new;

  L2L_INLINE void update_c(int at) const {
    T* a = gates + at;
    V i = V::load(a + kInput * gate), f = V::load(a + kForget * gate), g = V::load(a + kCell * gate);
    if constexpr (kKeep) {
      Activations<V> kept;
      lstm_c<V>(i, f, g, V::load(c + at), kept).store(c_new + at);
      kept.i.store(a + kInput * gate);
      kept.f.store(a + kForget * gate);
      kept.g.store(a + kCell * gate);
    } else {
      lstm_c<V>(i, f, g, V::load(c + at)).store(c_new + at);
    }
  }
  L2L_INLINE void update_h(int at) const {
    T* a = gates + at;
    V o = V::load(a + kOutput * gate);
    if constexpr (kKeep) {
      Activations<V> kept;
      lstm_h<V>(o, V::load(c_new + at), kept).store(h_new + at);
      kept.o.store(a + kOutput * gate);
      kept.tanh_c.store(a + kGates * gate);
    } else {
      lstm_h<V>(o, V::load(c_new + at)).store(h_new + at);
    }
  }

  // Parts first .. last - 1 of 2 NV: each vector's c, then each vector's h, so that many of these long chains are under
  // way together.
  template <int NV>
  L2L_INLINE void update(int first, int last) const {
#pragma GCC unroll 8
    for (int part = first; part < last; ++part)
      part < NV ? update_c(part * V::kLanes) : update_h((part - NV) * V::kLanes);
  }
};

template <class V, int NV, bool kKeep, class Product>
L2L_INLINE Unit<typename Product::template Gate<V>, kKeep> unit_of(
    const Network& net, const TileStep<typename V::Scalar>& tile, int layer, int unit, bool own_gates) {
  constexpr int width = NV * V::kLanes;
  auto* block = tile.activations + (kKeep ? layer * (kGates + 1) * net.hidden * width : 0);
  const int64_t c = (net.c_row(layer) + unit) * tile.state_stride, h = (net.h_row(layer) + unit) * tile.state_stride;
  return {
      own_gates ? block + unit * width : block, own_gates ? net.hidden * width : width, tile.state + c,
      tile.new_state + c, tile.new_state + h};
}

// A layer's activations: every unit's c, then every unit's h. Products in blocks are too short to spread calls for the
// next tile over.
template <class V, int NV, bool kKeep, class Product>
void forward_activations(const Network& net, const TileStep<typename V::Scalar>& tile, int layer) {
  for (int half = 0; half < 2; ++half)
    for (int unit = 0; unit < net.hidden; ++unit) {
      if (Product::kOrder == WeightOrder::blocks) tile.ahead.fetch((half ? net.h_row(layer) : net.c_row(layer)) + unit);
      unit_of<V, NV, kKeep, Product>(net, tile, layer, unit, true).template update<NV>(half * NV, (half + 1) * NV);
    }
}

// A layer, unit by unit. Where there are registers for both, the activations of the unit before go between the columns
// of this one's gates, because products and activations keep different parts of the machine busy. The sizes of the
// paper's network are compiled in (kColumns, kHidden), so that its loops are unrolled; 0 stands for whatever comes.
template <class V, int NV, bool kKeep, class Product, int kColumns, int kHidden>
void forward_units(
    const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer, int column_count) {
  constexpr int width = NV * V::kLanes, parts = V::kInterleave ? 2 * NV : 1;
  constexpr bool own_gates = kKeep || !V::kInterleave;
  const Network& net = packed.net;
  const int columns = kColumns ? kColumns : column_count, hidden = kHidden ? kHidden : net.hidden;
  const auto* weights = Product::template weights<V>(packed, layer);
  for (int unit = 0; unit < hidden; ++unit) {
    tile.ahead.fetch(net.h_row(layer) + unit);
    tile.ahead.fetch(net.c_row(layer) + unit);
    const auto before = unit_of<V, NV, kKeep, Product>(net, tile, layer, unit ? unit - 1 : 0, own_gates);
    V acc[kGates][NV];
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v] = Product::template broadcast<V>(weights + g);
#pragma GCC unroll 8
    for (int part = 0; part < parts; ++part) {
      const int first = part * columns / parts, last = (part + 1) * columns / parts;
      multiply<Product>(acc, weights + (1 + first) * kGroup, tile.columns + first * width, width, last - first);
      if (V::kInterleave && unit) before.template update<NV>(part, part + 1);
    }
    weights += (1 + columns) * kGroup;
    const auto here = unit_of<V, NV, kKeep, Product>(net, tile, layer, unit, own_gates);
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v].store(here.gates + g * here.gate + v * V::kLanes);
  }
  if constexpr (V::kInterleave) {
    unit_of<V, NV, kKeep, Product>(net, tile, layer, hidden - 1, own_gates).template update<NV>(0, 2 * NV);
  } else {
    forward_activations<V, NV, kKeep, Product>(net, tile, layer);
  }
}

// What the layer takes in is first copied, so that the new h may be written over the old one.
template <class V, int NV, bool kKeep, class Product>
void forward_layer(
    const Packed<typename V::Scalar>& packed, const TileStep<typename V::Scalar>& tile, int layer,
    const typename V::Scalar* inputs, int64_t input_stride) {
  const Network& net = packed.net;
  const auto* h = tile.state + net.h_row(layer) * tile.state_stride;
  const int count = net.layer_inputs(layer), hidden = net.hidden;
  if constexpr (Product::kOrder == WeightOrder::blocks) {
    Product::template gates<V, NV>(packed, tile, layer, inputs, input_stride);
    forward_activations<V, NV, kKeep, Product>(net, tile, layer);
  } else {
    auto* end = Product::template gather<V, NV>(inputs, input_stride, count, tile.columns);
    Product::template gather<V, NV>(h, tile.state_stride, hidden, end);
    const int columns = Product::columns(count, hidden);
    if (hidden == 20 && count == 20) {
      forward_units<V, NV, kKeep, Product, Product::columns(20, 20), 20>(packed, tile, layer, columns);
    } else if (hidden == 20 && count == 2) {
      forward_units<V, NV, kKeep, Product, Product::columns(2, 20), 20>(packed, tile, layer, columns);
    } else {
      forward_units<V, NV, kKeep, Product, 0, 0>(packed, tile, layer, columns);
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
  for (int f = 0; f < net.linear_inputs(); ++f) {
    V w = V::broadcast(packed.linear + f);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) y[v] = fma(w, V::load(tile.features + (f * NV + v) * V::kLanes), y[v]);
  }
  for (int v = 0; v < NV; ++v) {
    if (net.tanh_output) y[v] = tanh_of(y[v]);
    if (net.has_moments()) y[v] = select(unmoved(V::load(tile.new_state + tile.state_stride + v * V::kLanes)), V(0), y[v]);
    y[v].store(tile.output + v * V::kLanes);
  }
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

// Sets gradients that are not finite, or too large for a state of this dtype, to zero and marks them; true when there
// are any.
template <class V, class T>
bool skip_not_finite(const Network& net, T* grad, int width, DType state, bool* skip) {
  const T limit = T(net.gradient_limit(sizeof(T) == 8, state));
  bool every = true;
  for (int at = 0; at < width; at += V::kLanes) every &= all(less(abs(V::load(grad + at)), V(limit)));
  if (every) return false;
  for (int i = 0; i < width; ++i) {
    skip[i] = !(std::fabs(grad[i]) < limit);
    if (skip[i]) grad[i] = 0;
  }
  return true;
}

}  // namespace
}  // namespace l2l
