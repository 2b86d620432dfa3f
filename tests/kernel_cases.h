// What the tests without torch share: random buffers of the exact size, and one network's kernels run through a
// backend's launchers.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/lstm_step.h"
#include "../csrc/lstm_unroll.h"

namespace l2l {

inline int failures = 0;

inline void expect(bool good, const char* what) {
  if (good) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

// The test's exit status; says "all good" where it is.
inline int verdict() {
  if (failures == 0) std::printf("all good\n");
  return failures != 0;
}

template <class T>
std::vector<T> random(int64_t count, double scale) {
  std::vector<T> values(count);
  for (T& value : values) value = T(scale * (2.0 * std::rand() / RAND_MAX - 1));
  return values;
}

template <class T>
bool finite(const std::vector<T>& values) {
  for (T value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

// Memory that is NaN until it is written.
template <class T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, T(NAN));
}

// Three networks at once are each by itself.
template <class T, class Backend>
void run_several(const Network& net, int64_t count, DType dtype, const Backend& backend) {
  constexpr int kNetworks = 3;
  const int64_t rows = net.state_rows(), weights_each = WeightLayout{net}.count(), one[] = {1};
  const auto weights = random<T>(kNetworks * weights_each, 0.3);
  std::vector<T> state = random<T>(kNetworks * count * rows, 0.5), param(kNetworks * count);
  for (int64_t k = 0; net.has_moments() && k < kNetworks; ++k)
    for (int64_t i = 0; i < count; ++i) {
      T& v = state[(k * rows + 1) * count + i];
      v = std::fabs(v);
    }
  std::vector<T> grad = random<T>(kNetworks * count, 1e-2), expected = param, expected_state = state;
  const double number = 2;
  const float lr = 0.5;
  auto tensor = [&](std::vector<T>& p, std::vector<T>& s, int k, int network) {
    return StepTensor{1, &count, count, {p.data() + k * count, dtype, one}, {grad.data() + k * count, dtype, one},
                      {s.data() + k * count * rows, dtype, one}, count, {&number, Number::float64}, network};
  };
  std::vector<StepTensor> tensors;
  for (int k = 0; k < kNetworks; ++k) {
    tensors.push_back(tensor(param, state, k, k));
    const StepTensor alone = tensor(expected, expected_state, k, 0);
    backend.step({net, weights.data() + k * weights_each, 1, dtype, &alone, 1, {&lr, Number::float32}, 0.1, false});
  }
  backend.step({net, weights.data(), kNetworks, dtype, tensors.data(), kNetworks, {&lr, Number::float32}, 0.1, false});
  bool same = true;
  for (size_t i = 0; i < param.size(); ++i) same &= std::fabs(param[i] - expected[i]) <= 1e-6;
  for (size_t i = 0; i < state.size(); ++i) same &= std::fabs(state[i] - expected_state[i]) <= 1e-6;
  expect(same, "several networks at once are each by itself");
}

// Sizes, and a step of such sizes, of tensors of which one is empty and one has six dimensions that no two of can be
// taken as one, its gradient expanded along the first.
template <class T, class Backend>
void run_sizes(const Network& net, DType dtype, const Backend& backend) {
  constexpr int kDims = 6, kTensors = 3;
  const int64_t sizes[kDims] = {2, 3, 2, 3, 2, 3}, none[] = {0}, few[] = {5}, one[] = {1}, gap = 2;
  int64_t strides[kDims], grad_strides[kDims], span = 1, count = 1;
  for (int d = kDims - 1; d >= 0; --d) {
    strides[d] = grad_strides[d] = span * gap;
    span += (sizes[d] - 1) * strides[d];
    count *= sizes[d];
  }
  grad_strides[0] = 0;
  const int rows = net.state_rows();
  const auto weights = random<T>(WeightLayout{net}.count(), 0.3);
  auto params = random<T>(span + few[0], 1), grads = random<T>(span - strides[0] + few[0], 1);
  auto states = random<T>((span + few[0]) * rows, 0.5);
  for (int64_t i = 0; i < span; ++i) states[span + i] = std::fabs(states[span + i]);
  for (int64_t i = 0; i < few[0]; ++i) {
    T& v = states[span * rows + few[0] + i];
    v = std::fabs(v);
  }
  const double number = 4;
  const float lr = 0.5;
  const Scalar step = {&number, Number::float64};
  const StepTensor tensors[kTensors] = {
      {kDims, sizes, count, {params.data(), dtype, strides}, {grads.data(), dtype, grad_strides},
       {states.data(), dtype, strides}, span, step, 0},
      {1, none, 0, {params.data(), dtype, one}, {grads.data(), dtype, one}, {states.data(), dtype, one}, 1, step, 0},
      {1, few, few[0], {params.data() + span, dtype, one}, {grads.data() + span - strides[0], dtype, one},
       {states.data() + span * rows, dtype, one}, few[0], step, 0}};
  const StepArguments arguments = {net, weights.data(), 1, dtype, tensors, kTensors, {&lr, Number::float32}, 0, false};
  const UpdateSize size = {0.6, 3};
  T squares[] = {T(0.1), T(0), T(0.2)};
  void* const places[] = {&squares[0], &squares[1], &squares[2]};
  double wanted[kTensors];
  T after[] = {squares[0], squares[1], squares[2]};
  for (int t = 0; t < kTensors; ++t) {
    const StepTensor& tensor = tensors[t];
    double grad = 0, m = 0;
    for (int64_t i = 0; i < tensor.count; ++i) {
      int64_t rest = i, at = 0, grad_at = 0;
      for (int d = tensor.dims - 1; d >= 0; rest /= tensor.sizes[d], --d) {
        at += rest % tensor.sizes[d] * tensor.state.strides[d];
        grad_at += rest % tensor.sizes[d] * tensor.grad.strides[d];
      }
      const double g = static_cast<const T*>(tensor.grad.data)[grad_at], x = static_cast<const T*>(tensor.state.data)[at];
      grad += g * g, m += x * x;
    }
    const double n = tensor.count > 0 ? double(tensor.count) : 1;
    wanted[t] = size.next(after[t], grad / n, true, m / n, number, net.beta1);
  }
  std::vector<T> found = unwritten<T>(kTensors);
  backend.update_sizes(arguments, {size, places}, found.data());
  bool same = true;
  for (int t = 0; t < kTensors; ++t)
    same &= std::fabs(found[t] - wanted[t]) <= 1e-5 && std::fabs(squares[t] - after[t]) <= 1e-6;
  expect(same, "sizes of strided, empty and few");
  std::vector<T> before = params;
  backend.step_scaled(arguments, {size, places});
  double moved = 0;
  for (int64_t i = 0; i < span; ++i) moved += double(params[i] - before[i]) * double(params[i] - before[i]);
  const double root = std::sqrt(moved / double(count));
  expect(root > 0 && root <= 0.5 * 3 * 1.001, "a strided tensor moves as far as it may");
}

// A Backend has the launchers step(StepArguments), step_scaled(StepArguments, UpdateSizes), update_sizes(StepArguments,
// UpdateSizes, found), unroll(UnrollArguments, updates, last) and unroll_backward(UnrollArguments, UnrollGradients).
template <class T, class Backend>
void run(const Network& net, int64_t count, int64_t horizon, DType dtype, const Backend& backend) {
  const int rows = net.state_rows();
  const auto weights = random<T>(WeightLayout{net}.count(), 0.3);
  std::vector<T> state = random<T>(count * rows, 0.5);
  for (int64_t i = 0; net.has_moments() && i < count; ++i) state[count + i] = std::fabs(state[count + i]);
  std::vector<T> param(count), grad = random<T>(count, 1e-2);
  const T huge = T(net.gradient_limit(sizeof(T) == 8, dtype));  // infinite, or its square is
  if (count > 2) grad[2] = T(NAN), grad[1] = -huge;
  const double number = 2;
  const float lr = 0.5;
  const int64_t one = 1, two[] = {1, 1}, sizes[] = {1, count};
  const Scalar step = {&number, Number::float64};

  const StepTensor tensor = {2,
                             sizes,
                             count,
                             {param.data(), dtype, two},
                             {grad.data(), dtype, two},
                             {state.data(), dtype, two},
                             count,
                             step,
                             0};
  const std::vector<T> before = state;
  backend.step({net, weights.data(), 1, dtype, &tensor, 1, {&lr, Number::float32}, 0.1, false});
  expect(finite(param) && finite(state), "step is finite");
  for (int64_t i = 1; count > 2 && i < 3; ++i)
    expect(param[i] == 0 && state[i] == before[i], "a gradient that is not finite changes nothing");
  T square = 0;
  void* const squares[] = {&square};
  backend.step_scaled(
      {net, weights.data(), 1, dtype, &tensor, 1, {&lr, Number::float32}, 0.1, false},
      {{0.6, 3}, net.has_moments() ? squares : nullptr});
  expect(square >= 0 && square < T(INFINITY), "a mean square is finite");
  expect(finite(param) && finite(state), "a scaled step is finite");
  for (int64_t i = 1; count > 2 && i < 3; ++i)
    expect(param[i] == 0 && state[i] == before[i], "a gradient that is not finite changes nothing of a scaled step");

  run_several<T>(net, count, dtype, backend);
  if (net.has_moments()) run_sizes<T>(net, dtype, backend);

  std::vector<T> grads = random<T>(horizon * count, 1e-2), updates = unwritten<T>(horizon * count);
  std::vector<T> last = unwritten<T>(count * rows);
  if (count > 2 && horizon > 1) grads[count + 2] = T(INFINITY), grads[count + 1] = huge;
  const UnrollArguments arguments = {net,
                                     weights.data(),
                                     dtype,
                                     horizon,
                                     count,
                                     step,
                                     {grads.data(), dtype, count, one},
                                     {state.data(), dtype, one, count}};
  backend.unroll(arguments, {updates.data(), dtype, count, 1}, {last.data(), dtype, 1, count});
  expect(finite(updates) && finite(last), "unroll is finite");

  std::vector<T> d_grads = unwritten<T>(horizon * count), d_state = unwritten<T>(count * rows);
  std::vector<T> d_weights = unwritten<T>(int64_t(weights.size()));
  backend.unroll_backward(
      arguments, {{updates.data(), dtype, count, 1},
                  {last.data(), dtype, 1, count},
                  {d_grads.data(), dtype, count, 1},
                  {d_state.data(), dtype, 1, count},
                  d_weights.data()});
  expect(finite(d_grads) && finite(d_state) && finite(d_weights), "backward is finite");
}

}  // namespace l2l
