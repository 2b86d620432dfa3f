// The kernels' exp2, log, sigmoid and tanh as functions of arrays, and their largest errors over the whole range.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Approximations {
  const char* name;
  int lanes;
  // Each works on one aligned vector.
  void (*exp2)(const float* in, float* out);
  void (*log)(const float* in, float* out);
  void (*sigmoid)(const float* in, float* out);
  void (*tanh)(const float* in, float* out);
};

extern const Approximations kAvx512Approximations, kAvx2Approximations, kPortableApproximations;

inline std::vector<Approximations> all_approximations() {
  std::vector<Approximations> all = {kPortableApproximations};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(kAvx2Approximations);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) all.push_back(kAvx512Approximations);
#endif
  return all;
}

inline float one(const Approximations& a, void (*f)(const float*, float*), float x) {
  alignas(64) float in[16], out[16];
  for (int k = 0; k < a.lanes; ++k) in[k] = x;
  f(in, out);
  return out[0];
}

// The largest measure(x, f(x)) over every 4099th float in [low, high], bit patterns in order, negatives too.
template <class Measure>
double worst(const Approximations& a, void (*f)(const float*, float*), float low, float high, Measure measure) {
  alignas(64) float in[16], out[16];
  double largest = 0;
  uint64_t bits = 0;
  while (bits < (uint64_t(1) << 32)) {
    int filled = 0;
    for (; filled < a.lanes && bits < (uint64_t(1) << 32); bits += 4099) {
      uint32_t pattern = uint32_t(bits);
      std::memcpy(&in[filled], &pattern, sizeof pattern);
      if (in[filled] >= low && in[filled] <= high) ++filled;
    }
    for (int k = filled; k < a.lanes; ++k) in[k] = low;
    f(in, out);
    for (int k = 0; k < filled; ++k) {
      double error = measure(double(in[k]), double(out[k]));
      if (!(error <= largest)) largest = error;
    }
  }
  return largest;
}

inline double exp2_error(const Approximations& a) {
  return worst(a, a.exp2, -126, 42, [](double x, double y) { return std::fabs(y / std::exp2(x) - 1); });
}
// In units of the stated bound.
inline double log_error(const Approximations& a) {
  return worst(a, a.log, 1e-45f, 3.4028235e38f, [](double x, double y) {
    return std::fabs(y - std::log(x)) / (1e-7 * std::fabs(std::log(x)) + 5e-8);
  });
}
inline double sigmoid_error(const Approximations& a) {
  return worst(
      a, a.sigmoid, -INFINITY, INFINITY, [](double x, double y) { return std::fabs(y - 1 / (1 + std::exp(-x))); });
}
inline double tanh_error(const Approximations& a) {
  return worst(a, a.tanh, -INFINITY, INFINITY, [](double x, double y) { return std::fabs(y - std::tanh(x)); });
}

inline bool special_values(const Approximations& a) {
  return std::isnan(one(a, a.exp2, NAN)) && std::isnan(one(a, a.log, NAN)) && std::isnan(one(a, a.sigmoid, NAN)) &&
         std::isnan(one(a, a.tanh, NAN)) && one(a, a.exp2, -INFINITY) <= 1.2e-38f && one(a, a.exp2, 0) == 1 &&
         one(a, a.log, 0) == -INFINITY && one(a, a.log, INFINITY) == INFINITY && one(a, a.log, 1) == 0 &&
         one(a, a.tanh, -0.0f) == 0 && one(a, a.sigmoid, 0) == 0.5f;
}
