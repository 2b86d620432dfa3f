// Forward and backward through time: the coordinates are cut into tiles, and a thread takes a tile
// through all its steps.
#include "../lstm_unroll.h"
#include "isa.h"
#include "pack.h"
#include "schedule.h"

namespace l2l {
namespace {

// Tiles of the backward run are added up in slots, and slots in their order, so that the sum does not depend on which
// thread did what. This much memory, and no more than this many slots.
constexpr int64_t kSlotBytes = 8 << 20;
constexpr int64_t kSlots = 128;

// A tile's whole truncation should stay in the second-level cache; longer ones get narrower tiles.
constexpr int64_t kTruncationBytes = 2 << 20;

template <class T>
std::vector<Corrections<T>> all_corrections(const UnrollArguments& arguments) {
  const double first = read(arguments.first_step);
  std::vector<Corrections<T>> corrections;
  for (int64_t t = 0; t < arguments.steps; ++t)
    corrections.push_back(bias_corrections<T>(arguments.net, first + double(t)));
  return corrections;
}

template <class T>
void unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, const Parallel& parallel) {
  const Network& net = arguments.net;
  const UnrollKernels<T>& kernels = current_unroll<T>();
  const Packer<T> packer(net, static_cast<const T*>(arguments.weights), Packer<T>::kForward);
  const auto corrections = all_corrections<T>(arguments);
  const UnrollCall<T> call = {&packer.packed(), corrections.data(), &arguments, nullptr, nullptr};
  const int64_t tiles = (arguments.count + kernels.tile - 1) / kernels.tile;
  const int workers = useful_workers(parallel, net, double(arguments.count) * double(arguments.steps));
  const Scratch<T> scratch(workers, forward_scratch(net, kernels.tile));
  share(parallel, workers, tiles, 1, [&](int worker, int64_t tile) {
    const int64_t first = tile * kernels.tile;
    const int count = int(std::min<int64_t>(kernels.tile, arguments.count - first));
    kernels.unroll(call, updates, last, first, count, scratch.of(worker));
  });
}

// The coordinates with an update that has a gradient, where that alone decides what the others add to the gradient of
// the weights: nothing. Of an image classifier's many are left out, those of the pixels that no image of the window had
// anything in.
template <class T>
std::vector<int64_t> with_gradient(const UnrollArguments& arguments, const Matrix& d_updates) {
  std::vector<char> found(arguments.count);
  for (int64_t t = 0; t < arguments.steps; ++t) {
    const T* row = static_cast<const T*>(d_updates.data) + t * d_updates.row;
    for (int64_t i = 0; i < arguments.count; ++i) found[i] |= row[i * d_updates.column] != 0;
  }
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < arguments.count; ++i)
    if (found[i]) chosen.push_back(i);
  return chosen;
}

template <class T>
void unroll_backward(const UnrollArguments& arguments, const UnrollGradients& gradients, const Parallel& parallel) {
  const Network& net = arguments.net;
  const UnrollKernels<T>& kernels = current_unroll<T>();
  const Packer<T> packer(net, static_cast<const T*>(arguments.weights), Packer<T>::kBackward);
  const auto corrections = all_corrections<T>(arguments);
  const bool weights_alone = !gradients.d_last.data && !gradients.d_grads.data && !gradients.d_state.data;
  const auto chosen = weights_alone ? with_gradient<T>(arguments, gradients.d_updates) : std::vector<int64_t>();
  const int64_t count = weights_alone ? int64_t(chosen.size()) : arguments.count;
  const UnrollCall<T> call = {
      &packer.packed(), corrections.data(), &arguments, &gradients, count < arguments.count ? chosen.data() : nullptr};

  int width = kernels.tile;
  while (width > kernels.lanes &&
         kernels.backward_scratch(net, width, arguments.steps) * int64_t(sizeof(T)) > kTruncationBytes)
    width /= 2;
  const int64_t tiles = (count + width - 1) / width;
  const int64_t weights = gradients.d_weights ? WeightLayout{net}.count() : 0;
  const int64_t slots = std::min({tiles, kSlots, std::max<int64_t>(8, kSlotBytes / 8 / std::max<int64_t>(weights, 1))});
  const int workers = int(
      std::min<int64_t>(slots, useful_workers(parallel, net, 3.0 * double(count) * double(arguments.steps))));

  std::vector<double> sums(slots * weights);
  if (slots > 0) {
    const Scratch<T> scratch(workers, kernels.backward_scratch(net, width, arguments.steps));
    share(parallel, workers, slots, 1, [&](int worker, int64_t slot) {
      double* sum = weights ? sums.data() + slot * weights : nullptr;
      for (int64_t tile = slot * tiles / slots; tile < (slot + 1) * tiles / slots; ++tile) {
        const int some = int(std::min<int64_t>(width, count - tile * width));
        kernels.unroll_backward(call, tile * width, some, scratch.of(worker), sum);
      }
    });
  }
  for (int64_t k = 0; k < weights; ++k) {
    double total = 0;
    for (int64_t slot = 0; slot < slots; ++slot) total += sums[slot * weights + k];
    static_cast<T*>(gradients.d_weights)[k] = T(total);
  }
}

}  // namespace

void lstm_unroll_cpu(
    const UnrollArguments& arguments, const Matrix& updates, const Matrix& last, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64) return unroll<double>(arguments, updates, last, parallel);
  unroll<float>(arguments, updates, last, parallel);
}

void lstm_unroll_backward_cpu(
    const UnrollArguments& arguments, const UnrollGradients& gradients, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64) return unroll_backward<double>(arguments, gradients, parallel);
  unroll_backward<float>(arguments, gradients, parallel);
}

}  // namespace l2l
