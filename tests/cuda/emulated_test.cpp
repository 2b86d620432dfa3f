// The CUDA kernels over emulator.h and without torch, for the sanitizers: every option at awkward sizes, with buffers
// of the exact size. Built and run by test_emulated.py.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/lstm_step.h"
#include "../../csrc/lstm_unroll.h"

using namespace l2l;

namespace {

int failures = 0;

void expect(bool good, const char* what) {
  if (good) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
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

template <class T>
void run(const Network& net, int64_t count, int64_t horizon, DType dtype) {
  const int rows = net.state_rows();
  const auto weights = random<T>(WeightLayout{net}.count(), 0.3);
  std::vector<T> state = random<T>(count * rows, 0.5);
  for (int64_t i = 0; net.has_moments() && i < count; ++i) state[count + i] = std::fabs(state[count + i]);
  std::vector<T> param(count), grad = random<T>(count, 1e-2);
  if (count > 2) grad[2] = T(NAN);
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
                             step};
  const std::vector<T> before = state;
  const StepArguments step_arguments = {
      net, weights.data(), dtype, &tensor, 1, {&lr, Number::float32}, 0.1, false};
  std::vector<char> workspace(lstm_step_cuda_workspace(step_arguments));
  lstm_step_cuda(step_arguments, workspace.data(), nullptr);
  expect(finite(param) && finite(state), "step is finite");
  if (count > 2) expect(param[2] == 0 && state[2] == before[2], "a gradient that is not finite changes nothing");

  std::vector<T> grads = random<T>(horizon * count, 1e-2), updates = unwritten<T>(horizon * count);
  std::vector<T> last = unwritten<T>(count * rows);
  if (count > 2 && horizon > 1) grads[count + 2] = T(INFINITY);
  const UnrollArguments arguments = {net,
                                     weights.data(),
                                     dtype,
                                     horizon,
                                     count,
                                     step,
                                     {grads.data(), dtype, count, one},
                                     {state.data(), dtype, one, count}};
  workspace.resize(lstm_unroll_cuda_workspace(arguments));
  lstm_unroll_cuda(
      arguments, {updates.data(), dtype, count, 1}, {last.data(), dtype, 1, count}, workspace.data(), nullptr);
  expect(finite(updates) && finite(last), "unroll is finite");

  std::vector<T> d_grads = unwritten<T>(horizon * count), d_state = unwritten<T>(count * rows);
  std::vector<T> d_weights = unwritten<T>(int64_t(weights.size()));
  const UnrollGradients gradients = {
      {updates.data(), dtype, count, 1},
      {last.data(), dtype, 1, count},
      {d_grads.data(), dtype, count, 1},
      {d_state.data(), dtype, 1, count},
      d_weights.data()};
  std::vector<double> aligned((lstm_unroll_backward_cuda_workspace(arguments, gradients) + 7) / 8, NAN);
  lstm_unroll_backward_cuda(arguments, gradients, aligned.data(), nullptr);
  expect(finite(d_grads) && finite(d_state) && finite(d_weights), "backward is finite");
}

}  // namespace

int main() {
  for (const char* shared : {"232448", "1000"}) {  // scratch on chip, and in the workspace
    setenv("L2L_EMULATED_SHARED", shared, 1);
    for (Features features : {Features::identity, Features::log_sign, Features::moments, Features::both})
      for (int hidden : {1, 3, 17})
        for (int layers : {1, 2})
          for (bool projection : {false, true})
            for (int64_t count : {0, 1, 33}) {
              const Network net = {features, hidden, layers, projection, projection, 0.1, 10, 0.95, 0.95, 1e-8};
              if (hidden < 4) run<float>(net, count, 1 + count % 3, DType::float32);
              run<double>(net, count, 2, DType::float64);
            }
  }
  if (failures == 0) std::printf("all good\n");
  return failures != 0;
}
