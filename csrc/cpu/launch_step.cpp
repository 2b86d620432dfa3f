// The step of a whole param group: every tensor is cut into tiles, and the tiles of all are shared among the threads.
#include <cmath>
#include <numeric>

#include "../lstm_step.h"
#include "isa.h"
#include "pack.h"
#include "schedule.h"

namespace l2l {
namespace {

// A tensor with its dimensions in the parameter's memory order, neighbours merged where all three tensors allow it, so
// that tensors that share one dense memory order have one dimension.
struct Flat {
  std::vector<int64_t> sizes, param, grad, state;
  StepTensor tensor;

  explicit Flat(const StepTensor& from) : tensor(from) {
    std::vector<int> order(from.dims);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(
        order.begin(), order.end(), [&](int a, int b) { return from.param.strides[a] > from.param.strides[b]; });
    for (int d : order) {
      const int64_t size = from.sizes[d];
      const int64_t strides[] = {from.param.strides[d], from.grad.strides[d], from.state.strides[d]};
      if (size == 1) continue;
      if (!sizes.empty() && param.back() == strides[0] * size && grad.back() == strides[1] * size &&
          state.back() == strides[2] * size) {
        sizes.back() *= size;
        param.back() = strides[0];
        grad.back() = strides[1];
        state.back() = strides[2];
      } else {
        sizes.push_back(size);
        param.push_back(strides[0]);
        grad.push_back(strides[1]);
        state.push_back(strides[2]);
      }
    }
    if (sizes.empty()) sizes = param = grad = state = {1};
    tensor.dims = int(sizes.size());
    tensor.sizes = sizes.data();
    tensor.param.strides = param.data();
    tensor.grad.strides = grad.data();
    tensor.state.strides = state.data();
  }
  Flat(Flat&&) = default;  // a moved vector keeps its memory, so the pointers stay good
};

template <class T>
void step(const StepArguments& arguments, const Parallel& parallel) {
  const Network& net = arguments.net;
  const StepKernel<T>& kernel = current_step<T>();
  std::vector<Flat> flats;
  std::vector<Corrections<T>> corrections;
  std::vector<int64_t> starts;  // the first tile of each tensor
  int64_t tiles = 0, coordinates = 0;
  flats.reserve(arguments.tensor_count);
  for (int64_t i = 0; i < arguments.tensor_count; ++i) {
    const StepTensor& tensor = arguments.tensors[i];
    if (tensor.count == 0) continue;
    flats.emplace_back(tensor);
    corrections.push_back(bias_corrections<T>(net, tensor.step));
    starts.push_back(tiles);
    tiles += (tensor.count + kernel.tile - 1) / kernel.tile;
    coordinates += tensor.count;
  }
  if (tiles == 0) return;

  const Packer<T> packer(net, static_cast<const T*>(arguments.weights), Packer<T>::kForward, kernel.order);
  const StepCall<T> call = {&packer.packed(), T(arguments.lr), T(arguments.weight_decay), arguments.maximize};
  const int workers = useful_workers(parallel, net, double(coordinates));
  const Scratch<T> scratch(workers, forward_scratch(net, kernel.tile));
  share(parallel, workers, tiles, 4, [&](int worker, int64_t tile) {
    const size_t i = std::upper_bound(starts.begin(), starts.end(), tile) - starts.begin() - 1;
    const StepTensor& tensor = flats[i].tensor;
    const int64_t first = (tile - starts[i]) * kernel.tile;
    const int count = int(std::min<int64_t>(kernel.tile, tensor.count - first));
    kernel.step(call, tensor, corrections[i], first, count, scratch.of(worker));
  });
}

}  // namespace

void lstm_step_cpu(const StepArguments& arguments, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64) return step<double>(arguments, parallel);
  step<float>(arguments, parallel);
}

}  // namespace l2l
