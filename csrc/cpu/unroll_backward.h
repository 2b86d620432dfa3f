// T steps of one tile, forward again and then backward through time.
#pragma once

#include "cell.h"
#include "coordinates.h"
#include "outer.h"
#include "tables.h"
#include "unroll.h"

namespace l2l {
namespace {

// Rows of one step that the backward run needs, each `width` long.
template <class T>
struct KeptStep {
  T *grad, *live;  // live: 1 where the gradient was finite, else 0
  T *output, *features, *projected, *activations;

  static L2L_INLINE int rows(const Network& net) {
    return 3 + 4 + groups(net.hidden) * kGroup + net.layers * (kGates + 1) * net.hidden;
  }
  L2L_INLINE KeptStep(T* at, const Network& net, int width) {
    grad = at;
    live = grad + width;
    output = live + width;
    features = output + width;
    projected = features + 4 * width;
    activations = projected + groups(net.hidden) * kGroup * width;
  }
};

// Sums over a tile's coordinates and steps, before they go to the flat gradient: [column][row], rows across the lanes.
template <class V>
struct WeightSums {
  using T = typename V::Scalar;
  T *projection, *head, *layers;
  int projection_rows, gate_rows;

  L2L_INLINE WeightSums(T* at, const Network& net) {
    projection_rows = padded<V>(net.hidden);
    gate_rows = padded<V>(kGates * net.hidden);
    projection = at;                                           // [inputs + 1][projection_rows]
    head = projection + (net.inputs() + 1) * projection_rows;  // [hidden, bias, linear_inputs][kLanes]
    layers = head + head_rows(net) * V::kLanes;                // a layer: [inputs + hidden + 1][gate_rows]
  }
  // The weights of y's sum, in the order of the flat vector.
  static L2L_INLINE int head_rows(const Network& net) { return net.hidden + 1 + net.linear_inputs(); }
  L2L_INLINE T* layer(const Network& net, int index) const {
    T* at = layers;
    for (int l = 0; l < index; ++l) at += size(net, l);
    return at;
  }
  L2L_INLINE int64_t size(const Network& net, int layer) const {
    return int64_t(net.layer_inputs(layer) + net.hidden + 1) * gate_rows;
  }
  L2L_INLINE T* end(const Network& net) const { return layer(net, net.layers); }
};

// The whole of a tile's scratch: sums, then gradients, then every step's rows.
template <class V>
struct BackwardScratch {
  using T = typename V::Scalar;
  WeightSums<V> sums;
  T *d_state, *passed;  // passed: d_state of coordinates that a step skips
  T *d_x, *d_update, *d_grad, *transposed, *columns, *states, *kept, *end;

  // No more is done with `at` than adding to it.
  L2L_INLINE BackwardScratch(T* at, const Network& net, int width, int64_t steps) : sums(at, net) {
    const int rows = net.state_rows();
    d_state = sums.end(net);
    passed = d_state + rows * width;
    d_x = passed + rows * width;
    d_update = d_x + groups(net.hidden > net.inputs() ? net.hidden : net.inputs()) * kGroup * width;
    d_grad = d_update + width;
    transposed = d_grad + width;
    columns = transposed + width * padded<V>(kGates * net.hidden);
    states = columns + column_rows(net) * width;
    kept = states + (steps + 1) * rows * width;
    // transpose_rows reads on to a whole number of vectors.
    end = kept + (steps * KeptStep<T>::rows(net) + V::kLanes) * width;
  }
};

template <class V>
int64_t backward_scratch(const Network& net, int width, int64_t steps) {
  static typename V::Scalar origin;
  return BackwardScratch<V>(&origin, net, width, steps).end - &origin;
}

template <class T>
struct Backward {
  const T* state;  // before the step
  const T* new_state;
  KeptStep<T> kept;
  T* d_state;     // [state_rows]: gradient of the new state on entry, of the old one on return
  T* d_x;         // [groups(max(hidden, inputs)) * 4]: gradient of what enters or leaves a layer
  T* transposed;  // [width][padded(4 * hidden)]
};

// d[k] = sum over rows r of matrix[r][k] * d_rows[r], k = 0 .. count - 1.
template <class V, int NV>
void multiply_transposed(
    typename V::Scalar* d, const typename V::Scalar* matrix, const typename V::Scalar* d_rows, int rows, int count) {
  constexpr int width = NV * V::kLanes;
  for (int group = 0; group < groups(count); ++group) {
    V acc[kGroup][NV];
    broadcast<V, NV>(acc, nullptr);
    multiply<ScalarProduct>(acc, matrix + group * rows * kGroup, d_rows, width, rows);
    for (int g = 0; g < kGroup && group * kGroup + g < count; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[g][v].store(d + (group * kGroup + g) * width + v * V::kLanes);
  }
}

// d_y_row: gradient of u on entry, of y's sum (before tanh) on return.
template <class V, int NV>
void backward_head(
    const Packed<typename V::Scalar>& packed, const Backward<typename V::Scalar>& tile, typename V::Scalar* d_y_row,
    const WeightSums<V>* sums) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const auto* top = tile.new_state + net.h_row(net.layers - 1) * width;
  V d_y[NV], total(0);
  for (int v = 0; v < NV; ++v) {
    const int at = v * V::kLanes;
    d_y[v] = V(net.output_scale) * V::load(d_y_row + at);
    // Not a product with `live`: the gradient of a skipped coordinate may be anything.
    d_y[v] = select(less(V(0), V::load(tile.kept.live + at)), d_y[v], V(0));
    if (net.has_moments()) d_y[v] = select(unmoved(V::load(tile.new_state + width + at)), V(0), d_y[v]);
    if (net.tanh_output) {
      V y = V::load(tile.kept.output + at);
      d_y[v] = d_y[v] * (V(1) - y * y);
    }
    total = total + d_y[v];
    d_y[v].store(d_y_row + at);
  }
  for (int k = 0; k < net.hidden; ++k) {
    V w = V::broadcast(packed.head + k), sum(0);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      (w * d_y[v]).store(tile.d_x + k * width + v * V::kLanes);
      sum = fma(d_y[v], V::load(top + k * width + v * V::kLanes), sum);
    }
    if (sums) (V::load(sums->head + k * V::kLanes) + sum).store(sums->head + k * V::kLanes);
  }
  auto* bias = sums ? sums->head + net.hidden * V::kLanes : nullptr;
  if (bias) (V::load(bias) + total).store(bias);
  for (int f = 0; sums && f < net.linear_inputs(); ++f) {
    auto* weight = bias + (1 + f) * V::kLanes;
    V sum = V::load(weight);
    for (int v = 0; v < NV; ++v) sum = fma(d_y[v], V::load(tile.kept.features + f * width + v * V::kLanes), sum);
    sum.store(weight);
  }
}

template <class V, int NV>
void backward_layer(
    const Packed<typename V::Scalar>& packed, const Backward<typename V::Scalar>& tile, int layer, bool need_inputs,
    bool need_state, const WeightSums<V>* sums) {
  using T = typename V::Scalar;
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const int hidden = net.hidden, count = net.layer_inputs(layer);
  T* gates = tile.kept.activations + layer * (kGates + 1) * hidden * width;
  const T* c = tile.state + net.c_row(layer) * width;
  T* d_h = tile.d_state + net.h_row(layer) * width;
  T* d_c = tile.d_state + net.c_row(layer) * width;

  // The gates' own rows take their gradients.
  const int gate = hidden * width;
  for (int at = 0; at < hidden * width; at += V::kLanes) {
    T* a = gates + at;
    Activations<V> kept = {
        V::load(a + kInput * gate), V::load(a + kForget * gate), V::load(a + kCell * gate), V::load(a + kOutput * gate),
        V::load(a + kGates * gate)};
    UnitGradient<V> d =
        lstm_unit_backward(V::load(tile.d_x + at) + V::load(d_h + at), V::load(d_c + at), V::load(c + at), kept);
    for (int g = 0; g < kGates; ++g) d.gates[g].store(a + g * gate);
    d.c.store(d_c + at);
  }

  if (sums) {
    const T* inputs = layer > 0        ? tile.new_state + net.h_row(layer - 1) * width
                      : net.projection ? tile.kept.projected
                                       : tile.kept.features;
    const T* h = tile.state + net.h_row(layer) * width;
    T* sum = sums->layer(net, layer);
    transpose_rows<V>(gates, width, kGates * hidden, tile.transposed);
    outer<V>(sum, tile.transposed, kGates * hidden, inputs, count, width);
    outer<V>(sum + count * sums->gate_rows, tile.transposed, kGates * hidden, h, hidden, width);
    sum_rows<V>(sum + (count + hidden) * sums->gate_rows, tile.transposed, kGates * hidden, width);
  }
  if (need_inputs) multiply_transposed<V, NV>(tile.d_x, packed.inputs_t[layer], gates, kGates * hidden, count);
  if (need_state) multiply_transposed<V, NV>(d_h, packed.hidden_t[layer], gates, kGates * hidden, hidden);
}

// From the gradient of the projected features, in d_x, to that of the features.
template <class V, int NV>
void backward_projection(
    const Packed<typename V::Scalar>& packed, const Backward<typename V::Scalar>& tile, const WeightSums<V>* sums) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  for (int at = 0; at < net.hidden * width; at += V::kLanes)
    (V::load(tile.d_x + at) * elu_slope(V::load(tile.kept.projected + at))).store(tile.kept.projected + at);
  if (sums) {
    transpose_rows<V>(tile.kept.projected, width, net.hidden, tile.transposed);
    outer<V>(sums->projection, tile.transposed, net.hidden, tile.kept.features, net.inputs(), width);
    sum_rows<V>(sums->projection + net.inputs() * sums->projection_rows, tile.transposed, net.hidden, width);
  }
  multiply_transposed<V, NV>(tile.d_x, packed.projection_t, tile.kept.projected, net.hidden, net.inputs());
}

// Adds what comes through the linear path to the gradient of the features, in d_x.
template <class V, int NV>
void backward_linear(
    const Packed<typename V::Scalar>& packed, const Backward<typename V::Scalar>& tile,
    const typename V::Scalar* d_y) {
  constexpr int width = NV * V::kLanes;
  for (int f = 0; f < packed.net.linear_inputs(); ++f)
    for (int at = 0; at < width; at += V::kLanes) {
      auto* d = tile.d_x + f * width + at;
      fma(V::broadcast(packed.linear + f), V::load(d_y + at), V::load(d)).store(d);
    }
}

// From the gradient of the features, in d_x, to that of grad [width] and of the moments' rows of the state.
template <class V, int NV>
void backward_features(
    const Packed<typename V::Scalar>& packed, const Backward<typename V::Scalar>& tile,
    const Corrections<typename V::Scalar>& corrections, typename V::Scalar* d_grad) {
  constexpr int width = NV * V::kLanes;
  const Network& net = packed.net;
  const auto scale = moment_scale<V>(net, corrections);
  const auto log_scale = log_sign_scale<V>(packed);
  for (int at = 0; at < width; at += V::kLanes) {
    V grad = V::load(tile.kept.grad + at), sum(0);
    const auto* d = tile.d_x + at;
    if (net.features == Features::identity) sum = V::load(d);
    if (net.has_moments()) {
      auto *m = tile.d_state + at, *v = m + width;
      Moments<V> d_moments = {V::load(m), V::load(v)};
      Moments<V> now = {V::load(tile.new_state + at), V::load(tile.new_state + width + at)};
      sum = moments_backward<V>({V::load(d), V::load(d + width)}, d_moments, now, grad, scale);
      d_moments.m.store(m);
      d_moments.v.store(v);
      d += 2 * width;
    }
    if (net.has_log_sign()) sum = sum + log_sign_backward(V::load(d), V::load(d + width), grad, log_scale);
    sum.store(d_grad + at);
  }
}

// Adds the sums to the flat gradient, in the weights' own order.
template <class V>
void add_sums(const Network& net, const WeightSums<V>& sums, double* d_weights) {
  const WeightLayout to{net};
  const int hidden = net.hidden;
  auto add = [&](int64_t start, const auto* from, int stride, int rows, int columns) {
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < columns; ++column)
        d_weights[start + int64_t(row) * columns + column] += from[int64_t(column) * stride + row];
  };
  if (net.projection) {
    add(to.projection_weight(), sums.projection, sums.projection_rows, hidden, net.inputs());
    add(to.projection_bias(), sums.projection + net.inputs() * sums.projection_rows, sums.projection_rows, hidden, 1);
  }
  for (int layer = 0; layer < net.layers; ++layer) {
    const int inputs = net.layer_inputs(layer), stride = sums.gate_rows;
    const auto* from = sums.layer(net, layer);
    add(to.weight_ih(layer), from, stride, kGates * hidden, inputs);
    add(to.weight_hh(layer), from + inputs * stride, stride, kGates * hidden, hidden);
    add(to.bias_ih(layer), from + (inputs + hidden) * stride, stride, kGates * hidden, 1);
    add(to.bias_hh(layer), from + (inputs + hidden) * stride, stride, kGates * hidden, 1);
  }
  for (int k = 0; k < sums.head_rows(net); ++k)
    for (int lane = 0; lane < V::kLanes; ++lane) d_weights[to.head_weight() + k] += sums.head[k * V::kLanes + lane];
}

// A tile's coordinates in one matrix.
template <int width>
struct TilePlace {
  int64_t offsets[width];
  Place place;
  int64_t start;

  TilePlace(const Matrix& matrix, int64_t stride, const int64_t* chosen, int64_t first, int count)
      : place{matrix.data, matrix.dtype, stride, nullptr}, start(first * stride) {
    if (!chosen) return;
    for (int i = 0; i < count; ++i) offsets[i] = chosen[first + i] * stride;
    place.offsets = offsets;
    start = 0;
  }
  TilePlace(const TilePlace&) = delete;  // place points into it
};

template <class V, int NV>
void unroll_backward_tile(
    const UnrollCall<typename V::Scalar>& call, int64_t first, int count, typename V::Scalar* scratch,
    double* d_weights) {
  using T = typename V::Scalar;
  constexpr int width = NV * V::kLanes;
  const Packed<T>& packed = *call.packed;
  const Network& net = packed.net;
  const UnrollArguments& arguments = *call.arguments;
  const UnrollGradients& gradients = *call.gradients;
  const int rows = net.state_rows(), kept_rows = KeptStep<T>::rows(net);
  const int64_t horizon = arguments.steps;
  const bool need_features = gradients.d_grads.data || (gradients.d_state.data && net.has_moments());

  const BackwardScratch<V> at(scratch, net, width, horizon);
  const WeightSums<V>* sums = d_weights ? &at.sums : nullptr;
  bool skip[width];
  if (sums) memset(scratch, 0, (at.d_state - scratch) * sizeof(T));

  const Matrix &grads = arguments.grads, &d_updates = gradients.d_updates;
  const TilePlace<width> of_state(arguments.state, arguments.state.row, call.chosen, first, count);
  const TilePlace<width> of_grads(grads, grads.column, call.chosen, first, count);
  const TilePlace<width> of_updates(d_updates, d_updates.column, call.chosen, first, count);
  load_rows(at.states, width, rows, of_state.place, of_state.start, arguments.state.column, count);
  for (int64_t t = 0; t < horizon; ++t) {
    const T* state = at.states + t * rows * width;
    T* new_state = at.states + (t + 1) * rows * width;
    KeptStep<T> step(at.kept + t * kept_rows * width, net, width);
    load_rows(step.grad, width, 1, of_grads.place, t * grads.row + of_grads.start, 0, count);
    const bool some = skip_not_finite<V>(net, step.grad, width, arguments.state.dtype, skip);
    for (int i = 0; i < width; ++i) step.live[i] = some && skip[i] ? T(0) : T(1);
    forward<V, NV, true>(
        packed, {step.grad,
                 state,
                 new_state,
                 width,
                 step.features,
                 step.projected,
                 at.columns,
                 step.activations,
                 step.output,
                 call.corrections[t],
                 {}});
    if (some) keep_skipped(new_state, state, skip, width, rows);
  }

  if (gradients.d_last.data) {
    const Matrix& d_last = gradients.d_last;
    load_rows(at.d_state, width, rows, coordinates(d_last), first * d_last.row, d_last.column, count);
  } else {
    memset(at.d_state, 0, rows * width * sizeof(T));
  }
  for (int64_t t = horizon - 1; t >= 0; --t) {
    KeptStep<T> step(at.kept + t * kept_rows * width, net, width);
    const T* state = at.states + t * rows * width;
    const Backward<T> tile = {state, state + rows * width, step, at.d_state, at.d_x, at.transposed};
    load_rows(at.d_update, width, 1, of_updates.place, t * d_updates.row + of_updates.start, 0, count);
    bool some = false;
    for (int i = 0; i < width; ++i) some |= skip[i] = step.live[i] == 0;
    if (some) {
      memcpy(at.passed, at.d_state, rows * width * sizeof(T));
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < width; ++i)
          if (skip[i]) at.d_state[r * width + i] = 0;
    }
    backward_head<V, NV>(packed, tile, at.d_update, sums);
    for (int layer = net.layers - 1; layer >= 0; --layer) {
      const bool need_inputs = layer > 0 || net.projection || need_features;
      backward_layer<V, NV>(packed, tile, layer, need_inputs, t > 0 || gradients.d_state.data, sums);
    }
    if (net.projection) backward_projection<V, NV>(packed, tile, sums);
    if (need_features) {
      backward_linear<V, NV>(packed, tile, at.d_update);
      backward_features<V, NV>(packed, tile, call.corrections[t], at.d_grad);
    }
    if (some) {
      keep_skipped(at.d_state, at.passed, skip, width, rows);
      for (int i = 0; i < width; ++i) at.d_grad[i] = skip[i] ? T(0) : at.d_grad[i];
    }
    const Matrix& d_grads = gradients.d_grads;
    if (d_grads.data)
      store_rows(at.d_grad, width, 1, steps(d_grads), t * d_grads.row + first * d_grads.column, 0, count, nullptr);
  }
  const Matrix& to = gradients.d_state;
  if (to.data) store_rows(at.d_state, width, rows, coordinates(to), first * to.row, to.column, count, nullptr);
  if (sums) add_sums<V>(net, *sums, d_weights);
}

}  // namespace
}  // namespace l2l
