// The ops on CPU tensors: checks, then the launchers. The schemas are in l2l_fast/ops.py.
#include "../arguments.h"

namespace l2l {
namespace {

const Parallel& torch_threads(Parallel& parallel) {
  parallel.threads = int(torch::stable::get_num_threads());
  parallel.run = [](int workers, void (*body)(void*, int), void* context) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, int(worker));
    });
  };
  return parallel;
}

void check_cpu(const Tensor& tensor, const char* name) {
  L2L_CHECK(tensor.is_cpu(), name, " must be on the CPU, where the other tensors are");
}

double scalar(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  L2L_CHECK(tensor.numel() == 1, name, " must be a single number, got shape ", shape_text(tensor));
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return *static_cast<const float*>(data);
    case torch::headeronly::ScalarType::Double: return *static_cast<const double*>(data);
    case torch::headeronly::ScalarType::Int: return *static_cast<const int32_t*>(data);
    case torch::headeronly::ScalarType::Long: return double(*static_cast<const int64_t*>(data));
    default: fail(name, " must be float32, float64, int32 or int64");
  }
}

void check_own_memory(const Tensor& tensor, int64_t dims, const char* name) {
  if (tensor.numel() == 0) return;  // the strides of nothing mean nothing
  for (int64_t d = 0; d < dims; ++d)
    L2L_CHECK(
        tensor.size(d) <= 1 || tensor.stride(d) != 0, name, " of shape ", shape_text(tensor),
        " is expanded: several coordinates share one place in memory");
}

StepTensor step_tensor(
    const Tensor& param, const Tensor& grad, const Tensor& state, const Tensor& step, const Network& net) {
  const int64_t dims = param.dim();
  for (const Tensor& tensor : {param, grad, state}) check_cpu(tensor, "a parameter, gradient or state");
  L2L_CHECK(
      grad.sizes() == param.sizes(), "a gradient has shape ", shape_text(grad), ", its parameter ", shape_text(param));
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
      scalar(step, "a step"),
  };
}

void lstm_step_(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor weights, Tensor lr,
    std::vector<Tensor> steps, std::string features, int64_t hidden_size, int64_t num_layers, bool projection,
    std::string output, double output_scale, double preprocess_p, double beta1, double beta2, double eps,
    double weight_decay, bool maximize) {
  const Network net =
      network(features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps);
  check_cpu(weights, "weights");
  weights = checked_weights(weights, net);
  L2L_CHECK(
      grads.size() == params.size() && states.size() == params.size() && steps.size() == params.size(),
      "lstm_step_ needs one gradient, state and step for each of the ", params.size(), " parameters, got ",
      grads.size(), ", ", states.size(), " and ", steps.size());
  std::vector<StepTensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i)
    tensors.push_back(step_tensor(params[i], grads[i], states[i], steps[i], net));
  Parallel parallel;
  lstm_step_cpu(
      {net, weights.const_data_ptr(), dtype_of(weights, "weights"), tensors.data(), int64_t(tensors.size()),
       scalar(lr, "lr"), weight_decay, maximize},
      torch_threads(parallel));
}

UnrollArguments unroll_arguments(
    const Network& net, const Tensor& grads, const Tensor& state, const Tensor& weights, const Tensor& step) {
  for (const Tensor& tensor : {grads, state, weights}) check_cpu(tensor, "grads, state and weights");
  L2L_CHECK(grads.dim() == 2, "grads must be [T, N], got shape ", shape_text(grads));
  const int64_t horizon = grads.size(0), count = grads.size(1);
  return {
      net,
      weights.const_data_ptr(),
      dtype_of(weights, "weights"),
      horizon,
      count,
      scalar(step, "step"),
      series(grads, "grads", weights, horizon, count),
      l2l::states(state, "state", net, count),
  };
}

std::tuple<Tensor, Tensor> lstm_unroll(
    Tensor grads, Tensor state, Tensor weights, Tensor step, std::string features, int64_t hidden_size,
    int64_t num_layers, bool projection, std::string output, double output_scale, double preprocess_p, double beta1,
    double beta2, double eps) {
  const Network net =
      network(features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps);
  weights = checked_weights(weights, net);
  const UnrollArguments arguments = unroll_arguments(net, grads, state, weights, step);
  Tensor updates = torch::stable::empty_like(grads), last = new_state_like(state);
  Parallel parallel;
  lstm_unroll_cpu(
      arguments, series(updates, "updates", weights, arguments.steps, arguments.count),
      l2l::states(last, "last", net, arguments.count), torch_threads(parallel));
  return {updates, last};
}

std::tuple<Tensor, Tensor, Tensor> lstm_unroll_backward(
    Tensor d_updates, std::optional<Tensor> d_last, Tensor grads, Tensor state, Tensor weights, Tensor step,
    std::string features, int64_t hidden_size, int64_t num_layers, bool projection, std::string output,
    double output_scale, double preprocess_p, double beta1, double beta2, double eps, bool need_grads, bool need_state,
    bool need_weights) {
  const Network net =
      network(features, hidden_size, num_layers, projection, output, output_scale, preprocess_p, beta1, beta2, eps);
  weights = checked_weights(weights, net);
  const UnrollArguments arguments = unroll_arguments(net, grads, state, weights, step);
  const int64_t horizon = arguments.steps, count = arguments.count;
  auto nothing = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor d_grads = need_grads ? torch::stable::empty_like(grads) : nothing(grads);
  Tensor d_state = need_state ? new_state_like(state) : nothing(state);
  Tensor d_weights = need_weights ? torch::stable::empty_like(weights) : nothing(weights);
  UnrollGradients gradients{};
  check_cpu(d_updates, "d_updates");
  gradients.d_updates = series(d_updates, "d_updates", weights, horizon, count);
  if (d_last) {
    check_cpu(*d_last, "d_last");
    gradients.d_last = l2l::states(*d_last, "d_last", net, count);
  }
  if (need_grads) gradients.d_grads = series(d_grads, "d_grads", weights, horizon, count);
  if (need_state) gradients.d_state = l2l::states(d_state, "d_state", net, count);
  if (need_weights) gradients.d_weights = d_weights.mutable_data_ptr();
  Parallel parallel;
  lstm_unroll_backward_cpu(arguments, gradients, torch_threads(parallel));
  return {d_grads, d_state, d_weights};
}

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  m.impl("lstm_step_", TORCH_BOX(&l2l::lstm_step_));
  m.impl("lstm_unroll", TORCH_BOX(&l2l::lstm_unroll));
  m.impl("lstm_unroll_backward", TORCH_BOX(&l2l::lstm_unroll_backward));
}
