// A tile of 32 coordinates, one for each lane of a warp, and one step of it forward.
//
// A tile's values are rows: row r of coordinate `lane` is at r * kStride + lane, in shared memory or, for networks too
// large for it, in a workspace. Warps share the units of a layer among them: unit u is warp u % warps()'s, which forms
// its four gates for all the tile's coordinates. Every thread runs every function here, and none returns early.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../element.h"
#include "../lstm_unroll.h"
#include "real.cuh"

namespace l2l {

constexpr int kWidth = device::kWarp;  // coordinates in a tile
// Rows are an odd number of 16 bytes apart: a thread may read 16 bytes of a row at a time, and the threads of a warp
// along one row or down several, without meeting a bank twice.
template <class T>
constexpr int kStride = kWidth + 16 / int(sizeof(T));
constexpr int kMaxWarps = 10, kMaxThreads = kMaxWarps * device::kWarp;
// Blocks on a multiprocessor that the registers must suffice for.
template <class T, bool on_chip>
constexpr int kMinBlocks = sizeof(T) == 4 && on_chip ? 2 : 1;

L2L_DEVICE int warp() { return threadIdx.x / device::kWarp; }
L2L_DEVICE int warps() { return blockDim.x / device::kWarp; }

// As many warps as share a layer's units evenly.
inline int warps_for(const Network& net) {
  const int rounds = (net.hidden + kMaxWarps - 1) / kMaxWarps;
  return (net.hidden + rounds - 1) / rounds;
}

// A network with the constants of its mathematics in the arithmetic's own type, written by the host.
template <class T>
struct Cell {
  Network net;
  const T* weights;
  LogSignScale<Real<T>> log_sign;
  MomentScale<Real<T>> moments;  // without the corrections, which depend on the step
  T log_beta1, log_beta2;
  T output_scale;

  static Cell of(const Network& net, const void* weights) {
    Cell cell{};
    cell.net = net;
    cell.weights = static_cast<const T*>(weights);
    auto set = [](Real<T>& to, double value) { to.v = T(value); };
    set(cell.log_sign.inverse_p, 1 / net.preprocess_p);
    set(cell.log_sign.threshold, std::exp(-net.preprocess_p));
    set(cell.log_sign.steep, std::exp(net.preprocess_p));
    set(cell.moments.beta1, net.beta1);
    set(cell.moments.beta2, net.beta2);
    set(cell.moments.rest1, 1 - net.beta1);
    set(cell.moments.rest2, 1 - net.beta2);
    set(cell.moments.eps, net.eps);
    cell.log_beta1 = T(std::log(net.beta1));
    cell.log_beta2 = T(std::log(net.beta2));
    cell.output_scale = T(net.output_scale);
    return cell;
  }

  L2L_DEVICE WeightLayout layout() const { return {net}; }

  // 1 / (1 - beta^step), from the logarithm of beta so that no digits are lost in the difference.
  L2L_DEVICE MomentScale<Real<T>> moments_at(double step) const {
    MomentScale<Real<T>> scale = moments;
    scale.correction1 = Real<T>(T(-1) / std::expm1(T(step) * log_beta1));
    scale.correction2 = Real<T>(T(-1) / std::expm1(T(step) * log_beta2));
    return scale;
  }
};

// What one thread knows of its coordinate in one step.
template <class T>
struct Gradient {
  T value;    // 0 where it is not finite
  bool live;  // whether it is finite

  // state: the dtype of the coordinate's; float32 arithmetic need not know it.
  L2L_DEVICE Gradient(const Network& net, T grad, DType state = DType::float32)
      : value(grad), live(std::fabs(grad) < T(net.gradient_limit(sizeof(T) == 8, state))) {
    if (!live) value = 0;
  }
};

// Rows of one step. None aliases another.
template <class T>
struct StepRows {
  T* state;      // [state_rows]
  T* new_state;  // [state_rows], written: the old state where the gradient is not finite
  T* features;   // [4], written
  T* projected;  // [hidden], written (with projection)
};

// The features of one step, from the new moments.
template <class T>
L2L_DEVICE void write_features(
    const Cell<T>& cell, const StepRows<T>& rows, Moments<Real<T>> now, Gradient<T> grad, double step) {
  using V = Real<T>;
  const Network& net = cell.net;
  T* feature = rows.features + device::lane();
  const V g(grad.value);
  if (net.features == Features::identity) *feature = g.v;
  if (net.has_moments()) {
    const Ratios<V> ratio = ratios(now, g, cell.moments_at(step));
    feature[0] = ratio.momentum.v;
    feature[kStride<T>] = ratio.gradient.v;
    feature += 2 * kStride<T>;
  }
  if (net.has_log_sign()) {
    const LogSign<V> pair = log_sign(g, cell.log_sign);
    feature[0] = pair.log.v;
    feature[kStride<T>] = pair.sign.v;
  }
}

// The moments of this lane's coordinate in a state; without moments nothing that is read.
template <class T>
L2L_DEVICE Moments<Real<T>> moments_of(const Network& net, const T* state) {
  using V = Real<T>;
  if (!net.has_moments()) return {V(0), V(0)};
  return {V(state[device::lane()]), V(state[kStride<T> + device::lane()])};
}

// The new moments, and the features.
template <class T>
L2L_DEVICE void forward_features(const Cell<T>& cell, const StepRows<T>& rows, Gradient<T> grad, double step) {
  using V = Real<T>;
  const int lane = device::lane();
  const Moments<V> old = moments_of(cell.net, rows.state);
  Moments<V> now = old;
  if (cell.net.has_moments()) {
    now = advance(old, V(grad.value), cell.moments);
    rows.new_state[lane] = grad.live ? now.m.v : old.m.v;
    rows.new_state[kStride<T> + lane] = grad.live ? now.v.v : old.v.v;
  }
  write_features(cell, rows, now, grad, step);
}

// sum[j] += matrix[j * matrix_stride + k] * rows[k], over k.
template <int n, class T>
L2L_DEVICE void add_products(T (&sum)[n], const T* matrix, int64_t matrix_stride, const T* rows, int count) {
  rows += device::lane();
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    const T x = rows[k * kStride<T>];
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] = std::fma(__ldg(matrix + j * matrix_stride + k), x, sum[j]);
  }
}

template <class T>
L2L_DEVICE void forward_projection(const Cell<T>& cell, const StepRows<T>& rows) {
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  const int inputs = net.inputs();
  for (int unit = warp(); unit < net.hidden; unit += warps()) {
    T sum[1] = {__ldg(cell.weights + at.projection_bias() + unit)};
    add_products(sum, cell.weights + at.projection_weight() + int64_t(unit) * inputs, 0, rows.features, inputs);
    rows.projected[unit * kStride<T> + device::lane()] = elu(Real<T>(sum[0])).v;
  }
}

// inputs: the layer's own [layer_inputs], not in the rows that it writes.
template <class T>
L2L_DEVICE void forward_layer(
    const Cell<T>& cell, const StepRows<T>& rows, int layer, const T* inputs, Gradient<T> grad) {
  using V = Real<T>;
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  const int lane = device::lane(), hidden = net.hidden, count = net.layer_inputs(layer);
  const T* h = rows.state + net.h_row(layer) * kStride<T>;
  const T* bias_ih = cell.weights + at.bias_ih(layer);
  const T* bias_hh = cell.weights + at.bias_hh(layer);
  for (int unit = warp(); unit < hidden; unit += warps()) {
    T z[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) z[g] = __ldg(bias_ih + g * hidden + unit) + __ldg(bias_hh + g * hidden + unit);
    const int64_t row = unit;
    add_products(z, cell.weights + at.weight_ih(layer) + row * count, int64_t(hidden) * count, inputs, count);
    add_products(z, cell.weights + at.weight_hh(layer) + row * hidden, int64_t(hidden) * hidden, h, hidden);
    V scaled[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) scaled[g] = V(z[g] * T(gate_scale(g)));

    const int h_at = (net.h_row(layer) + unit) * kStride<T> + lane;
    const int c_at = (net.c_row(layer) + unit) * kStride<T> + lane;
    const V c(rows.state[c_at]);
    const V c_new = lstm_c(scaled[kInput], scaled[kForget], scaled[kCell], c);
    const V h_new = lstm_h(scaled[kOutput], c_new);
    rows.new_state[c_at] = grad.live ? c_new.v : c.v;
    rows.new_state[h_at] = grad.live ? h_new.v : rows.state[h_at];
  }
}

// Whether this lane's y is 0 for want of any gradient.
template <class T>
L2L_DEVICE bool unmoved(const Network& net, const StepRows<T>& rows) {
  return net.has_moments() && unmoved(Real<T>(rows.new_state[kStride<T> + device::lane()]));
}

// y, of head and linear path, of this lane's coordinate (after tanh, with output "tanh"). The lane itself has written
// its features.
template <class T>
L2L_DEVICE T forward_head(const Cell<T>& cell, const StepRows<T>& rows) {
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  T y[1] = {__ldg(cell.weights + at.head_bias())};
  const T* h = rows.new_state + net.h_row(net.layers - 1) * kStride<T>;
  add_products(y, cell.weights + at.head_weight(), 0, h, net.hidden);
  if (net.linear_path) add_products(y, cell.weights + at.linear_weight(), 0, rows.features, net.inputs());
  if (net.tanh_output) y[0] = tanh_of(Real<T>(y[0])).v;
  return unmoved(net, rows) ? T(0) : y[0];
}

// From rows.state to rows.new_state. The threads must have met since others than forward wrote the state; all of them
// may read what it wrote when it returns.
template <class T>
L2L_DEVICE void forward(const Cell<T>& cell, const StepRows<T>& rows, Gradient<T> grad, double step) {
  const Network& net = cell.net;
  if (warp() == 0) forward_features(cell, rows, grad, step);
  __syncthreads();
  const T* inputs = rows.features;
  if (net.projection) {
    forward_projection(cell, rows);
    __syncthreads();
    inputs = rows.projected;
  }
  for (int layer = 0; layer < net.layers; ++layer) {
    forward_layer(cell, rows, layer, inputs, grad);
    __syncthreads();
    inputs = rows.new_state + net.h_row(layer) * kStride<T>;
  }
}

// ---------------------------------------------------------------- memory

// Element `index` of an array of any dtype.
template <class T>
L2L_DEVICE T load(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32: return T(static_cast<const float*>(data)[index]);
    case DType::bfloat16: return T(widen(static_cast<const BFloat16*>(data)[index]));
    case DType::float16: return T(widen(static_cast<const Half*>(data)[index]));
    default: return T(static_cast<const double*>(data)[index]);
  }
}

template <class T>
L2L_DEVICE void store(void* data, DType dtype, int64_t index, T value) {
  switch (dtype) {
    case DType::float32: return narrow(value, static_cast<float*>(data)[index]);
    case DType::bfloat16: return narrow(value, static_cast<BFloat16*>(data)[index]);
    case DType::float16: return narrow(value, static_cast<Half*>(data)[index]);
    default: return narrow(value, static_cast<double*>(data)[index]);
  }
}

// Adds in the wider of the dtype and T.
template <class T>
L2L_DEVICE void add(void* data, DType dtype, int64_t index, T value) {
  auto add_to = [&](auto& x) { narrow(widen(x) + value, x); };
  switch (dtype) {
    case DType::float32: return add_to(static_cast<float*>(data)[index]);
    case DType::bfloat16: return add_to(static_cast<BFloat16*>(data)[index]);
    case DType::float16: return add_to(static_cast<Half*>(data)[index]);
    default: return add_to(static_cast<double*>(data)[index]);
  }
}

// Of a matrix in the arithmetic's own type.
template <class T>
L2L_DEVICE T& element(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<T*>(matrix.data)[row * matrix.row + column * matrix.column];
}

// Rows of this lane's coordinate, which lies at `start` and has rows `row` elements apart. Warps share the rows, always
// in the same way; where `inside` is false the tile gets zeros, or memory nothing.
template <class T>
L2L_DEVICE void load_rows(
    T* to, int rows, const void* data, DType dtype, int64_t start, int64_t row, bool inside) {
  for (int r = warp(); r < rows; r += warps())
    to[r * kStride<T> + device::lane()] = inside ? load<T>(data, dtype, start + r * row) : T(0);
}

template <class T>
L2L_DEVICE void store_rows(
    const T* from, int rows, void* data, DType dtype, int64_t start, int64_t row, bool inside) {
  for (int r = warp(); r < rows; r += warps())
    if (inside) store(data, dtype, start + r * row, from[r * kStride<T> + device::lane()]);
}

// ---------------------------------------------------------------- where the rows lie

// Rows of forward(): two states, features, projected (with projection).
inline int64_t forward_rows(const Network& net) {
  return 2 * int64_t(net.state_rows()) + 4 + (net.projection ? net.hidden : 0);
}

// StepRows over forward_rows() rows that begin at `at`.
template <class T>
L2L_DEVICE StepRows<T> forward_step_rows(const Network& net, T* at) {
  T* second = at + net.state_rows() * kStride<T>;
  T* features = second + net.state_rows() * kStride<T>;
  return {at, second, features, features + 4 * kStride<T>};
}

L2L_HOST_DEVICE int64_t tiles_of(int64_t count) { return (count + kWidth - 1) / kWidth; }

// Scratch of each block: in shared memory where it fits, otherwise in a workspace, which bounds the number of blocks.
// Blocks take tiles in turn, so that there need be no more of them than can be at work.
struct Scratch {
  static constexpr int64_t kBytes = int64_t(256) << 20;
  static constexpr int64_t kBlocksEach = 8;  // on a multiprocessor
  int64_t each;  // bytes, a multiple of 16

  bool on_chip() const { return each <= device::shared_limit(); }
  int64_t blocks(int64_t tiles) const {
    const int64_t useful = kBlocksEach * device::multiprocessors();
    return std::min({tiles, useful, on_chip() ? useful : std::max<int64_t>(1, kBytes / each)});
  }
  int64_t workspace(int64_t tiles) const { return on_chip() ? 0 : each * blocks(tiles); }
};

template <class T>
Scratch scratch_of(int64_t scalars) {
  return {(scalars * int64_t(sizeof(T)) + 15) / 16 * 16};
}

// This block's scratch.
template <bool on_chip, class T>
L2L_DEVICE T* scratch_at(void* workspace, int64_t each) {
  if constexpr (on_chip) return reinterpret_cast<T*>(device::shared_memory());
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + blockIdx.x * each);
}

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace l2l
