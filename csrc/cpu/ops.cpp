// The ops on CPU tensors.
#include "../ops.h"

namespace l2l {
namespace {

struct Cpu {
  static Parallel threads() {
    return {int(torch::stable::get_num_threads()), [](int workers, void (*body)(void*, int), void* context) {
              torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
                for (int64_t worker = begin; worker < end; ++worker) body(context, int(worker));
              });
            }};
  }

  static void step(const StepArguments& arguments, const Tensor&) { lstm_step_cpu(arguments, threads()); }
  static void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes, const Tensor&) {
    lstm_step_scaled_cpu(arguments, sizes, threads());
  }

  static void update_sizes(const StepArguments& arguments, const UpdateSizes& sizes, Tensor& found) {
    lstm_update_sizes_cpu(arguments, sizes, found.mutable_data_ptr(), threads());
  }
  static void unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, const Tensor&) {
    lstm_unroll_cpu(arguments, updates, last, threads());
  }
  static void unroll_backward(
      const UnrollArguments& arguments, const UnrollGradients& gradients, const Tensor&) {
    lstm_unroll_backward_cpu(arguments, gradients, threads());
  }
};

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  using Ops = l2l::Ops<l2l::Cpu>;
  m.impl("lstm_step_", TORCH_BOX(&Ops::step));
  m.impl("lstm_step_scaled_", TORCH_BOX(&Ops::step_scaled));
  m.impl("lstm_update_sizes_", TORCH_BOX(&Ops::update_sizes));
  m.impl("lstm_unroll", TORCH_BOX(&Ops::unroll));
  m.impl("lstm_unroll_backward", TORCH_BOX(&Ops::unroll_backward));
}
