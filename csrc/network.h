// What a coordinatewise LSTM computes, and where each of its weights stands in the flat weight vector.
//
// The twin of Config, state_size and weight_shapes in l2l_fast/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define L2L_HOST_DEVICE __host__ __device__ inline __attribute__((always_inline))
#else
#define L2L_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace l2l {

enum class DType : uint8_t { float32, bfloat16, float16, float64 };

// A number that stays where it is, so that a GPU may be given one that it has yet to compute. The caller owns it.
enum class Number : uint8_t { float32, float64, int32, int64 };

struct Scalar {
  const void* data;  // in the memory of the device that reads it
  Number kind;
};

L2L_HOST_DEVICE double read(const Scalar& scalar) {
  switch (scalar.kind) {
    case Number::float32: return *static_cast<const float*>(scalar.data);
    case Number::float64: return *static_cast<const double*>(scalar.data);
    case Number::int32: return *static_cast<const int32_t*>(scalar.data);
    default: return double(*static_cast<const int64_t*>(scalar.data));
  }
}

enum class Features { identity, log_sign, moments, both };  // numbered as reference.FEATURES

struct Network {
  Features features;
  int hidden;
  int layers;
  bool projection;
  bool tanh_output;
  bool linear_path;
  double output_scale;
  double preprocess_p;
  double beta1;
  double beta2;
  double eps;

  L2L_HOST_DEVICE bool has_moments() const { return features == Features::moments || features == Features::both; }
  L2L_HOST_DEVICE bool has_log_sign() const { return features == Features::log_sign || features == Features::both; }
  L2L_HOST_DEVICE int inputs() const { return features == Features::identity ? 1 : features == Features::both ? 4 : 2; }
  L2L_HOST_DEVICE int linear_inputs() const { return linear_path ? inputs() : 0; }
  L2L_HOST_DEVICE int layer_inputs(int layer) const { return layer == 0 && !projection ? inputs() : hidden; }

  // The magnitude from which on a gradient counts as not finite; reference.gradient_limit.
  L2L_HOST_DEVICE double gradient_limit(bool wide_arithmetic, DType state) const {
    if (features == Features::log_sign) return INFINITY;
    if (wide_arithmetic && state == DType::float64) return 0x1p511;
    return has_moments() ? 0x1p63 : 0x1p100;
  }

  // State rows of one coordinate: m, v (with moments), then h and c of every layer.
  L2L_HOST_DEVICE int moment_rows() const { return has_moments() ? 2 : 0; }
  L2L_HOST_DEVICE int h_row(int layer) const { return moment_rows() + 2 * layer * hidden; }
  L2L_HOST_DEVICE int c_row(int layer) const { return h_row(layer) + hidden; }
  L2L_HOST_DEVICE int state_rows() const { return moment_rows() + 2 * layers * hidden; }
};

// Offsets into the flat weight vector; every matrix is row-major.
struct WeightLayout {
  Network net;

  L2L_HOST_DEVICE int64_t projection_weight() const { return 0; }
  L2L_HOST_DEVICE int64_t projection_bias() const { return int64_t(net.hidden) * net.inputs(); }
  L2L_HOST_DEVICE int64_t weight_ih(int layer) const {
    int64_t hidden = net.hidden;
    int64_t start = net.projection ? hidden * (net.inputs() + 1) : 0;
    if (layer == 0) return start;
    return start + 4 * hidden * (net.layer_inputs(0) + hidden + 2) + (layer - 1) * 4 * hidden * (2 * hidden + 2);
  }
  L2L_HOST_DEVICE int64_t weight_hh(int layer) const {
    return weight_ih(layer) + 4 * int64_t(net.hidden) * net.layer_inputs(layer);
  }
  L2L_HOST_DEVICE int64_t bias_ih(int layer) const { return weight_hh(layer) + 4 * int64_t(net.hidden) * net.hidden; }
  L2L_HOST_DEVICE int64_t bias_hh(int layer) const { return bias_ih(layer) + 4 * int64_t(net.hidden); }
  L2L_HOST_DEVICE int64_t head_weight() const { return weight_ih(net.layers); }
  L2L_HOST_DEVICE int64_t head_bias() const { return head_weight() + net.hidden; }
  L2L_HOST_DEVICE int64_t linear_weight() const { return head_bias() + 1; }  // from the features to y
  L2L_HOST_DEVICE int64_t count() const { return linear_weight() + net.linear_inputs(); }
};

}  // namespace l2l
