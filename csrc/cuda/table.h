// A param group as a kernel parameter: where each tensor lies, and which tensor a tile of coordinates belongs to.
//
// The host writes tables, kernels read them: neither CUDA nor torch is needed here.
#pragma once

#include "../flat.h"
#include "../lstm_step.h"

namespace l2l {

// Elements from the first coordinate of a tensor to another one.
struct Offsets {
  int64_t param, grad, state;
};

// A parameter whose coordinates lie one after another, and those of its gradient and of each state row likewise.
struct DenseEntry {
  void* param;
  const void* grad;
  void* state;
  const void* step;
  int64_t count;
  int64_t state_row;   // elements from one state row to the next
  int64_t first_tile;  // tiles of the table before this tensor's
  DType param_dtype, grad_dtype, state_dtype;
  Number step_kind;

  L2L_HOST_DEVICE Scalar step_number() const { return {step, step_kind}; }
  L2L_HOST_DEVICE Offsets offsets(int64_t coordinate) const { return {coordinate, coordinate, coordinate}; }
};
static_assert(sizeof(DenseEntry) == 64, "kernel parameters are scarce");

// One with up to kDims dimensions left. Its coordinates are numbered row-major over the sizes.
struct StridedEntry : DenseEntry {
  static constexpr int kDims = 4;
  int64_t sizes[kDims];  // 1 in front of the dimensions there are
  Offsets strides[kDims];

  L2L_HOST_DEVICE Offsets offsets(int64_t coordinate) const {
    Offsets sum = {0, 0, 0};
    for (int d = kDims - 1; d >= 0; --d) {
      const int64_t rest = d > 0 ? coordinate / sizes[d] : 0, index = coordinate - rest * sizes[d];
      sum.param += index * strides[d].param;
      sum.grad += index * strides[d].grad;
      sum.state += index * strides[d].state;
      coordinate = rest;
    }
    return sum;
  }
};

// A kernel's parameters may take 32,764 bytes; a launch with few of them is quicker. What is left is for the kernel's
// others.
constexpr int kSmallTable = 3 << 10, kLargeTable = 31 << 10;

// Kernels take one by value, as a __grid_constant__.
template <class Entry, int bytes>
struct Table {
  static constexpr int kBytes = bytes;
  static constexpr int kCapacity = (bytes - 32) / int(sizeof(Entry));
  int64_t tiles;
  int64_t tiles_each;  // of a network: all networks of a table have the same tensors
  int count;
  int networks;       // of which it holds the entries, one network's after the other's
  int first_network;  // the first of those
  Entry entries[kCapacity];

  // Which network's weights a tile takes.
  L2L_HOST_DEVICE int network(int64_t tile) const {
    return first_network + (networks == 1 ? 0 : int(tile / tiles_each));
  }
};

// A tile: the coordinates first, first + 1, .. of one tensor, `count` of them.
struct Tile {
  int entry;
  int64_t first;
  int count;
};

// tile: 0 .. table.tiles - 1, of `width` coordinates each; a tensor's last may have fewer.
template <class Entry, int bytes>
L2L_HOST_DEVICE Tile find_tile(const Table<Entry, bytes>& table, int64_t tile, int width) {
  int at = 0;  // the last entry that begins no later; entries without coordinates are never in a table
  for (int end = table.count; end - at > 1;) {
    const int middle = (at + end) / 2;
    (table.entries[middle].first_tile <= tile ? at : end) = middle;
  }
  const int64_t first = (tile - table.entries[at].first_tile) * width, left = table.entries[at].count - first;
  return {at, first, left < width ? int(left) : width};
}

// ---------------------------------------------------------------- written by the host

// Those of several networks one network after the other, as many of each, in the same order.
struct Entries {
  std::vector<DenseEntry> dense;
  std::vector<StridedEntry> strided;
};

namespace table {

inline void* at(const Strided& tensor, int64_t offset) {
  const int bytes = tensor.dtype == DType::float64 ? 8 : tensor.dtype == DType::float32 ? 4 : 2;
  return static_cast<char*>(tensor.data) + offset * bytes;
}

inline DenseEntry dense(const StepTensor& tensor, const Offsets& start, int64_t count) {
  return {at(tensor.param, start.param),
          at(tensor.grad, start.grad),
          at(tensor.state, start.state),
          tensor.step.data,
          count,
          tensor.state_row,
          0,
          tensor.param.dtype,
          tensor.grad.dtype,
          tensor.state.dtype,
          tensor.step.kind};
}

// One entry for every index of the dimensions that kDims leaves no place for: the shortest, so that there are few.
inline void add_strided(std::vector<StridedEntry>& entries, const StepTensor& tensor) {
  std::vector<int> inner(tensor.dims), outer;
  std::iota(inner.begin(), inner.end(), 0);
  while (inner.size() > StridedEntry::kDims) {
    const auto shortest = std::min_element(
        inner.begin(), inner.end(), [&](int a, int b) { return tensor.sizes[a] < tensor.sizes[b]; });
    outer.push_back(*shortest);
    inner.erase(shortest);
  }
  auto stride = [&](int d) {
    return Offsets{tensor.param.strides[d], tensor.grad.strides[d], tensor.state.strides[d]};
  };
  int64_t repeats = 1;
  for (int d : outer) repeats *= tensor.sizes[d];
  for (int64_t i = 0; i < repeats; ++i) {
    Offsets start = {0, 0, 0};
    int64_t rest = i;
    for (int d : outer) {
      const int64_t index = rest % tensor.sizes[d];
      rest /= tensor.sizes[d];
      start = {start.param + index * stride(d).param, start.grad + index * stride(d).grad,
               start.state + index * stride(d).state};
    }
    StridedEntry entry{dense(tensor, start, tensor.count / repeats), {}, {}};
    const int missing = StridedEntry::kDims - int(inner.size());
    for (int d = 0; d < StridedEntry::kDims; ++d) {
      entry.sizes[d] = d < missing ? 1 : tensor.sizes[inner[d - missing]];
      entry.strides[d] = d < missing ? Offsets{0, 0, 0} : stride(inner[d - missing]);
    }
    entries.push_back(entry);
  }
}

}  // namespace table

inline Entries entries(const StepArguments& arguments) {
  Entries found;
  for (int64_t i = 0; i < arguments.tensor_count; ++i) {
    if (arguments.tensors[i].count == 0) continue;
    const Flat flat(arguments.tensors[i]);
    const StepTensor& tensor = flat.tensor;
    const bool dense = tensor.dims == 1 && flat.param[0] == 1 && flat.grad[0] == 1 && flat.state[0] == 1;
    if (dense)
      found.dense.push_back(table::dense(tensor, {0, 0, 0}, tensor.count));
    else
      table::add_strided(found.strided, tensor);
  }
  return found;
}

// Takes out of the entries those that are good for all networks, so that what is left is uniform as well.
template <class Good>
std::vector<DenseEntry> take(std::vector<DenseEntry>& entries, int networks, const Good& good) {
  const size_t each = entries.size() / networks;
  std::vector<DenseEntry> taken, left;
  for (size_t i = 0; i < entries.size(); ++i) {
    bool all = true;
    for (size_t of_network = i % each; all && of_network < entries.size(); of_network += each)
      all = good(entries[of_network]);
    (all ? taken : left).push_back(entries[i]);
  }
  entries = left;
  return taken;
}

// Calls launch(table) for tables that together hold all entries, small ones where one small one is enough. A table has
// whole networks, or a part of one.
template <class Entry, class Launch>
void for_each_table(const std::vector<Entry>& entries, int networks, int width, Launch launch) {
  auto with = [&](auto table) {
    constexpr size_t capacity = decltype(table)::kCapacity;
    const size_t each = entries.size() / networks, together = capacity / each;
    auto fill = [&](size_t start, size_t count) {
      table.count = int(count);
      table.tiles = 0;
      for (int i = 0; i < table.count; ++i) {
        Entry& entry = table.entries[i] = entries[start + i];
        entry.first_tile = table.tiles;
        table.tiles += (entry.count + width - 1) / width;
      }
      table.tiles_each = table.tiles / table.networks;
      launch(table);
    };
    for (size_t network = 0; network < size_t(networks); network += table.networks) {
      table.first_network = int(network);
      table.networks = int(std::clamp<size_t>(together, 1, networks - network));
      const size_t start = network * each;
      if (together > 0) {
        fill(start, table.networks * each);
        continue;
      }
      for (size_t i = 0; i < each; i += capacity) fill(start + i, std::min(capacity, each - i));
    }
  };
  if (entries.empty()) return;
  if (entries.size() <= Table<Entry, kSmallTable>::kCapacity) return with(Table<Entry, kSmallTable>());
  with(Table<Entry, kLargeTable>());
}

}  // namespace l2l
