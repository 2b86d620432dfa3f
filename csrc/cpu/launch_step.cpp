// The step of a whole param group: every tensor is cut into tiles, and the tiles of all are shared among the threads.
#include "../flat.h"
#include "../lstm_step.h"
#include "isa.h"
#include "pack.h"
#include "schedule.h"

namespace l2l {
namespace {

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
    corrections.push_back(bias_corrections<T>(net, read(tensor.step)));
    starts.push_back(tiles);
    tiles += (tensor.count + kernel.tile - 1) / kernel.tile;
    coordinates += tensor.count;
  }
  if (tiles == 0) return;

  const Packer<T> packer(net, static_cast<const T*>(arguments.weights), Packer<T>::kForward, kernel.order);
  const StepCall<T> call = {&packer.packed(), T(read(arguments.lr)), T(arguments.weight_decay), arguments.maximize};
  const int workers = useful_workers(parallel, net, double(coordinates));
  const Scratch<T> scratch(workers, ForwardScratch<T>::size(net, kernel.tile));
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
