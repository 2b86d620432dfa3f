// The kernels without torch, for the sanitizers: every option at awkward sizes, with buffers of the exact size, and the
// approximations held to their bounds. Built and run by csrc/sanitize.sh and by test_sanitized.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "approximations.h"

using namespace l2l;

namespace {

int failures = 0;

void expect(bool good, const char* what) {
  if (good) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

void run_threads(int workers, void (*body)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

float uniform() { return float(std::rand()) / float(RAND_MAX) * 2 - 1; }

template <class T>
std::vector<T> random(int64_t count, float scale) {
  std::vector<T> values(count);
  for (T& value : values) value = T(scale * uniform());
  return values;
}

template <class T>
bool finite(const std::vector<T>& values) {
  for (T value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

template <class T>
void run(const Network& net, int64_t count, int64_t horizon, DType dtype) {
  const int rows = net.state_rows();
  const auto weights = random<T>(WeightLayout{net}.count(), 0.3f);
  std::vector<T> state = random<T>(count * rows, 0.5f);
  for (int64_t i = 0; net.has_moments() && i < count; ++i) state[count + i] = std::fabs(state[count + i]);
  std::vector<T> param(count), grad = random<T>(count, 1e-2f);
  if (count > 2) grad[2] = T(NAN);
  const int64_t one = 1;
  const double step = 2, lr = 0.5;
  const Parallel parallel = {2, run_threads};

  const StepTensor tensor = {
      1,     &count, count, {param.data(), dtype, &one}, {grad.data(), dtype, &one}, {state.data(), dtype, &one},
      count, {&step, Number::float64}};
  const std::vector<T> before = state;
  lstm_step_cpu({net, weights.data(), dtype, &tensor, 1, {&lr, Number::float64}, 0.1, false}, parallel);
  expect(finite(param) && finite(state), "step is finite");
  if (count > 2) expect(param[2] == 0 && state[2] == before[2], "a gradient that is not finite changes nothing");

  std::vector<T> grads = random<T>(horizon * count, 1e-2f), updates(horizon * count), last(count * rows);
  if (count > 2 && horizon > 1) grads[count + 2] = T(INFINITY);
  const UnrollArguments arguments = {net,
                                     weights.data(),
                                     dtype,
                                     horizon,
                                     count,
                                     {&step, Number::float64},
                                     {grads.data(), dtype, count, 1},
                                     {state.data(), dtype, 1, count}};
  lstm_unroll_cpu(arguments, {updates.data(), dtype, count, 1}, {last.data(), dtype, 1, count}, parallel);
  expect(finite(updates) && finite(last), "unroll is finite");

  std::vector<T> d_grads(horizon * count), d_state(count * rows), d_weights(weights.size());
  const UnrollGradients gradients = {
      {updates.data(), dtype, count, 1},
      {last.data(), dtype, 1, count},
      {d_grads.data(), dtype, count, 1},
      {d_state.data(), dtype, 1, count},
      d_weights.data()};
  lstm_unroll_backward_cpu(arguments, gradients, parallel);
  expect(finite(d_grads) && finite(d_state) && finite(d_weights), "backward is finite");
}

}  // namespace

int main() {
  std::vector<std::string> isas = cpu_isas();
  for (const std::string& isa : cpu_bf16_isas()) isas.push_back(isa);
  for (const std::string& isa : isas) {
    std::printf("%s\n", isa.c_str());
    use_cpu_isa(isa);
    for (Features features : {Features::identity, Features::log_sign, Features::moments, Features::both})
      for (int hidden : {1, 5, 20, 33})
        for (int layers : {1, 2, 3})
          for (bool projection : {false, true})
            for (int64_t count : {0, 1, 9, 63, 64, 65, 200}) {
              const Network net = {features, hidden, layers, projection, projection, 0.1, 10, 0.95, 0.95, 1e-8};
              run<float>(net, count, 1 + count % 3, DType::float32);
              if (count < 64) run<double>(net, count, 2, DType::float64);
            }
  }
  for (const Approximations& approximations : all_approximations()) {
    std::printf(
        "%-9s exp2 %.2e  log %.2e  sigmoid %.2e  tanh %.2e\n", approximations.name, exp2_error(approximations),
        log_error(approximations), sigmoid_error(approximations), tanh_error(approximations));
    expect(exp2_error(approximations) <= 2e-7, "exp2 within its bound");
    expect(log_error(approximations) <= 1, "log within its bound");
    expect(sigmoid_error(approximations) <= 1.5e-7, "sigmoid within its bound");
    expect(tanh_error(approximations) <= 2e-7, "tanh within its bound");
    expect(special_values(approximations), "zeros, infinities and NaN");
  }
  if (failures == 0) std::printf("all good\n");
  return failures != 0;
}
