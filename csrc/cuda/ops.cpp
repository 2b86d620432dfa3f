// The ops on CUDA tensors; on CPU tensors where tests/cuda/emulator.h stands in for a GPU.
#include "../ops.h"

#ifdef L2L_CUDA_EMULATOR
#define L2L_DISPATCH_KEY CPU
#else
#define L2L_DISPATCH_KEY CUDA
#include <torch/csrc/stable/accelerator.h>
// In libtorch since 2.6; the header declares it only where the whole of torch is compiled for CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace l2l {
namespace {

// Makes the tensor's device the current one for as long as it lives, and knows torch's current stream there.
class Place {
 public:
#ifdef L2L_CUDA_EMULATOR
  explicit Place(const Tensor&) {}
#else
  explicit Place(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#ifndef L2L_CUDA_EMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Torch's allocator hands memory that is freed here to later work on the same stream only.
Tensor workspace_of(int64_t bytes, const Tensor& like) {
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

struct Cuda {
  static void step(const StepArguments& arguments, const Tensor& weights) {
    const Place place(weights);
    const int64_t bytes = lstm_step_cuda_workspace(arguments);
    if (bytes == 0) return lstm_step_cuda(arguments, nullptr, place.stream());
    Tensor workspace = workspace_of(bytes, weights);
    lstm_step_cuda(arguments, workspace.mutable_data_ptr(), place.stream());
  }

  static void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes, const Tensor& weights) {
    const Place place(weights);
    Tensor workspace = workspace_of(lstm_step_scaled_cuda_workspace(arguments), weights);
    lstm_step_scaled_cuda(arguments, sizes, workspace.mutable_data_ptr(), place.stream());
  }

  static void update_sizes(const StepArguments& arguments, const UpdateSizes& sizes, Tensor& found) {
    const Place place(found);
    Tensor workspace = workspace_of(lstm_update_sizes_cuda_workspace(arguments), found);
    lstm_update_sizes_cuda(
        arguments, sizes, found.mutable_data_ptr(), workspace.mutable_data_ptr(), place.stream());
  }

  static void unroll(
      const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, const Tensor& weights) {
    const Place place(weights);
    Tensor workspace = workspace_of(lstm_unroll_cuda_workspace(arguments), weights);
    lstm_unroll_cuda(arguments, updates, last, workspace.mutable_data_ptr(), place.stream());
  }

  static void unroll_backward(
      const UnrollArguments& arguments, const UnrollGradients& gradients, const Tensor& weights) {
    const Place place(weights);
    Tensor workspace = workspace_of(lstm_unroll_backward_cuda_workspace(arguments, gradients), weights);
    lstm_unroll_backward_cuda(arguments, gradients, workspace.mutable_data_ptr(), place.stream());
  }
};

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_fast, L2L_DISPATCH_KEY, m) {
  using Ops = l2l::Ops<l2l::Cuda>;
  m.impl("lstm_step_", TORCH_BOX(&Ops::step));
  m.impl("lstm_step_scaled_", TORCH_BOX(&Ops::step_scaled));
  m.impl("lstm_update_sizes_", TORCH_BOX(&Ops::update_sizes));
  m.impl("lstm_unroll", TORCH_BOX(&Ops::unroll));
  m.impl("lstm_unroll_backward", TORCH_BOX(&Ops::unroll_backward));
}
