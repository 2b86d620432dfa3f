// The ops over a backend's launchers: checks, outputs, launch. The schemas are in l2l_fast/ops.py.
//
// A Backend has static functions step(StepArguments, weights), step_scaled(StepArguments, UpdateSizes, weights),
// update_sizes(StepArguments, UpdateSizes, found),
// unroll(UnrollArguments, updates, last, weights) and unroll_backward(UnrollArguments, UnrollGradients, weights), where
// weights tells the device.
#pragma once

#include "arguments.h"

namespace l2l {

template <class Backend>
struct Ops {
  static void step(
      std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor weights, Tensor lr,
      std::vector<Tensor> steps, int64_t features, int64_t hidden_size, int64_t num_layers, bool projection,
      int64_t output, double output_scale, double preprocess_p, double beta1, double beta2, double eps,
      bool linear_path, double weight_decay, bool maximize) {
    const Network net = network(
        features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps,
        linear_path);
    weights = checked_weights(weights, net, true);
    const std::vector<StepTensor> tensors = step_tensors(params, grads, states, steps, net, weights);
    Backend::step(
        {net, weights.const_data_ptr(), networks_of(weights), dtype_of(weights, "weights"), tensors.data(),
         int64_t(tensors.size()), scalar(lr, "lr", weights), weight_decay, maximize},
        weights);
  }

  static void step_scaled(
      std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor weights, Tensor lr,
      std::vector<Tensor> steps, int64_t features, int64_t hidden_size, int64_t num_layers, bool projection,
      int64_t output, double output_scale, double preprocess_p, double beta1, double beta2, double eps,
      bool linear_path, double weight_decay, bool maximize, double update_rms, std::vector<Tensor> slow_squares,
      double max_update_rms) {
    const Network net = network(
        features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps,
        linear_path);
    weights = checked_weights(weights, net, true);
    const std::vector<StepTensor> tensors = step_tensors(params, grads, states, steps, net, weights);
    const std::vector<void*> squares = squares_of(slow_squares, params.size(), net, weights);
    Backend::step_scaled(
        {net, weights.const_data_ptr(), networks_of(weights), dtype_of(weights, "weights"), tensors.data(),
         int64_t(tensors.size()), scalar(lr, "lr", weights), weight_decay, maximize},
        {{update_rms, max_update_rms}, slow_squares.empty() ? nullptr : squares.data()}, weights);
  }

  static Tensor update_sizes(
      std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor weights,
      std::vector<Tensor> steps, int64_t features, int64_t hidden_size, int64_t num_layers, bool projection,
      int64_t output, double output_scale, double preprocess_p, double beta1, double beta2, double eps,
      bool linear_path, double update_rms, std::vector<Tensor> slow_squares, double max_update_rms) {
    const Network net = network(
        features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps,
        linear_path);
    weights = checked_weights(weights, net);
    const std::vector<StepTensor> tensors = step_tensors(params, grads, states, steps, net, weights);
    const std::vector<void*> squares = squares_of(slow_squares, params.size(), net, weights, true);
    Tensor found = torch::stable::new_empty(weights, {int64_t(params.size())});
    Backend::update_sizes(
        {net, weights.const_data_ptr(), 1, dtype_of(weights, "weights"), tensors.data(), int64_t(tensors.size()), {},
         0, false},
        {{update_rms, max_update_rms}, squares.data()}, found);
    return found;
  }

  static std::tuple<Tensor, Tensor> unroll(
      Tensor grads, Tensor state, Tensor weights, Tensor step, int64_t features, int64_t hidden_size,
      int64_t num_layers, bool projection, int64_t output, double output_scale, double preprocess_p, double beta1,
      double beta2, double eps, bool linear_path) {
    const Network net = network(
        features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps,
        linear_path);
    weights = checked_weights(weights, net);
    const UnrollArguments arguments = unroll_arguments(net, grads, state, weights, step);
    Tensor updates = torch::stable::empty_like(grads), last = new_state_like(state);
    Backend::unroll(
        arguments, series(updates, "updates", weights, arguments.steps, arguments.count),
        states(last, "last", net, weights, arguments.count), weights);
    return {updates, last};
  }

  static std::tuple<Tensor, Tensor, Tensor> unroll_backward(
      Tensor d_updates, std::optional<Tensor> d_last, Tensor grads, Tensor state, Tensor weights, Tensor step,
      int64_t features, int64_t hidden_size, int64_t num_layers, bool projection, int64_t output,
      double output_scale, double preprocess_p, double beta1, double beta2, double eps, bool linear_path,
      bool need_grads, bool need_state, bool need_weights) {
    const Network net = network(
        features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps,
        linear_path);
    weights = checked_weights(weights, net);
    const UnrollArguments arguments = unroll_arguments(net, grads, state, weights, step);
    const int64_t horizon = arguments.steps, count = arguments.count;
    auto nothing = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
    Tensor d_grads = need_grads ? torch::stable::empty_like(grads) : nothing(grads);
    Tensor d_state = need_state ? new_state_like(state) : nothing(state);
    Tensor d_weights = need_weights ? torch::stable::empty_like(weights) : nothing(weights);
    UnrollGradients gradients{};
    gradients.d_updates = series(d_updates, "d_updates", weights, horizon, count);
    if (d_last) gradients.d_last = states(*d_last, "d_last", net, weights, count);
    if (need_grads) gradients.d_grads = series(d_grads, "d_grads", weights, horizon, count);
    if (need_state) gradients.d_state = states(d_state, "d_state", net, weights, count);
    if (need_weights) gradients.d_weights = d_weights.mutable_data_ptr();
    Backend::unroll_backward(arguments, gradients, weights);
    return {d_grads, d_state, d_weights};
  }
};

}  // namespace l2l
