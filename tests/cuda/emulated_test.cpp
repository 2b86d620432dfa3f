// The CUDA kernels over emulator.h and without torch, for the sanitizers: every option at awkward sizes, with buffers
// of the exact size. Built and run by test_emulated.py.
#include "../../csrc/cuda/device.cuh"
#include "../kernel_cases.h"

using namespace l2l;

namespace {

struct Emulated {
  void step(const StepArguments& arguments) const {
    std::vector<char> workspace(lstm_step_cuda_workspace(arguments));
    lstm_step_cuda(arguments, workspace.data(), nullptr);
  }
  void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes) const {
    std::vector<double> aligned((lstm_step_scaled_cuda_workspace(arguments) + 7) / 8, NAN);
    lstm_step_scaled_cuda(arguments, sizes, aligned.data(), nullptr);
  }
  void update_sizes(const StepArguments& arguments, const UpdateSizes& sizes, void* found) const {
    std::vector<double> aligned(lstm_update_sizes_cuda_workspace(arguments) / 8, NAN);
    lstm_update_sizes_cuda(arguments, sizes, found, aligned.data(), nullptr);
  }
  void unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last) const {
    std::vector<char> workspace(lstm_unroll_cuda_workspace(arguments));
    lstm_unroll_cuda(arguments, updates, last, workspace.data(), nullptr);
  }
  void unroll_backward(const UnrollArguments& arguments, const UnrollGradients& gradients) const {
    std::vector<double> aligned((lstm_unroll_backward_cuda_workspace(arguments, gradients) + 7) / 8, NAN);
    lstm_unroll_backward_cuda(arguments, gradients, aligned.data(), nullptr);
  }
};

}  // namespace

int main() {
  for (const char* shared : {"232448", "1000"}) {  // scratch on chip, and in the workspace
    setenv("L2L_EMULATED_SHARED", shared, 1);
    for (Features features : {Features::identity, Features::log_sign, Features::moments, Features::both})
      for (int hidden : {1, 3, 17})
        for (int layers : {1, 2})
          for (bool projection : {false, true})
            for (int64_t count : {0, 1, 33}) {
              const bool linear_path = (hidden == 3) != (layers == 2);
              const Network net = {features, hidden, layers, projection, projection, linear_path,
                                   0.1,      10,     0.95,   0.95,       1e-8};
              if (hidden < 4) run<float>(net, count, 1 + count % 3, DType::float32, Emulated());
              run<double>(net, count, 2, DType::float64, Emulated());
            }
  }
  return verdict();
}
