// From the ops' arguments to the launchers': the checks, which every backend shares.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "stable.h"

#include "element.h"
#include "lstm_step.h"
#include "lstm_unroll.h"

namespace l2l {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Torch's own STD_TORCH_CHECK would put the path of this source before the message.
#define L2L_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::l2l::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: fail(name, " must be float32, bfloat16, float16 or float64");
  }
}

inline DType state_dtype_of(const Tensor& state) {
  const DType dtype = dtype_of(state, "state");
  L2L_CHECK(dtype != DType::float16, "state must be float32, bfloat16 or float64, not float16");
  return dtype;
}

// No argument of an op may be a string: torch 2.13's stable ABI loses the memory of each that it hands to a kernel.
inline Network network(
    int64_t features, int64_t hidden_size, int64_t num_layers, bool projection, int64_t output,
    double output_scale, double preprocess_p, double beta1, double beta2, double eps, bool linear_path) {
  Network net{};
  L2L_CHECK(
      features >= 0 && features <= 3,
      "features must be 0 (identity) or 1 (log_sign) or 2 (moments) or 3 (both), got ", features);
  L2L_CHECK(output == 0 || output == 1, "output must be 0 (linear) or 1 (tanh), got ", output);
  L2L_CHECK(hidden_size >= 1 && hidden_size <= 4096, "hidden_size must be from 1 to 4096, got ", hidden_size);
  L2L_CHECK(num_layers >= 1 && num_layers <= 64, "num_layers must be from 1 to 64, got ", num_layers);
  net.features = Features(features);
  net.hidden = int(hidden_size);
  net.layers = int(num_layers);
  net.projection = projection;
  net.tanh_output = output == 1;
  net.output_scale = output_scale;
  net.preprocess_p = preprocess_p;
  net.beta1 = beta1;
  net.beta2 = beta2;
  net.eps = eps;
  net.linear_path = linear_path;
  return net;
}

// Kernels of one device read them all.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& weights) {
  L2L_CHECK(
      tensor.device() == weights.device(), name, " must be on the device of the weights, ",
      weights.is_cpu() ? "the CPU" : "GPU " + std::to_string(weights.get_device_index()));
}

inline Scalar scalar(const Tensor& tensor, const char* name, const Tensor& weights) {
  check_device(tensor, name, weights);
  L2L_CHECK(tensor.numel() == 1, name, " must be a single number, got shape ", shape_text(tensor));
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return {data, Number::float32};
    case torch::headeronly::ScalarType::Double: return {data, Number::float64};
    case torch::headeronly::ScalarType::Int: return {data, Number::int32};
    case torch::headeronly::ScalarType::Long: return {data, Number::int64};
    default: fail(name, " must be float32, float64, int32 or int64");
  }
}

// The flat weight vector, contiguous; or, where there may be several networks, a row of them each.
inline Tensor checked_weights(const Tensor& weights, const Network& net, bool several = false) {
  const DType dtype = dtype_of(weights, "weights");
  L2L_CHECK(
      dtype == DType::float32 || dtype == DType::float64,
      "weights must be float32 or float64: arithmetic is done in it");
  const int64_t dims = weights.dim(), count = WeightLayout{net}.count();
  L2L_CHECK(
      (dims == 1 || (several && dims == 2)) && weights.size(dims - 1) == count, "weights must be a vector of ", count,
      " for this network", several ? ", or a row of them for each of several" : "", ", got shape ", shape_text(weights));
  return weights.is_contiguous() ? weights : torch::stable::contiguous(weights);
}

inline int networks_of(const Tensor& weights) { return weights.dim() == 1 ? 1 : int(std::max<int64_t>(1, weights.size(0))); }

inline void check_own_memory(const Tensor& tensor, int64_t dims, const char* name) {
  if (tensor.numel() == 0) return;  // the strides of nothing mean nothing
  for (int64_t d = 0; d < dims; ++d)
    L2L_CHECK(
        tensor.size(d) <= 1 || tensor.stride(d) != 0, name, " of shape ", shape_text(tensor),
        " is expanded: several coordinates share one place in memory");
}

inline StepTensor step_tensor(
    const Tensor& param, const Tensor& grad, const Tensor& state, const Tensor& step, const Network& net,
    const Tensor& weights) {
  const int64_t dims = param.dim();
  for (const Tensor& tensor : {param, grad, state}) check_device(tensor, "a parameter, gradient or state", weights);
  L2L_CHECK(  // torch 2.11's sizes have no ==
      grad.sizes().equals(param.sizes()), "a gradient has shape ", shape_text(grad), ", its parameter ",
      shape_text(param));
  bool shapes = state.dim() == dims + 1 && state.size(dims) == net.state_rows();
  for (int64_t d = 0; shapes && d < dims; ++d) shapes = state.size(d) == param.size(d);
  L2L_CHECK(
      shapes, "a state has shape ", shape_text(state), ", its parameter ", shape_text(param),
      ": it must add one dimension of ", net.state_rows());
  L2L_CHECK(dims <= kMaxDims, "a parameter has ", dims, " dimensions; at most ", kMaxDims, " are supported");
  check_own_memory(param, dims, "a parameter");
  check_own_memory(state, dims + 1, "a state");
  return {
      int(dims),
      param.sizes().data(),
      param.numel(),
      {param.data_ptr(), dtype_of(param, "a parameter"), param.strides().data()},
      {grad.data_ptr(), dtype_of(grad, "a gradient"), grad.strides().data()},
      {state.data_ptr(), state_dtype_of(state), state.strides().data()},
      state.stride(dims),
      scalar(step, "a step", weights),
      0,
  };
}

// Part k of a tensor whose first dimension counts networks.
inline StepTensor part_of(const StepTensor& tensor, int k) {
  StepTensor part = tensor;
  part.dims -= 1;
  part.sizes += 1;
  part.count /= tensor.sizes[0];
  for (Strided* of : {&part.param, &part.grad, &part.state}) {
    of->data = static_cast<char*>(of->data) + k * of->strides[0] * size_of(of->dtype);
    of->strides += 1;
  }
  part.network = k;
  return part;
}

inline std::vector<StepTensor> step_tensors(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
    const std::vector<Tensor>& steps, const Network& net, const Tensor& weights) {
  L2L_CHECK(
      grads.size() == params.size() && states.size() == params.size() && steps.size() == params.size(),
      "there must be one gradient, state and step for each of the ", params.size(), " parameters, got ",
      grads.size(), ", ", states.size(), " and ", steps.size());
  std::vector<StepTensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i)
    tensors.push_back(step_tensor(params[i], grads[i], states[i], steps[i], net, weights));
  if (weights.dim() == 1) return tensors;
  const int64_t networks = weights.size(0);
  for (size_t i = 0; i < params.size(); ++i)
    L2L_CHECK(
        tensors[i].dims > 0 && tensors[i].sizes[0] == networks, "a parameter has shape ", shape_text(params[i]),
        ": its first dimension must be ", networks, ", the number of networks that weights has");
  std::vector<StepTensor> parts;
  parts.reserve(networks * tensors.size());
  for (int64_t k = 0; k < networks; ++k)
    for (const StepTensor& tensor : tensors) parts.push_back(part_of(tensor, int(k)));
  return parts;
}

// The mean squares of UpdateSizes: a number for each parameter, or nothing at all unless they are needed.
inline std::vector<void*> squares_of(
    const std::vector<Tensor>& squares, size_t count, const Network& net, const Tensor& weights, bool needed = false) {
  std::vector<void*> places;
  if (squares.empty() && !needed) return places;
  L2L_CHECK(
      squares.size() == count, "slow_squares must be empty or have one for each of the ", count, " parameters, got ",
      squares.size());
  L2L_CHECK(weights.dim() == 1, "slow_squares must be empty for several networks at once");
  L2L_CHECK(net.has_moments(), "slow_squares must be empty for a network whose features are no moments");
  for (const Tensor& square : squares) {
    check_device(square, "a slow_square", weights);
    L2L_CHECK(
        square.numel() == 1 && square.scalar_type() == weights.scalar_type(),
        "a slow_square must be one number in the dtype of the weights, got shape ", shape_text(square));
    places.push_back(square.data_ptr());
  }
  return places;
}

// A series [T, N] in the weights' dtype.
inline Matrix series(const Tensor& tensor, const char* name, const Tensor& weights, int64_t steps, int64_t count) {
  check_device(tensor, name, weights);
  L2L_CHECK(
      tensor.dim() == 2 && tensor.size(0) == steps && tensor.size(1) == count, name, " must be [", steps, ", ", count,
      "], got shape ", shape_text(tensor));
  L2L_CHECK(tensor.scalar_type() == weights.scalar_type(), name, " must have the dtype of the weights");
  return {tensor.data_ptr(), dtype_of(tensor, name), tensor.stride(0), tensor.stride(1)};
}

// A state [N, S].
inline Matrix states(
    const Tensor& tensor, const char* name, const Network& net, const Tensor& weights, int64_t count) {
  check_device(tensor, name, weights);
  L2L_CHECK(
      tensor.dim() == 2 && tensor.size(0) == count && tensor.size(1) == net.state_rows(), name, " must be [", count,
      ", ", net.state_rows(), "], got shape ", shape_text(tensor));
  return {tensor.data_ptr(), state_dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

inline UnrollArguments unroll_arguments(
    const Network& net, const Tensor& grads, const Tensor& state, const Tensor& weights, const Tensor& step) {
  L2L_CHECK(grads.dim() == 2, "grads must be [T, N], got shape ", shape_text(grads));
  const int64_t horizon = grads.size(0), count = grads.size(1);
  return {
      net,
      weights.const_data_ptr(),
      dtype_of(weights, "weights"),
      horizon,
      count,
      scalar(step, "step", weights),
      series(grads, "grads", weights, horizon, count),
      states(state, "state", net, weights, count),
  };
}

// Uninitialised [N, S], coordinates contiguous: reference.new_state_like.
inline Tensor new_state_like(const Tensor& state) {
  return torch::stable::transpose(torch::stable::new_empty(state, {state.size(1), state.size(0)}), 0, 1);
}

}  // namespace l2l
