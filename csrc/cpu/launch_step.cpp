// The step of a whole param group: every tensor is cut into tiles, and the tiles of all are shared among the threads.
#include <cmath>
#include <vector>

#include "../flat.h"
#include "../lstm_step.h"
#include "isa.h"
#include "vec.h"
#include "coordinates.h"
#include "pack.h"
#include "schedule.h"

namespace l2l {
namespace {

// The packed weights: of one network for all workers, of several for each worker those of the one that it is at. As
// tensors of a network follow each other, few are packed twice.
template <class T>
class PackedNetworks {
 public:
  PackedNetworks(const StepArguments& arguments, WeightOrder order, int workers)
      : arguments_(arguments), order_(order), held_(arguments.networks == 1 ? 1 : workers) {
    if (arguments.networks == 1) packed(0, 0);
  }

  const Packed<T>& packed(int worker, int network) {
    Held& held = held_[held_.size() == 1 ? 0 : worker];
    if (held.network != network) {
      const T* weights = static_cast<const T*>(arguments_.weights) + network * WeightLayout{arguments_.net}.count();
      held.packer = std::make_unique<Packer<T>>(arguments_.net, weights, Packer<T>::kForward, order_);
      held.network = network;
    }
    return held.packer->packed();
  }

  // What a worker takes in one go: a network, where there are enough for all workers.
  int64_t tiles_at_a_time(int64_t tiles, int workers) const {
    const int64_t each = tiles / arguments_.networks;
    return arguments_.networks >= 4 * workers ? std::max<int64_t>(4, each) : 4;
  }

 private:
  struct Held {
    int network = -1;
    std::unique_ptr<Packer<T>> packer;
  };

  const StepArguments& arguments_;
  const WeightOrder order_;
  std::vector<Held> held_;
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
    corrections.push_back(bias_corrections<T>(net, read(tensor.step)));
    starts.push_back(tiles);
    tiles += (tensor.count + kernel.tile - 1) / kernel.tile;
    coordinates += tensor.count;
  }
  if (tiles == 0) return;

  const int workers = useful_workers(parallel, net, double(coordinates));
  PackedNetworks<T> networks(arguments, kernel.order, workers);
  const StepCall<T> call = {nullptr, T(read(arguments.lr)), T(arguments.weight_decay), arguments.maximize};
  const Scratch<T> scratch(workers, ForwardScratch<T>::size(net, kernel.tile));
  share(parallel, workers, tiles, networks.tiles_at_a_time(tiles, workers), [&](int worker, int64_t tile) {
    const size_t i = std::upper_bound(starts.begin(), starts.end(), tile) - starts.begin() - 1;
    const StepTensor& tensor = flats[i].tensor;
    const int64_t first = (tile - starts[i]) * kernel.tile;
    const int count = int(std::min<int64_t>(kernel.tile, tensor.count - first));
    StepCall<T> with = call;
    with.packed = &networks.packed(worker, tensor.network);
    kernel.step(with, tensor, corrections[i], first, count, scratch.of(worker));
  });
}

// Coordinates that are summed, then moved, at a time.
constexpr int64_t kBlock = 4096;
// Coordinates whose updates are held at a time, unless one tensor has more.
constexpr int64_t kTogether = int64_t(1) << 18;

// Part of one tensor, whose updates lie densely in the parameter's memory order.
struct Block {
  int64_t tensor, first;
  int count;
};

template <class T>
double sum_of_squares(const T* u, int count) {
  double sums[4] = {};  // one would wait for itself
  int i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += double(u[i + k]) * double(u[i + k]);
  for (; i < count; ++i) sums[0] += double(u[i]) * double(u[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// f(i, element) of coordinates first + i of one of a tensor's three, in the parameter's memory order.
template <class F>
void for_each_of(const Strided& of, const StepTensor& tensor, int64_t first, int count, F f) {
  with_dtype(of.dtype, [&](auto* null) {
    using E = std::remove_pointer_t<decltype(null)>;
    if (tensor.dims == 1) {
      const int64_t stride = of.strides[0];
      return for_each<E>({of.data, of.dtype, stride, nullptr}, first * stride, count, f);
    }
    int64_t offsets[256];
    for (int at = 0; at < count; at += 256) {
      const int some = std::min(256, count - at);
      offsets_of(tensor.dims, tensor.sizes, of.strides, first + at, some, offsets);
      for_each<E>({of.data, of.dtype, 1, offsets}, 0, some, [&](int i, E& x) { f(at + i, x); });
    }
  });
}

template <class T>
double sum_of_squares(const Strided& of, const StepTensor& tensor, const Block& block) {
  double sum = 0;
  for_each_of(of, tensor, block.first, block.count, [&](int, const auto& element) {
    const double x = double(T(widen(element)));
    sum += x * x;
  });
  return sum;
}

std::vector<Block> blocks_of(const std::vector<Flat>& flats) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < flats.size(); ++i)
    for (int64_t first = 0, count = flats[i].tensor.count; first < count; first += kBlock)
      blocks.push_back({int64_t(i), first, int(std::min(kBlock, count - first))});
  return blocks;
}

// f(b) of all blocks, a worker for as many coordinates as eight whole ones have.
template <class F>
void for_each_block(const Parallel& parallel, const std::vector<Block>& blocks, const F& f) {
  int64_t coordinates = 0;
  for (const Block& block : blocks) coordinates += block.count;
  const int workers = int(std::clamp<int64_t>(coordinates / (8 * kBlock), 1, parallel.threads));
  share(parallel, workers, int64_t(blocks.size()), 4, [&](int, int64_t b) { f(b); });
}

// r of each tensor, whose squares stand in the same order; moves these on.
template <class T>
std::vector<double> update_sizes(
    const Network& net, const std::vector<Flat>& flats, const std::vector<Block>& blocks, const UpdateSize& size,
    const std::vector<T*>& squares, const Parallel& parallel) {
  struct Sums {
    double grad = 0, m = 0;
  };
  std::vector<Sums> parts(blocks.size()), sums(flats.size());
  for_each_block(parallel, blocks, [&](int64_t b) {
    const StepTensor& tensor = flats[blocks[b].tensor].tensor;
    parts[b].grad = sum_of_squares<T>(tensor.grad, tensor, blocks[b]);
    parts[b].m = sum_of_squares<T>(tensor.state, tensor, blocks[b]);  // the first row: m
  });
  for (size_t b = 0; b < blocks.size(); ++b) {
    Sums& sum = sums[blocks[b].tensor];
    sum.grad += parts[b].grad, sum.m += parts[b].m;
  }
  std::vector<double> found(flats.size());
  for (size_t i = 0; i < flats.size(); ++i) {
    const StepTensor& tensor = flats[i].tensor;
    const double n = std::max(1.0, double(tensor.count)), limit = net.gradient_limit(sizeof(T) == 8, tensor.state.dtype);
    const bool finite = std::sqrt(sums[i].grad) < limit;
    found[i] = size.next(*squares[i], sums[i].grad / n, finite, sums[i].m / n, read(tensor.step), net.beta1);
  }
  return found;
}

// u is -0.0 where the step has not touched it, since the gradient is not finite: such a coordinate keeps its value.
template <class T>
void move_block(const StepTensor& tensor, const T* u, int64_t first, int count, T factor, T decay) {
  for_each_of(tensor.param, tensor, first, count, [&](int i, auto& theta) {
    const T update = u[i];
    if (update == 0 && std::signbit(update)) return;
    const T change = decay == 0 ? factor * update : factor * update - decay * T(widen(theta));
    narrow(widen(theta) + change, theta);
  });
}

// The step onto memory of -0.0 that lies as the parameters do, which then holds u; then two passes over that.
template <class T>
void step_scaled(
    const StepArguments& arguments, const StepTensor* from, int64_t count, const UpdateSizes& sizes,
    const Parallel& parallel) {
  std::vector<Flat> flats, onto;
  std::vector<T*> squares_of;
  std::vector<StepTensor> raw;
  std::vector<int64_t> starts;
  int64_t coordinates = 0;
  flats.reserve(count);
  onto.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (from[i].count == 0) continue;
    flats.emplace_back(from[i]);
    if (sizes.squares) squares_of.push_back(static_cast<T*>(sizes.squares[i]));
    starts.push_back(coordinates);
    coordinates += from[i].count;
  }
  const T one = 1;
  std::vector<T> updates(coordinates, T(-0.0));
  for (size_t i = 0; i < flats.size(); ++i) {
    onto.push_back(flats[i]);
    Flat& flat = onto.back();
    flat.param = in_a_row(flat.tensor.dims, flat.sizes.data());
    flat.tensor.param = {
        updates.data() + starts[i], sizeof(T) == 8 ? DType::float64 : DType::float32, flat.param.data()};
    raw.push_back(flat.tensor);
  }
  StepArguments step_arguments = arguments;
  step_arguments.tensors = raw.data();
  step_arguments.tensor_count = int64_t(raw.size());
  step_arguments.lr = {&one, sizeof(T) == 8 ? Number::float64 : Number::float32};
  step_arguments.weight_decay = 0;
  step<T>(step_arguments, parallel);

  const std::vector<Block> blocks = blocks_of(flats);
  std::vector<double> size(flats.size(), sizes.size.rms);
  if (sizes.squares) size = update_sizes(arguments.net, flats, blocks, sizes.size, squares_of, parallel);
  std::vector<double> parts(blocks.size()), sums(flats.size());
  auto start = [&](const Block& block) { return updates.data() + starts[block.tensor] + block.first; };
  for_each_block(parallel, blocks, [&](int64_t b) { parts[b] = sum_of_squares(start(blocks[b]), blocks[b].count); });
  for (size_t b = 0; b < blocks.size(); ++b) sums[blocks[b].tensor] += parts[b];
  std::vector<T> factors(flats.size());
  const T lr = T(read(arguments.lr)), decay = lr * T(arguments.weight_decay);
  for (size_t i = 0; i < flats.size(); ++i) {
    const T root = T(std::sqrt(sums[i] / double(flats[i].tensor.count)));
    factors[i] = root >= T(0x1p-126) ? lr * T(size[i]) / root : T(0);  // reference.SMALLEST
  }
  for_each_block(parallel, blocks, [&](int64_t b) {
    const Block& block = blocks[b];
    const StepTensor& tensor = flats[block.tensor].tensor;
    move_block(tensor, start(block), block.first, block.count, factors[block.tensor], decay);
  });
}

template <class T>
void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes, const Parallel& parallel) {
  for (int64_t first = 0, last; first < arguments.tensor_count; first = last) {
    int64_t coordinates = 0;
    for (last = first; last < arguments.tensor_count && (last == first || coordinates < kTogether); ++last)
      coordinates += arguments.tensors[last].count;
    UpdateSizes with = sizes;
    if (with.squares) with.squares += first;
    step_scaled<T>(arguments, arguments.tensors + first, last - first, with, parallel);
  }
}

template <class T>
void update_sizes(const StepArguments& arguments, const UpdateSizes& sizes, T* found, const Parallel& parallel) {
  std::vector<Flat> flats;
  std::vector<T*> squares;
  flats.reserve(arguments.tensor_count);
  for (int64_t i = 0; i < arguments.tensor_count; ++i) {
    flats.emplace_back(arguments.tensors[i]);
    squares.push_back(static_cast<T*>(sizes.squares[i]));
  }
  const std::vector<double> size = update_sizes(arguments.net, flats, blocks_of(flats), sizes.size, squares, parallel);
  for (size_t i = 0; i < size.size(); ++i) found[i] = T(size[i]);
}

}  // namespace

void lstm_update_sizes_cpu(
    const StepArguments& arguments, const UpdateSizes& sizes, void* found, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64)
    return update_sizes(arguments, sizes, static_cast<double*>(found), parallel);
  update_sizes(arguments, sizes, static_cast<float*>(found), parallel);
}

void lstm_step_scaled_cpu(const StepArguments& arguments, const UpdateSizes& sizes, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64) return step_scaled<double>(arguments, sizes, parallel);
  step_scaled<float>(arguments, sizes, parallel);
}

void lstm_step_cpu(const StepArguments& arguments, const Parallel& parallel) {
  if (arguments.weights_dtype == DType::float64) return step<double>(arguments, parallel);
  step<float>(arguments, parallel);
}

}  // namespace l2l
