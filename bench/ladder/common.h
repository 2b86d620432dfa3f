// What every rung has in common: the problem, a plain CPU version in float64, the check against it, the timing.
//
// The problem is one step of the network of 2016 (two layers of 20 units, log_sign features, linear output) for `count`
// coordinates. A rung is a kernel and a function that launches it; main() hands both to climb(). Left out of all rungs, to
// keep them short: gradients that are not finite, other features, sizes, dtypes and strides. csrc/cuda has all of them.
//
// A unit's arithmetic is csrc/lstm_cell.h's, so rungs differ only in how they move numbers and multiply matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cuda/real.cuh"

namespace ladder {

using namespace l2l;
using V = Real<float>;

constexpr int kHidden = 20, kLayers = 2, kFeatures = 2;
constexpr int kRows = 2 * kLayers * kHidden;  // of the state: h and c of layer 0, then of layer 1
constexpr int kTile = 32;                     // coordinates; arrays are padded to whole tiles
constexpr float kScale = 0.1f, kP = 10;       // of the output, of the features
constexpr Network kNetwork = {Features::log_sign, kHidden, kLayers, false, false, false, kScale, kP, 0.95, 0.95, 1e-8};

// One call of a rung. All pointers are the GPU's. Of the state, number `row` of coordinate n is at
// state[n * kRows + row], or at state[row * padded + n] for a rung that asks for rows.
struct Call {
  int64_t count, padded;
  float* param;         // [padded], changed
  const float* grad;    // [padded], zeros beyond count
  float* state;         // [kRows * padded], changed
  const float* weights; // flat, as csrc/network.h lays them out
  float lr;
};

// Where the weights of a layer stand; every matrix is row-major, gate by gate.
struct Layer {
  int inputs;
  const float *ih, *hh, *bias_ih, *bias_hh;
};

L2L_HOST_DEVICE Layer layer_of(const float* weights, int layer) {
  const WeightLayout at = {kNetwork};
  return {
      layer ? kHidden : kFeatures, weights + at.weight_ih(layer), weights + at.weight_hh(layer),
      weights + at.bias_ih(layer), weights + at.bias_hh(layer)};
}

L2L_DEVICE LogSign<V> features_of(float grad) {
  return log_sign(V(grad), LogSignScale<V>{V(1 / kP), V(4.539993e-5f), V(22026.466f)});  // 1/p, e^-p, e^p
}

// ---------------------------------------------------------------- the same on the CPU, in float64

inline void step_on_cpu(const std::vector<float>& weights, double grad, double lr, double* param, double* state) {
  const double magnitude = std::fabs(grad);
  std::vector<double> x = {std::log(magnitude) / kP, double((grad > 0) - (grad < 0))};
  if (magnitude < std::exp(-double(kP))) x = {-1, std::exp(double(kP)) * grad};
  for (int l = 0; l < kLayers; ++l) {
    const Layer layer = layer_of(weights.data(), l);
    double *h = state + 2 * l * kHidden, *c = h + kHidden;
    std::vector<double> z(4 * kHidden);
    for (int row = 0; row < 4 * kHidden; ++row) {
      z[row] = double(layer.bias_ih[row]) + layer.bias_hh[row];
      for (int k = 0; k < layer.inputs; ++k) z[row] += double(layer.ih[row * layer.inputs + k]) * x[k];
      for (int k = 0; k < kHidden; ++k) z[row] += double(layer.hh[row * kHidden + k]) * h[k];
    }
    auto sigmoid = [](double y) { return 1 / (1 + std::exp(-y)); };
    for (int unit = 0; unit < kHidden; ++unit) {
      const double i = sigmoid(z[unit]), f = sigmoid(z[kHidden + unit]);
      const double g = std::tanh(z[2 * kHidden + unit]), o = sigmoid(z[3 * kHidden + unit]);
      c[unit] = f * c[unit] + i * g;
      h[unit] = o * std::tanh(c[unit]);
    }
    x.assign(h, h + kHidden);
  }
  const float* head = weights.data() + WeightLayout{kNetwork}.head_weight();
  double y = head[kHidden];
  for (int k = 0; k < kHidden; ++k) y += head[k] * x[k];
  *param += lr * kScale * y;
}

// ---------------------------------------------------------------- memory of the GPU, or of the emulator

#ifdef L2L_CUDA_EMULATOR
inline float* new_floats(size_t count) { return static_cast<float*>(std::aligned_alloc(128, (count * 4 + 127) / 128 * 128)); }
inline void delete_floats(float* data) { std::free(data); }
inline void copy_floats(float* to, const float* from, size_t count) { std::memcpy(to, from, count * 4); }
#else
inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}
inline float* new_floats(size_t count) {
  void* data;
  must(cudaMalloc(&data, count * 4));
  return static_cast<float*>(data);
}
inline void delete_floats(float* data) { cudaFree(data); }
inline void copy_floats(float* to, const float* from, size_t count) { must(cudaMemcpy(to, from, count * 4, cudaMemcpyDefault)); }
#endif

// Random parameters, gradients over five decades, states and weights, on both sides.
struct Problem {
  std::vector<float> param, grad, state, weights;
  Call call;

  explicit Problem(int64_t count) {
    const int64_t padded = (count + kTile - 1) / kTile * kTile;
    std::mt19937 random(unsigned(count) + 1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    auto fill = [&](std::vector<float>& to, int64_t size, float scale) {
      to.resize(size);
      for (float& x : to) x = scale * uniform(random);
    };
    fill(param, padded, 1);
    fill(grad, padded, 1);
    for (float& x : grad) x *= std::pow(10.0f, 2.5f * uniform(random) - 2.5f);
    std::fill(grad.begin() + count, grad.end(), 0.0f);
    fill(state, kRows * padded, 0.5f);
    fill(weights, WeightLayout{kNetwork}.count(), 0.4f);
    call = {count, padded, on_device(param), on_device(grad), on_device(state), on_device(weights), 0.5f};
  }
  ~Problem() {
    for (const float* data : {(const float*)call.param, call.grad, (const float*)call.state, call.weights})
      delete_floats(const_cast<float*>(data));
  }
  Problem(const Problem&) = delete;

  static float* on_device(const std::vector<float>& from) {
    float* data = new_floats(from.size());
    copy_floats(data, from.data(), from.size());
    return data;
  }
};

using Launch = cudaError_t (*)(const Call&);

// The largest error of a parameter and of a state, in units of the tolerance 2e-6 + 2e-5 of the value.
inline double error_of(Launch launch, int64_t count, bool rows) {
  Problem problem(count);
  const Call& call = problem.call;
  if (launch(call) != cudaSuccess) return INFINITY;
  std::vector<float> param(call.padded), state(kRows * call.padded);
  copy_floats(param.data(), call.param, param.size());
  copy_floats(state.data(), call.state, state.size());
  double worst = 0;
  auto compare = [&](float found, double expected) {
    const double error = std::fabs(found - expected) / (2e-6 + 2e-5 * std::fabs(expected));
    worst = error <= worst ? worst : error;  // NaN counts
  };
  auto at = [&](int64_t n, int row) { return rows ? row * call.padded + n : n * kRows + row; };
  for (int64_t n = 0; n < count; ++n) {
    double theta = problem.param[n], numbers[kRows];
    for (int row = 0; row < kRows; ++row) numbers[row] = problem.state[at(n, row)];
    step_on_cpu(problem.weights, problem.grad[n], call.lr, &theta, numbers);
    compare(param[n], theta);
    for (int row = 0; row < kRows; ++row) compare(state[at(n, row)], numbers[row]);
  }
  return worst;
}

#ifndef L2L_CUDA_EMULATOR
// Microseconds of one call: the median of nine rounds.
inline double microseconds(Launch launch, const Call& call) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < 11; ++round) {
    must(cudaEventRecord(begin));
    for (int i = 0; i < 5; ++i) must(launch(call));
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    times.push_back(0);
    must(cudaEventElapsedTime(&times.back(), begin, end));
  }
  std::sort(times.begin() + 2, times.end());  // the first two are to warm up
  return 1e3 * times[6] / 5;
}
#endif

// Checks a rung at awkward counts, then times it; 0 if it is right.
inline int climb(const char* name, bool rows, Launch launch) {
  for (int64_t count : {1, 31, 32, 33, 300}) {
    const double error = error_of(launch, count, rows);
    if (!(error <= 1)) {
      std::printf("%-10s WRONG at %lld coordinates: %.3g times the tolerance\n", name, (long long)count, error);
      return 1;
    }
  }
  std::printf("%-10s agrees with the CPU\n", name);
#ifndef L2L_CUDA_EMULATOR
  for (int64_t count : {16'000, 1'000'000, 10'000'000}) {
    Problem problem(count);
    const double us = microseconds(launch, problem.call);
    const double bytes = double(count) * (2 * kRows + 3) * 4;
    std::printf(
        "%-10s %9lld coordinates %10.1f us %8.3f ns each %8.1f GB/s\n", name, (long long)count, us, 1e3 * us / count,
        bytes / us / 1e3);
  }
#endif
  return 0;
}

}  // namespace ladder
