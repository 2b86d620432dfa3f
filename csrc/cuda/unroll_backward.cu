// Backward through time. A block runs a tile forward once, leaving the state before every step in the workspace; then,
// from the last step to the first, it runs the step again, now keeping its activations in scratch, and backward.
//
// The gradient of the weights is summed in a fixed order: a tile's coordinates and steps in scratch, each element by
// one thread; a block's tiles, which follow from the block's number alone, in its slab of the workspace; the slabs by
// a second kernel.
#include "../lstm_unroll.h"
#include "tile.cuh"

namespace l2l {
namespace {

constexpr int64_t kBlocks = 512;                       // their number decides the order of sums: the same on every GPU
constexpr int64_t kStatesBytes = int64_t(256) << 20;   // states of all blocks, but no fewer than
constexpr int64_t kFewBlocks = 32;

template <class T>
struct BackwardCall {
  Cell<T> cell;
  UnrollArguments arguments;
  UnrollGradients gradients;
  T* states;         // a block: [steps][state_rows][kWidth]
  double* slabs;     // a block: [WeightLayout::count()]
  void* workspace;   // scratch, where it is not on chip
  int64_t scratch;   // bytes of each block's
};

// A block's scratch: rows, then sums over the tile in the order of the flat weight vector.
template <class T>
struct BackwardRows {
  StepRows<T> step;
  T* d_state;  // [state_rows]: gradient of the new state on entry to a step, of the old one on return
  T* d_x;      // [max(hidden, 4)]: gradient of what leaves or enters a layer
  T* d_y;      // [1]: gradient of the head's sum
  T* sums;     // [WeightLayout::count()]

  static int64_t scalars(const Network& net) {
    const int64_t activations = int64_t(StepRows<T>::kActivations) * net.hidden * net.layers;
    const int64_t rows = forward_rows(net) + activations + net.state_rows() + std::max(net.hidden, 4) + 1;
    return rows * kStride + WeightLayout{net}.count();
  }
  L2L_DEVICE BackwardRows(const Network& net, T* at) : step(forward_step_rows(net, at)) {
    step.activations = step.projected + net.hidden * kStride;
    d_state = step.activations + StepRows<T>::kActivations * net.hidden * net.layers * kStride;
    d_x = d_state + net.state_rows() * kStride;
    d_y = d_x + (net.hidden > 4 ? net.hidden : 4) * kStride;
    sums = d_y + kStride;
  }
};

// ---------------------------------------------------------------- products

// to[k] = sum over r of matrix[r * columns + k] * d[r], where this lane's gradient is finite.
template <class T>
L2L_DEVICE void multiply_transposed(T* to, const T* matrix, const T* d, int rows, int columns, bool live) {
  const int lane = device::lane();
  for (int k = 2 * warp(); k < columns; k += 2 * warps()) {
    const int64_t second = k + 1 < columns;  // the odd last one is formed twice
    T sum[2] = {0, 0};
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      const T x = d[r * kStride + lane];
      const T* w = matrix + int64_t(r) * columns + k;
      sum[0] = std::fma(__ldg(w), x, sum[0]);
      sum[1] = std::fma(__ldg(w + second), x, sum[1]);
    }
    if (live) {
      to[k * kStride + lane] = sum[0];
      if (second) to[(k + 1) * kStride + lane] = sum[1];
    }
  }
}

// sums[(j * units + unit) * columns + k] += sum over the tile's coordinates of d[j * units + unit] x[k], j < n. A
// thread takes one unit and two columns, far apart, so that the threads of a warp read neighbouring rows.
template <int n, class T>
L2L_DEVICE void add_outer(T* sums, const T* d, int units, const T* x, int columns) {
  const int half = (columns + 1) / 2;
  for (int i = threadIdx.x; i < units * half; i += blockDim.x) {
    const int unit = i / half, k = i - unit * half;
    const bool second = k + half < columns;
    const T *left = d + unit * kStride, *first_x = x + k * kStride;
    const T* second_x = second ? first_x + half * kStride : first_x;
    T sum[n][2] = {};
#pragma unroll 2
    for (int c = 0; c < kWidth; ++c) {
      const T a = first_x[c], b = second_x[c];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const T of_d = left[j * units * kStride + c];
        sum[j][0] = std::fma(of_d, a, sum[j][0]);
        sum[j][1] = std::fma(of_d, b, sum[j][1]);
      }
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
      T* to = sums + int64_t(j * units + unit) * columns + k;
      to[0] += sum[j][0];
      if (second) to[half] += sum[j][1];
    }
  }
}

// sums[r] += sum over the tile's coordinates of d[r], and into twin where it is not null.
template <class T>
L2L_DEVICE void add_row_sums(T* sums, T* twin, const T* d, int rows) {
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    T sum = 0;
    for (int c = 0; c < kWidth; ++c) sum += d[r * kStride + c];
    sums[r] += sum;
    if (twin) twin[r] += sum;
  }
}

// ---------------------------------------------------------------- one step back

// What is asked for.
struct Needs {
  bool weights;
  bool features;  // gradients of the features, and what follows from them
  bool state;     // the gradient of the state before this step
};

// From d_y to d_x, the gradient of the top layer's h.
template <class T>
L2L_DEVICE void backward_head(const Cell<T>& cell, const BackwardRows<T>& rows, Needs need) {
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  const int lane = device::lane();
  for (int k = warp(); k < net.hidden; k += warps())
    rows.d_x[k * kStride + lane] = __ldg(cell.weights + at.head_weight() + k) * rows.d_y[lane];
  if (!need.weights) return;
  const T* top = rows.step.new_state + net.h_row(net.layers - 1) * kStride;
  add_outer<1>(rows.sums + at.head_weight(), rows.d_y, 1, top, net.hidden);
  add_row_sums(rows.sums + at.head_bias(), static_cast<T*>(nullptr), rows.d_y, 1);
}

// The activations of the gates give way to the gates' gradients. Of d_x and d_state a thread reads what it wrote, or
// what was written before the last barrier.
template <class T>
L2L_DEVICE void backward_gates(const Cell<T>& cell, const BackwardRows<T>& rows, int layer, bool live) {
  using V = Real<T>;
  const Network& net = cell.net;
  const int lane = device::lane(), hidden = net.hidden, gate = hidden * kStride;
  for (int unit = warp(); unit < hidden; unit += warps()) {
    T* a = rows.step.activations + (layer * StepRows<T>::kActivations * hidden + unit) * kStride + lane;
    const int h_at = (net.h_row(layer) + unit) * kStride + lane, c_at = (net.c_row(layer) + unit) * kStride + lane;
    const Activations<V> kept = {
        V(a[kInput * gate]), V(a[kForget * gate]), V(a[kCell * gate]), V(a[kOutput * gate]), V(a[kGates * gate])};
    const UnitGradient<V> d = lstm_unit_backward(
        V(rows.d_x[unit * kStride + lane] + rows.d_state[h_at]), V(rows.d_state[c_at]), V(rows.step.state[c_at]), kept);
    // Not a product with `live`: the gradient of a coordinate that this step skips may be anything.
#pragma unroll
    for (int g = 0; g < kGates; ++g) a[g * gate] = live ? d.gates[g].v : T(0);
    if (live) rows.d_state[c_at] = d.c.v;
  }
}

// From the gates' gradients to those of the layer's inputs (d_x), of its h before the step and of its weights.
template <class T>
L2L_DEVICE void backward_layer(const Cell<T>& cell, const BackwardRows<T>& rows, int layer, bool live, Needs need) {
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  const int hidden = net.hidden, gates = kGates * hidden, count = net.layer_inputs(layer);
  const T* d = rows.step.activations + layer * StepRows<T>::kActivations * hidden * kStride;
  if (layer > 0 || net.projection || need.features)
    multiply_transposed(rows.d_x, cell.weights + at.weight_ih(layer), d, gates, count, true);
  if (need.state) {
    T* d_h = rows.d_state + net.h_row(layer) * kStride;
    multiply_transposed(d_h, cell.weights + at.weight_hh(layer), d, gates, hidden, live);
  }
  if (!need.weights) return;
  const T* inputs = layer > 0        ? rows.step.new_state + net.h_row(layer - 1) * kStride
                    : net.projection ? rows.step.projected
                                     : rows.step.features;
  add_outer<kGates>(rows.sums + at.weight_ih(layer), d, hidden, inputs, count);
  add_outer<kGates>(
      rows.sums + at.weight_hh(layer), d, hidden, rows.step.state + net.h_row(layer) * kStride, hidden);
  add_row_sums(rows.sums + at.bias_ih(layer), rows.sums + at.bias_hh(layer), d, gates);
}

// From the gradient of the projected features, in d_x, to that of the features. Its threads meet once.
template <class T>
L2L_DEVICE void backward_projection(const Cell<T>& cell, const BackwardRows<T>& rows, Needs need) {
  const Network& net = cell.net;
  const WeightLayout at = cell.layout();
  T* d = rows.step.projected;
  for (int unit = warp(); unit < net.hidden; unit += warps()) {
    const int i = unit * kStride + device::lane();
    d[i] = rows.d_x[i] * elu_slope(Real<T>(d[i])).v;
  }
  __syncthreads();
  multiply_transposed(rows.d_x, cell.weights + at.projection_weight(), d, net.hidden, net.inputs(), true);
  if (!need.weights) return;
  add_outer<1>(rows.sums + at.projection_weight(), d, net.hidden, rows.step.features, net.inputs());
  add_row_sums(rows.sums + at.projection_bias(), static_cast<T*>(nullptr), d, net.hidden);
}

// From the gradient of the features, in d_x, to that of the gradient, which is returned, and of the moments.
template <class T>
L2L_DEVICE T backward_features(
    const Cell<T>& cell, const BackwardRows<T>& rows, const Gradient<T>& gradient, double step) {
  using V = Real<T>;
  const Network& net = cell.net;
  const int lane = device::lane();
  const V grad(gradient.value);
  const T* d = rows.d_x + lane;
  V sum(0);
  if (net.features == Features::identity) sum = V(*d);
  if (net.has_moments()) {
    T *m = rows.d_state + lane, *v = m + kStride;
    const T* now = rows.step.new_state + lane;
    Moments<V> d_moments = {V(*m), V(*v)};
    sum = moments_backward<V>(
        {V(d[0]), V(d[kStride])}, d_moments, {V(now[0]), V(now[kStride])}, grad, cell.moments_at(step));
    if (gradient.live) {
      *m = d_moments.m.v;
      *v = d_moments.v.v;
    }
    d += 2 * kStride;
  }
  if (net.has_log_sign()) sum = sum + log_sign_backward(V(d[0]), V(d[kStride]), grad, cell.log_sign);
  return gradient.live ? sum.v : T(0);
}

// ---------------------------------------------------------------- kernels

template <class T, bool on_chip>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, on_chip>)
    backward_kernel(const __grid_constant__ BackwardCall<T> call) {
  const Cell<T>& cell = call.cell;
  const Network& net = cell.net;
  const UnrollArguments& arguments = call.arguments;
  const UnrollGradients& gradients = call.gradients;
  const int lane = device::lane(), state_rows = net.state_rows(), weights = int(cell.layout().count());
  const int64_t horizon = arguments.steps, tiles = tiles_of(arguments.count);
  const double first_step = read(arguments.first_step);
  const BackwardRows<T> rows(net, scratch_at<on_chip, T>(call.workspace, call.scratch));
  T* const states = call.states + blockIdx.x * horizon * state_rows * kWidth;
  double* const slab = call.slabs + int64_t(blockIdx.x) * weights;
  Needs need;
  need.weights = gradients.d_weights != nullptr;
  need.features = gradients.d_grads.data || (gradients.d_state.data && net.has_moments());

  const int64_t begin = blockIdx.x * tiles / gridDim.x, end = (blockIdx.x + int64_t(1)) * tiles / gridDim.x;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t i = tile * kWidth + lane;
    const bool inside = i < arguments.count;
    auto gradient_at = [&](int64_t t) {
      return Gradient<T>(inside ? element<T>(arguments.grads, t, i) : T(0), arguments.state.dtype);
    };

    // Forward, all steps but the last.
    StepRows<T> step = rows.step;
    step.activations = nullptr;
    const Matrix& first = arguments.state;
    load_rows(step.state, state_rows, first.data, first.dtype, i * first.row, first.column, inside);
    for (int64_t t = 0; t < horizon; ++t) {
      for (int r = warp(); r < state_rows; r += warps())
        states[(t * state_rows + r) * kWidth + lane] = step.state[r * kStride + lane];
      if (t + 1 == horizon) break;
      __syncthreads();
      forward(cell, step, gradient_at(t), first_step + double(t));
      T* spent = step.state;
      step.state = step.new_state;
      step.new_state = spent;
    }

    // Backward.
    const Matrix& d_last = gradients.d_last;
    load_rows(
        rows.d_state, state_rows, d_last.data, d_last.dtype, i * d_last.row, d_last.column, inside && d_last.data);
    if (need.weights)
      for (int k = threadIdx.x; k < weights; k += blockDim.x) rows.sums[k] = 0;
    for (int64_t t = horizon - 1; t >= 0; --t) {
      need.state = t > 0 || gradients.d_state.data;
      const Gradient<T> gradient = gradient_at(t);
      const double number = first_step + double(t);
      for (int r = warp(); r < state_rows; r += warps())
        rows.step.state[r * kStride + lane] = states[(t * state_rows + r) * kWidth + lane];
      __syncthreads();
      forward(cell, rows.step, gradient, number);
      if (warp() == 0) {
        const Real<T> one(1), y(net.tanh_output ? forward_head(cell, rows.step) : T(0));
        const bool moves = inside && gradient.live && !unmoved(net, rows.step);
        const Real<T> d_u(moves ? element<T>(gradients.d_updates, t, i) : T(0));
        rows.d_y[lane] = (Real<T>(cell.output_scale) * d_u * (one - y * y)).v;
      }
      __syncthreads();
      backward_head(cell, rows, need);
      for (int layer = net.layers - 1; layer >= 0; --layer) {
        backward_gates(cell, rows, layer, gradient.live);
        __syncthreads();
        backward_layer(cell, rows, layer, gradient.live, need);
        __syncthreads();
      }
      if (net.projection) {
        backward_projection(cell, rows, need);
        __syncthreads();
      }
      if (need.features && warp() == 0) {
        const T d_grad = backward_features(cell, rows, gradient, number);
        if (inside && gradients.d_grads.data) element<T>(gradients.d_grads, t, i) = d_grad;
      }
    }
    __syncthreads();
    const Matrix& d_state = gradients.d_state;
    store_rows(
        rows.d_state, state_rows, d_state.data, d_state.dtype, i * d_state.row, d_state.column,
        inside && d_state.data);
    if (need.weights)
      for (int k = threadIdx.x; k < weights; k += blockDim.x)
        slab[k] = (tile > begin ? slab[k] : 0) + double(rows.sums[k]);
  }
}

constexpr int kSumWarps = 8;

// The slabs' sum, one lane for each weight: every warp adds up each kSumWarps-th slab, the first warp their sums.
template <class T>
__global__ void __launch_bounds__(kSumWarps* device::kWarp)
    sum_slabs(T* d_weights, const double* slabs, int64_t weights, int64_t count) {
  double* sums = reinterpret_cast<double*>(device::shared_memory());  // [kSumWarps][32]
  const int64_t k = int64_t(blockIdx.x) * device::kWarp + device::lane();
  double sum = 0;
  if (k < weights)
    for (int64_t slab = warp(); slab < count; slab += kSumWarps) sum += slabs[slab * weights + k];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp() != 0 || k >= weights) return;
  double total = 0;
  for (int w = 0; w < kSumWarps; ++w) total += sums[w * device::kWarp + device::lane()];
  d_weights[k] = T(total);
}

// ---------------------------------------------------------------- launchers

// The workspace: states of all blocks, slabs, scratch.
template <class T>
struct Plan {
  Scratch scratch;
  int64_t blocks, states, slabs;  // bytes of the last two

  Plan(const UnrollArguments& arguments, const UnrollGradients& gradients)
      : scratch(scratch_of<T>(BackwardRows<T>::scalars(arguments.net))) {
    const Network& net = arguments.net;
    const int64_t each = arguments.steps * net.state_rows() * kWidth * int64_t(sizeof(T));
    const int64_t most = std::max(kFewBlocks, kStatesBytes / std::max<int64_t>(each, 1));
    // Not scratch.blocks(): whether a GPU has room for the scratch must not decide the order of sums.
    blocks = std::min({tiles_of(arguments.count), kBlocks, most, std::max(kFewBlocks, Scratch::kBytes / scratch.each)});
    states = (blocks * each + 15) / 16 * 16;
    slabs = gradients.d_weights ? blocks * WeightLayout{net}.count() * int64_t(sizeof(double)) : 0;
  }
  int64_t bytes() const { return states + slabs + (scratch.on_chip() ? 0 : blocks * scratch.each); }
};

template <class T>
void unroll_backward(
    const UnrollArguments& arguments, const UnrollGradients& gradients, void* workspace, cudaStream_t stream) {
  const Network& net = arguments.net;
  const Plan<T> plan(arguments, gradients);
  char* const at = static_cast<char*>(workspace);
  const BackwardCall<T> call = {
      Cell<T>::of(net, arguments.weights),
      arguments,
      gradients,
      reinterpret_cast<T*>(at),
      reinterpret_cast<double*>(at + plan.states),
      at + plan.states + plan.slabs,
      plan.scratch.each};
  const bool on_chip = plan.scratch.on_chip();
  if (plan.blocks > 0) {
    const auto kernel = on_chip ? backward_kernel<T, true> : backward_kernel<T, false>;
    const dim3 grid(unsigned(plan.blocks)), block(unsigned(warps_for(net) * device::kWarp));
    check(
        device::launch(kernel, grid, block, on_chip ? size_t(plan.scratch.each) : 0, stream, call),
        "lstm_unroll_backward");
  }
  if (!gradients.d_weights) return;
  const int64_t weights = WeightLayout{net}.count();
  constexpr int threads = kSumWarps * device::kWarp;
  check(
      device::launch(
          sum_slabs<T>, dim3(unsigned((weights + device::kWarp - 1) / device::kWarp)), dim3(threads),
          threads * sizeof(double), stream, static_cast<T*>(gradients.d_weights), call.slabs, weights, plan.blocks),
      "lstm_unroll_backward");
}

}  // namespace

int64_t lstm_unroll_backward_cuda_workspace(const UnrollArguments& arguments, const UnrollGradients& gradients) {
  if (arguments.weights_dtype == DType::float64) return Plan<double>(arguments, gradients).bytes();
  return Plan<float>(arguments, gradients).bytes();
}

void lstm_unroll_backward_cuda(
    const UnrollArguments& arguments, const UnrollGradients& gradients, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.weights_dtype == DType::float64) return unroll_backward<double>(arguments, gradients, workspace, on);
  unroll_backward<float>(arguments, gradients, workspace, on);
}

}  // namespace l2l
