// torch's current stream, under the name that torch's headers declare, found where torch has it when it is first called.
//
// It is all that the CUDA ops need of libtorch_cuda. Were the extension linked to that library, a build with CUDA kernels
// would not load under a torch without CUDA, and its CPU kernels would be lost there.
#include <dlfcn.h>

#include <cstdint>

extern "C" __attribute__((visibility("hidden"))) int32_t aoti_torch_get_current_cuda_stream(
    int32_t device, void** stream) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function found = [] {
    // Loaded already wherever there are CUDA tensors.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  constexpr int32_t kFailure = 1;  // AOTI_TORCH_FAILURE
  return found ? found(device, stream) : kFailure;
}
