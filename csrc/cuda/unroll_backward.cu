// Backward through time. A block runs a tile forward once, leaving the state before every step in the workspace; then,
// from the last step to the first, it forms the activations again, layer by layer, and goes back through them. The
// states before and after a step are known by then, so that layers wait for each other only on the way back.
//
// The gradient of the weights is summed in a fixed order: a tile's coordinates and steps in scratch, each element by
// one thread; a block's tiles, which follow from the block's number alone, in its slab of the workspace; the slabs by
// a second kernel.
#include "../lstm_unroll.h"
#include "backward_products.cuh"

namespace l2l {
namespace {

constexpr int64_t kBlocks = 512;                       // their number decides the order of sums: the same on every GPU
constexpr int64_t kStatesBytes = int64_t(256) << 20;   // states of all blocks, but no fewer than
constexpr int64_t kFewBlocks = 32;

// What of a block's scratch is in shared memory: what is not is in the workspace.
enum class OnChip { all, rows, nothing };

template <class T>
struct BackwardCall {
  Cell<T> cell;
  UnrollArguments arguments;
  UnrollGradients gradients;
  T* states;               // a block: [steps][state_rows][kWidth]
  double* slabs;           // a block: [Packing::count()]
  void* workspace;         // scratch that is not on chip
  int64_t rows, weights;   // bytes of each block's
};

// A block's scratch: rows and the sums over the tile; the weights, which may lie elsewhere.
template <class T>
struct BackwardRows {
  StepRows<T> step;
  T* gates;    // [layers][kGates][hidden]: gradients of the pre-activations
  T* d_state;  // [state_rows]: gradient of the new state on entry to a step, of the old one on return
  T* d_x;      // [max(hidden, 4)]: gradient of what leaves or enters a layer
  T* d_y;      // [1]: gradient of y's sum, before tanh
  T* sums;     // [Packing::count()], in its order
  T* weights;  // [Packing::count()], in its order
  T* next;     // [state_rows]: the state that the next step back begins with, on its way here
  int warps;   // warps(), or a constant

  static int64_t scalars(const Network& net) {
    const int64_t gates = int64_t(kGates) * net.hidden * net.layers;
    const int64_t rows = forward_rows(net) + gates + 2 * net.state_rows() + std::max(net.hidden, 4) + 1;
    return rows * kStride<T> + Packing{net}.padded();
  }
  L2L_DEVICE BackwardRows(const Network& net, T* at, T* weights, int warps)
      : step(forward_step_rows(net, at)), weights(weights), warps(warps) {
    gates = step.projected + (net.projection ? net.hidden * kStride<T> : 0);
    d_state = gates + kGates * net.hidden * net.layers * kStride<T>;
    next = d_state + net.state_rows() * kStride<T>;
    d_x = next + net.state_rows() * kStride<T>;
    d_y = d_x + (net.hidden > 4 ? net.hidden : 4) * kStride<T>;
    sums = d_y + kStride<T>;
  }
  L2L_DEVICE T* gates_of(const Network& net, int layer) const {
    return gates + layer * kGates * net.hidden * kStride<T>;
  }
  L2L_DEVICE const T* inputs(const Network& net, int layer) const {
    if (layer > 0) return step.new_state + net.h_row(layer - 1) * kStride<T>;
    return net.projection ? step.projected : step.features;
  }
};

// As many warps as share a layer's units, two at a time, evenly.
L2L_HOST_DEVICE constexpr int backward_warps(int hidden) {
  const int pairs = (hidden + 1) / 2, rounds = (pairs + kMaxWarps - 1) / kMaxWarps;
  return (pairs + rounds - 1) / rounds;
}

// Deals tasks of several kinds to the threads in turn: where one kind ends, at a warp, the next begins.
class Deal {
 public:
  L2L_DEVICE explicit Deal(int warps) : next_(threadIdx.x), threads_(warps * device::kWarp) {}
  // This thread's first task of `tasks`; its others follow as far apart as there are threads.
  L2L_DEVICE int take(int tasks) {
    const int first = next_;
    next_ -= (tasks + device::kWarp - 1) / device::kWarp * device::kWarp;
    while (next_ < 0) next_ += threads_;
    return first;
  }

 private:
  int next_, threads_;
};

// ---------------------------------------------------------------- states

// Calls each(row's place in a state, in saved ones) for this thread's part of a state's rows, 16 bytes after 16 bytes.
// A thread always has the same part.
template <class T, class Each>
L2L_DEVICE void for_each_part(int rows, int warps, const Each& each) {
  constexpr int kPart = 16 / int(sizeof(T)), kParts = kWidth / kPart;
  for (int i = threadIdx.x; i < rows * kParts; i += warps * device::kWarp)
    each(i / kParts * kStride<T> + i % kParts * kPart, i * kPart);
}

// Saved states are [state_rows][kWidth].
template <class T>
L2L_DEVICE void save_state(T* saved, const T* state, int rows, int warps) {
  for_each_part<T>(rows, warps, [&](int here, int there) { put(saved + there, take<16 / sizeof(T)>(state + here)); });
}

// Sends for a saved state; it may be read when all threads have called states_landed and met.
template <OnChip kOnChip, class T>
L2L_DEVICE void send_for_state(T* state, const T* saved, int rows, int warps) {
  for_each_part<T>(rows, warps, [&](int here, int there) {
    if constexpr (kOnChip == OnChip::nothing)
      put(state + here, take<16 / sizeof(T)>(saved + there));
    else
      device::copy_16(state + here, saved + there);
  });
  if constexpr (kOnChip != OnChip::nothing) device::copies_end();
}

template <OnChip kOnChip>
L2L_DEVICE void states_landed() {
  if constexpr (kOnChip != OnChip::nothing) device::copies_landed<0>();
}

// ---------------------------------------------------------------- one step forward

template <class T>
L2L_DEVICE void advance_layer(const Cell<T>& cell, const BackwardRows<T>& rows, int layer, uint32_t live) {
  using V = Real<T>;
  const Network& net = cell.net;
  const T* inputs = rows.inputs(net, layer);
  for (int pair = warp(); 2 * pair < net.hidden; pair += rows.warps) {
    const GatePlace at(pair);
    T z[kGates][2];
    sum_gates(z, net, rows.weights, layer, at, inputs, rows.step.state + net.h_row(layer) * kStride<T>);
    if (at.unit >= net.hidden) continue;
    const int h_at = (net.h_row(layer) + at.unit) * kStride<T> + at.coordinate;
    const int c_at = (net.c_row(layer) + at.unit) * kStride<T> + at.coordinate;
    Several<T, 2> h = take<2>(rows.step.state + h_at), c = take<2>(rows.step.state + c_at);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      auto scaled = [&](int gate) { return V(z[gate][j] * T(gate_scale(gate))); };
      const V c_new = lstm_c(scaled(kInput), scaled(kForget), scaled(kCell), V(c.v[j]));
      const V h_new = lstm_h(scaled(kOutput), c_new);
      if (live >> (at.coordinate + j) & 1) {
        c.v[j] = c_new.v;
        h.v[j] = h_new.v;
      }
    }
    put(rows.step.new_state + h_at, h);
    put(rows.step.new_state + c_at, c);
  }
}

// From the state to the new one, as forward() with the block's own copy of the weights.
template <class T>
L2L_DEVICE void advance_state(
    const Cell<T>& cell, const BackwardRows<T>& rows, const Gradient<T>& gradient, double step) {
  const Network& net = cell.net;
  if (warp() == 0) forward_features(cell, rows.step, gradient, step);
  __syncthreads();
  if (net.projection) {
    forward_projection(cell, rows.step);
    __syncthreads();
  }
  const uint32_t live = device::ballot(gradient.live);
  for (int layer = 0; layer < net.layers; ++layer) {
    advance_layer(cell, rows, layer, live);
    __syncthreads();
  }
}

// ---------------------------------------------------------------- one step back

// What is asked for.
struct Needs {
  bool weights;
  bool features;  // gradients of the features, and what follows from them
  bool state;     // the gradient of the state before this step
};

// The activations of a layer and, from d_x and d_state (of the top layer: d_y and d_state), the gates' gradients and
// d_state's c. Of d_state's c a thread has the same coordinates in every step; all else was written before the last
// barrier.
template <class T>
L2L_DEVICE void backward_gates(const Cell<T>& cell, const BackwardRows<T>& rows, int layer, uint32_t live) {
  using V = Real<T>;
  const Network& net = cell.net;
  const int hidden = net.hidden;
  const bool top = layer + 1 == net.layers;
  const T* inputs = rows.inputs(net, layer);
  for (int pair = warp(); 2 * pair < hidden; pair += rows.warps) {
    const GatePlace at(pair);
    T z[kGates][2];
    sum_gates(z, net, rows.weights, layer, at, inputs, rows.step.state + net.h_row(layer) * kStride<T>);
    if (at.unit >= hidden) continue;
    const int h_at = (net.h_row(layer) + at.unit) * kStride<T> + at.coordinate;
    const int c_at = (net.c_row(layer) + at.unit) * kStride<T> + at.coordinate;
    const T from_head = top ? rows.weights[Packing{net}.head_weight() + at.unit] : T(1);
    const Several<T, 2> above = take<2>((top ? rows.d_y : rows.d_x + at.unit * kStride<T>) + at.coordinate);
    const Several<T, 2> d_h = take<2>(rows.d_state + h_at), c = take<2>(rows.step.state + c_at);
    Several<T, 2> d_c = take<2>(rows.d_state + c_at), gates[kGates];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      auto scaled = [&](int gate) { return V(z[gate][j] * T(gate_scale(gate))); };
      Activations<V> kept;
      const V c_new = lstm_c(scaled(kInput), scaled(kForget), scaled(kCell), V(c.v[j]), kept);
      lstm_h(scaled(kOutput), c_new, kept);
      const V d_out(std::fma(from_head, above.v[j], d_h.v[j]));
      const UnitGradient<V> d = lstm_unit_backward(d_out, V(d_c.v[j]), V(c.v[j]), kept);
      // Not a product with `live`: the gradient of a coordinate that this step skips may be anything.
      const bool lives = live >> (at.coordinate + j) & 1;
#pragma unroll
      for (int g = 0; g < kGates; ++g) gates[g].v[j] = lives ? d.gates[g].v : T(0);
      if (lives) d_c.v[j] = d.c.v;
    }
    T* const to = rows.gates_of(net, layer) + at.unit * kStride<T> + at.coordinate;
#pragma unroll
    for (int g = 0; g < kGates; ++g) put(to + g * hidden * kStride<T>, gates[g]);
    put(rows.d_state + c_at, d_c);
  }
}

// From the gates' gradients to those of the layer's inputs (d_x) and of its h before the step.
template <class T>
L2L_DEVICE void backward_inputs(
    const Cell<T>& cell, const BackwardRows<T>& rows, int layer, uint32_t live, Needs need, Deal& deal) {
  const Network& net = cell.net;
  const int hidden = net.hidden, count = net.layer_inputs(layer);
  const bool inputs = layer > 0 || net.projection || need.features;
  const int of_inputs = inputs ? (count + 3) / 4 : 0, tasks = of_inputs + (need.state ? (hidden + 3) / 4 : 0);
  const T* weights = rows.weights + Packing{net}.layer(layer);
  T* const d_h = rows.d_state + net.h_row(layer) * kStride<T>;
  for (int task = deal.take(tasks * device::kWarp) / device::kWarp; task < tasks; task += rows.warps) {
    const bool h = task >= of_inputs;
    const int first = 4 * (h ? task - of_inputs : task);
    multiply_transposed(
        h ? d_h : rows.d_x, weights + (h ? (count + 1) * hidden * kGates : 0), rows.gates_of(net, layer), hidden, first,
        h ? hidden : count, h ? live : 0xffffffffu);
  }
}

// What the step adds to the gradient of every weight but the projection's.
template <class T>
L2L_DEVICE void add_weight_gradients(const Cell<T>& cell, const BackwardRows<T>& rows, Deal& deal) {
  const Network& net = cell.net;
  const Packing packing{net};
  const int threads = rows.warps * device::kWarp, hidden = net.hidden, h_tasks = (hidden + 3) / 4;
  auto tasks_of = [&](int layer) { return hidden * ((net.layer_inputs(layer) + 3) / 4 + h_tasks); };
  const int tasks = tasks_of(0) + (net.layers - 1) * hidden * 2 * h_tasks;
  for (int task = deal.take(tasks); task < tasks; task += threads) {
    int layer = 0, rest = task;
    while (rest >= tasks_of(layer)) rest -= tasks_of(layer++);
    const int column = rest / hidden, unit = rest - column * hidden, count = net.layer_inputs(layer);
    const int of_inputs = (count + 3) / 4;
    const bool h = column >= of_inputs;
    const int first = 4 * (h ? column - of_inputs : column);
    const T* x = h ? rows.step.state + net.h_row(layer) * kStride<T> : rows.inputs(net, layer);
    add_outer(
        rows.sums + packing.layer(layer) + ((h ? count + 1 + first : first) * hidden + unit) * kGates,
        rows.gates_of(net, layer) + unit * kStride<T>, hidden, x + first * kStride<T>, (h ? hidden : count) - first);
  }
  const int biases = net.layers * kGates * hidden;
  for (int row = deal.take(biases); row < biases; row += threads) {
    const int layer = row / (kGates * hidden), gate = row / hidden - kGates * layer;
    const int unit = row - (kGates * layer + gate) * hidden;
    rows.sums[packing.layer(layer) + (net.layer_inputs(layer) * hidden + unit) * kGates + gate] +=
        sum_row(rows.gates + row * kStride<T>);
  }
  const T* top = rows.step.new_state + net.h_row(net.layers - 1) * kStride<T>;
  for (int k = deal.take(hidden + 1); k <= hidden; k += threads)
    rows.sums[packing.head_weight() + k] +=
        k < hidden ? sum_products(rows.d_y, top + k * kStride<T>) : sum_row(rows.d_y);
  if (!net.linear_path) return;
  for (int f = deal.take(net.inputs()); f < net.inputs(); f += threads)
    rows.sums[packing.linear_weight() + f] += sum_products(rows.d_y, rows.step.features + f * kStride<T>);
}

// From the gradient of the projected features, in d_x, to that of the features. Its threads meet once.
template <class T>
L2L_DEVICE void backward_projection(const Cell<T>& cell, const BackwardRows<T>& rows, Needs need) {
  const Network& net = cell.net;
  const Packing packing{net};
  const int lane = device::lane(), hidden = net.hidden, inputs = net.inputs();
  T* d = rows.step.projected;
  for (int unit = warp(); unit < hidden; unit += warps()) {
    const int i = unit * kStride<T> + lane;
    d[i] = rows.d_x[i] * elu_slope(Real<T>(d[i])).v;
  }
  __syncthreads();
  if (need.features) {
    const T* w = rows.weights + packing.projection_weight();
    for (int k = warp(); k < inputs; k += warps()) {
      T sum = 0;
      for (int unit = 0; unit < hidden; ++unit) sum = std::fma(w[unit * inputs + k], d[unit * kStride<T> + lane], sum);
      rows.d_x[k * kStride<T> + lane] = sum;
    }
  }
  if (!need.weights) return;
  for (int i = threadIdx.x; i < hidden * inputs; i += blockDim.x) {
    const int unit = i / inputs, k = i - unit * inputs;
    rows.sums[packing.projection_weight() + i] +=
        sum_products(d + unit * kStride<T>, rows.step.features + k * kStride<T>);
  }
  for (int unit = threadIdx.x; unit < hidden; unit += blockDim.x)
    rows.sums[packing.projection_bias() + unit] += sum_row(d + unit * kStride<T>);
}

// From the gradient of the features, in d_x but for what comes through the linear path, to that of the gradient, which
// is returned, and of the moments.
template <class T>
L2L_DEVICE T backward_features(
    const Cell<T>& cell, const BackwardRows<T>& rows, const Gradient<T>& gradient, double step) {
  using V = Real<T>;
  const Network& net = cell.net;
  const int lane = device::lane();
  const V grad(gradient.value);
  T* d = rows.d_x + lane;
  if (net.linear_path) {
    const T* const w = rows.weights + Packing{net}.linear_weight();
    const T d_y = rows.d_y[lane];
    for (int f = 0; f < net.inputs(); ++f) d[f * kStride<T>] = std::fma(w[f], d_y, d[f * kStride<T>]);
  }
  V sum(0);
  if (net.features == Features::identity) sum = V(*d);
  if (net.has_moments()) {
    T *m = rows.d_state + lane, *v = m + kStride<T>;
    const T* now = rows.step.new_state + lane;
    Moments<V> d_moments = {V(*m), V(*v)};
    sum = moments_backward<V>(
        {V(d[0]), V(d[kStride<T>])}, d_moments, {V(now[0]), V(now[kStride<T>])}, grad, cell.moments_at(step));
    if (gradient.live) {
      *m = d_moments.m.v;
      *v = d_moments.v.v;
    }
    d += 2 * kStride<T>;
  }
  if (net.has_log_sign()) sum = sum + log_sign_backward(V(d[0]), V(d[kStride<T>]), grad, cell.log_sign);
  return gradient.live ? sum.v : T(0);
}

// ---------------------------------------------------------------- kernels

// kHidden: the hidden size where it is known when the kernel is compiled, otherwise 0. kLinear: then, whether there is a
// linear path, whose few instructions would cost the others registers that they have not.
template <class T, OnChip kOnChip, int kHidden, bool kLinear = false>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, kOnChip == OnChip::all>)
    backward_kernel(const __grid_constant__ BackwardCall<T> call) {
  Cell<T> cell = call.cell;
  if constexpr (kHidden > 0) {
    cell.net.hidden = kHidden;
    cell.net.linear_path = kLinear;
  }
  const Network& net = cell.net;
  const UnrollArguments& arguments = call.arguments;
  const UnrollGradients& gradients = call.gradients;
  const int lane = device::lane(), state_rows = net.state_rows(), weights = Packing{net}.count();
  const int horizon = int(arguments.steps);  // more states than 2^31 fit in no memory
  const int64_t tiles = tiles_of(arguments.count), state_size = int64_t(state_rows) * kWidth;
  const double first_step = read(arguments.first_step);

  unsigned char* const shared = device::shared_memory();
  char* const off_chip = static_cast<char*>(call.workspace);
  T *at_rows, *at_weights;
  if constexpr (kOnChip == OnChip::nothing)
    at_rows = reinterpret_cast<T*>(off_chip + blockIdx.x * (call.rows + call.weights));
  else
    at_rows = reinterpret_cast<T*>(shared);
  if constexpr (kOnChip == OnChip::rows)
    at_weights = reinterpret_cast<T*>(off_chip + blockIdx.x * call.weights);
  else
    at_weights = at_rows + call.rows / int64_t(sizeof(T));
  BackwardRows<T> rows(net, at_rows, at_weights, kHidden > 0 ? backward_warps(kHidden) : warps());
  pack(net, rows.weights, cell.weights);  // read after the first barrier

  T* const states = call.states + blockIdx.x * (horizon * state_size);
  double* const slab = call.slabs + int64_t(blockIdx.x) * weights;
  Needs need;
  need.weights = gradients.d_weights != nullptr;
  need.features = gradients.d_grads.data || (gradients.d_state.data && net.has_moments());

  const int64_t begin = blockIdx.x * tiles / gridDim.x, end = (blockIdx.x + int64_t(1)) * tiles / gridDim.x;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t i = tile * kWidth + lane;
    const bool inside = i < arguments.count;
    // Both are read a step ahead of their use.
    auto gradient_at = [&](int t) {
      return inside && t >= 0 && t < horizon ? element<T>(arguments.grads, t, i) : T(0);
    };
    auto d_update_at = [&](int t) {
      return inside && t >= 0 && warp() == 0 ? element<T>(gradients.d_updates, t, i) : T(0);
    };

    // Forward. What the tile before read of the rows that this one writes, it read before its last barrier.
    const Matrix& first = arguments.state;
    load_rows(rows.step.state, state_rows, first.data, first.dtype, i * first.row, first.column, inside);
    const Matrix& d_last = gradients.d_last;
    load_rows(
        rows.d_state, state_rows, d_last.data, d_last.dtype, i * d_last.row, d_last.column, inside && d_last.data);
    if (need.weights)
      for (int k = threadIdx.x; k < weights; k += blockDim.x) rows.sums[k] = 0;
    __syncthreads();
    T ahead = gradient_at(0);
    for (int t = 0; t < horizon; ++t) {
      const Gradient<T> gradient(net, ahead, arguments.state.dtype);
      ahead = gradient_at(t + 1);
      if (t > 0) {
        T* const spent = rows.step.state;
        rows.step.state = rows.step.new_state;
        rows.step.new_state = spent;
      }
      if (t + 1 < horizon) save_state(states + t * state_size, rows.step.state, state_rows, rows.warps);
      advance_state(cell, rows, gradient, first_step + double(t));
    }

    // Backward: rows.step.new_state is the state after step t, and at first rows.step.state that before it.
    ahead = gradient_at(horizon - 1);
    T d_update_ahead = d_update_at(horizon - 1);
    for (int t = horizon - 1; t >= 0; --t) {
      need.state = t > 0 || gradients.d_state.data;
      const Gradient<T> gradient(net, ahead, arguments.state.dtype);
      const uint32_t live = device::ballot(gradient.live);
      const T d_update = d_update_ahead;
      ahead = gradient_at(t - 1);
      d_update_ahead = d_update_at(t - 1);
      const double number = first_step + double(t);
      // Where it goes was last read as the new state of the step just gone back through, before its last barrier.
      if (t > 0) send_for_state<kOnChip>(rows.next, states + (t - 1) * state_size, state_rows, rows.warps);
      if (warp() == 0) {
        write_features(cell, rows.step, moments_of(net, rows.step.new_state), gradient, number);
        const Real<T> one(1), y(net.tanh_output ? forward_head(cell, rows.step) : T(0));
        const bool moves = inside && gradient.live && !unmoved(net, rows.step);
        const Real<T> d_u(moves ? d_update : T(0));
        rows.d_y[lane] = (Real<T>(cell.output_scale) * d_u * (one - y * y)).v;
      }
      __syncthreads();
      if (net.projection) {
        forward_projection(cell, rows.step);
        __syncthreads();
      }
      for (int layer = net.layers - 1; layer >= 0; --layer) {
        backward_gates(cell, rows, layer, live);
        __syncthreads();
        Deal deal(rows.warps);
        // All layers' at once, when the gates' gradients of all are there: more tasks to share evenly. They read what
        // backward_inputs does not write.
        if (layer == 0 && need.weights) add_weight_gradients(cell, rows, deal);
        backward_inputs(cell, rows, layer, live, need, deal);
        if (layer == 0) states_landed<kOnChip>();
        __syncthreads();
      }
      if (net.projection) {
        backward_projection(cell, rows, need);
        __syncthreads();
      }
      if (need.features) {
        if (warp() == 0) {
          const T d_grad = backward_features(cell, rows, gradient, number);
          if (inside && gradients.d_grads.data) element<T>(gradients.d_grads, t, i) = d_grad;
        }
        // It has read the new state's moments, where the next step puts a state, and written those of d_state. With no
        // moments it has touched d_x alone, which no other does before another barrier, and each lane its own d_y.
        if (net.has_moments()) __syncthreads();
      }
      T* const spent = rows.step.new_state;
      rows.step.new_state = rows.step.state;
      rows.step.state = rows.next;
      rows.next = spent;
    }
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

// The slabs' sum, one lane for each weight: every warp adds up each kSumWarps-th slab, the first warp their sums. Slabs
// are in Packing's order, d_weights in that of the flat vector.
template <class T>
__global__ void __launch_bounds__(kSumWarps* device::kWarp)
    sum_slabs(T* d_weights, const double* slabs, const Network net, int64_t count) {
  const int64_t weights = Packing{net}.count();
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
  const Packing::Flat at = Packing{net}.flat(int(k));
  d_weights[at.first] = T(total);
  d_weights[at.second] = T(total);
}

// ---------------------------------------------------------------- launchers

// The workspace: states of all blocks, slabs, scratch that is not on chip.
template <class T>
struct Plan {
  int64_t rows, weights;           // bytes of each block's scratch
  OnChip on_chip;
  int64_t blocks, states, slabs;   // bytes of the last two

  Plan(const UnrollArguments& arguments, const UnrollGradients& gradients) {
    const Network& net = arguments.net;
    rows = scratch_of<T>(BackwardRows<T>::scalars(net)).each;
    weights = scratch_of<T>(Packing{net}.padded() + Packing{net}.overrun()).each;
    const int64_t limit = device::shared_limit();
    on_chip = rows + weights <= limit ? OnChip::all : rows <= limit ? OnChip::rows : OnChip::nothing;
    const int64_t each = arguments.steps * net.state_rows() * kWidth * int64_t(sizeof(T));
    const int64_t most = std::max(kFewBlocks, kStatesBytes / std::max<int64_t>(each, 1));
    // Whether a GPU has room for the scratch must not decide the order of sums.
    const int64_t room = std::max(kFewBlocks, Scratch::kBytes / (rows + weights));
    blocks = std::min({tiles_of(arguments.count), kBlocks, most, room});
    states = (blocks * each + 15) / 16 * 16;
    slabs = gradients.d_weights ? (blocks * Packing{net}.count() * int64_t(sizeof(double)) + 15) / 16 * 16 : 0;
  }
  int64_t shared() const { return on_chip == OnChip::nothing ? 0 : rows + (on_chip == OnChip::all ? weights : 0); }
  int64_t bytes() const { return states + slabs + blocks * (rows + weights - shared()); }
};

template <class T, int kHidden>
auto kernel_of_size(bool linear_path) {
  return linear_path ? backward_kernel<T, OnChip::all, kHidden, true> : backward_kernel<T, OnChip::all, kHidden, false>;
}

template <class T>
auto kernel_for(OnChip on_chip, const Network& net) {
  if constexpr (sizeof(T) == 4)
    if (on_chip == OnChip::all) switch (net.hidden) {
        case 8: return kernel_of_size<T, 8>(net.linear_path);
        case 16: return kernel_of_size<T, 16>(net.linear_path);
        case 20: return kernel_of_size<T, 20>(net.linear_path);
        case 32: return kernel_of_size<T, 32>(net.linear_path);
        default: break;
      }
  switch (on_chip) {
    case OnChip::all: return backward_kernel<T, OnChip::all, 0>;
    case OnChip::rows: return backward_kernel<T, OnChip::rows, 0>;
    default: return backward_kernel<T, OnChip::nothing, 0>;
  }
}

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
      plan.rows,
      plan.weights};
  if (plan.blocks > 0) {
    const auto kernel = kernel_for<T>(plan.on_chip, net);
    const dim3 grid(unsigned(plan.blocks)), block(unsigned(backward_warps(net.hidden) * device::kWarp));
    check(device::launch(kernel, grid, block, size_t(plan.shared()), stream, call), "lstm_unroll_backward");
  }
  if (!gradients.d_weights) return;
  const int64_t weights = Packing{net}.count();
  constexpr int threads = kSumWarps * device::kWarp;
  check(
      device::launch(
          sum_slabs<T>, dim3(unsigned((weights + device::kWarp - 1) / device::kWarp)), dim3(threads),
          threads * sizeof(double), stream, static_cast<T*>(gradients.d_weights), call.slabs, net, plan.blocks),
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
