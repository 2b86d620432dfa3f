// The pointer table on the host: every coordinate of a group must be met once and its places must be those that the
// strides say. Built and run by test_emulated.py.
#include <set>

#include "../../csrc/cuda/table.h"
#include "../kernel_cases.h"

using namespace l2l;

namespace {

// Addresses are made up: only differences are looked at. Elements have two bytes.
void* address(int64_t element) { return reinterpret_cast<void*>(uintptr_t(1 << 20) + 2 * element); }
int64_t element(const void* address) { return (int64_t(reinterpret_cast<uintptr_t>(address)) - (1 << 20)) / 2; }

struct Made {
  std::vector<int64_t> sizes, param, grad, state;
  StepTensor tensor;

  Made(std::vector<int64_t> size, std::vector<int64_t> p, std::vector<int64_t> g, std::vector<int64_t> s)
      : sizes(size), param(p), grad(g), state(s) {
    int64_t count = 1;
    for (int64_t n : sizes) count *= n;
    const Scalar step = {nullptr, Number::int64};
    tensor = {int(sizes.size()), sizes.data(), count, {address(0), DType::float16, param.data()},
              {address(0), DType::bfloat16, grad.data()}, {address(0), DType::bfloat16, state.data()}, 1 << 10, step, 0};
  }
  Made(Made&&) = default;
};

Made dense(int64_t count) { return Made({count}, {1}, {1}, {1}); }

StepArguments arguments(const std::vector<StepTensor>& tensors) {
  StepArguments made{};
  made.tensors = tensors.data();
  made.tensor_count = int64_t(tensors.size());
  return made;
}

// Small tensors: the tiles cover each coordinate once.
void dense_group(const std::vector<int64_t>& counts, int width) {
  std::vector<StepTensor> tensors;
  std::vector<Made> made;
  for (int64_t count : counts) made.push_back(dense(count));
  int64_t base = 0, expected = 0;
  for (Made& m : made) {
    m.tensor.param.data = address(base);
    base += m.tensor.count;
    tensors.push_back(m.tensor);
  }
  const Entries found = entries(arguments(tensors));
  expect(found.strided.empty(), "stride one is dense");
  std::set<int64_t> seen;
  for_each_table(found.dense, 1, width, [&](const auto& table) {
    expect(sizeof table <= 32 << 10 && table.count > 0, "a table fits a kernel's parameters");
    for (int64_t t = 0; t < table.tiles; ++t) {
      const Tile tile = find_tile(table, t, width);
      expect(tile.count > 0 && tile.count <= width, "no tile is empty");
      for (int i = 0; i < tile.count; ++i)
        expect(seen.insert(element(table.entries[tile.entry].param) + tile.first + i).second, "met once");
    }
  });
  for (int64_t count : counts) expected += count;
  expect(int64_t(seen.size()) == expected && expected == base, "every coordinate is met");
}

// The same tensors for each of several networks: every tile knows its network, and the networks are alike.
void several(int64_t tensors, int networks) {
  std::vector<DenseEntry> all;
  for (int k = 0; k < networks; ++k)
    for (int64_t i = 0; i < tensors; ++i) {
      DenseEntry entry{};
      entry.param = address(1000 * (k * tensors + i));
      entry.count = 1 + i % 5 * 40;
      all.push_back(entry);
    }
  std::set<int64_t> seen;
  for_each_table(all, networks, 32, [&](const auto& table) {
    expect(table.count > 0 && table.tiles == table.tiles_each * table.networks, "networks are alike");
    for (int64_t t = 0; t < table.tiles; ++t) {
      const Tile tile = find_tile(table, t, 32);
      const int64_t at = element(table.entries[tile.entry].param);
      expect(at / 1000 / tensors == table.network(t), "a tile's network");
      for (int i = 0; i < tile.count; ++i) expect(seen.insert(at + tile.first + i).second, "met once");
    }
  });
  int64_t expected = 0;
  for (const DenseEntry& entry : all) expected += entry.count;
  expect(int64_t(seen.size()) == expected, "every coordinate is met");
  // What cannot be taken of one network is left of all.
  const auto taken = take(all, networks, [&](const DenseEntry& entry) { return element(entry.param) != 1000 * tensors; });
  expect(int64_t(all.size()) == networks && int64_t(taken.size()) == networks * (tensors - 1), "alike after take");
}

void huge() {
  const int64_t count = (int64_t(1) << 40) + 17;
  std::vector<Made> made;
  for (int64_t n : {int64_t(5), count, int64_t(33)}) made.push_back(dense(n));
  const Entries found = entries(arguments({made[0].tensor, made[1].tensor, made[2].tensor}));
  for_each_table(found.dense, 1, 32, [&](const auto& table) {
    const int64_t last = (count + 31) / 32;
    Tile tile = find_tile(table, last, 32);
    expect(tile.entry == 1 && tile.first == count - 17 && tile.count == 17, "the last tile of a huge tensor");
    tile = find_tile(table, last + 2, 32);
    expect(tile.entry == 2 && tile.first == 32 && tile.count == 1, "the tile after a huge tensor");
    expect(table.tiles == last + 3, "the number of tiles");
  });
}

// Every coordinate's places, by the strides and by the table.
void strided(const Made& made) {
  using Places = std::multiset<std::vector<int64_t>>;
  Places expected, found;
  for (int64_t i = 0; i < made.tensor.count; ++i) {
    int64_t rest = i;
    std::vector<int64_t> place(3);
    for (int d = made.tensor.dims - 1; d >= 0; --d) {
      const int64_t index = rest % made.sizes[d];
      rest /= made.sizes[d];
      place[0] += index * made.param[d];
      place[1] += index * made.grad[d];
      place[2] += index * made.state[d];
    }
    expected.insert(place);
  }
  const Entries all = entries(arguments({made.tensor}));
  auto collect = [&](const auto& table) {
    for (int64_t t = 0; t < table.tiles; ++t) {
      const Tile tile = find_tile(table, t, 32);
      const auto& entry = table.entries[tile.entry];
      for (int i = 0; i < tile.count; ++i) {
        Offsets at = {tile.first + i, tile.first + i, tile.first + i};
        if constexpr (std::is_same_v<std::decay_t<decltype(entry)>, StridedEntry>) at = entry.offsets(tile.first + i);
        found.insert({element(entry.param) + at.param, element(entry.grad) + at.grad, element(entry.state) + at.state});
      }
    }
  };
  for_each_table(all.dense, 1, 32, collect);
  for_each_table(all.strided, 1, 32, collect);
  expect(found == expected, "the places are those of the strides");
}

}  // namespace

int main() {
  for (int width : {1, 16, 32, 128}) {
    dense_group({}, width);
    dense_group({0}, width);
    dense_group({1}, width);
    dense_group({31, 0, 32, 0, 0, 33, 1, 64, 0}, width);
    std::vector<int64_t> many;
    for (int i = 0; i < 600; ++i) many.push_back(i % 7 * 13);
    dense_group(many, width);
  }
  huge();
  for (int64_t tensors : {1, 3, 40, 700})
    for (int networks : {2, 17, 100}) several(tensors, networks);
  strided(Made({}, {}, {}, {}));
  strided(Made({1, 1}, {7, 9}, {0, 0}, {5, 5}));
  strided(Made({50}, {2}, {1}, {1}));
  strided(Made({9, 11}, {1, 9}, {11, 1}, {1, 9}));                                      // gradient in another order
  strided(Made({9, 11}, {1, 9}, {1, 9}, {1, 9}));                                       // transposed, all three
  strided(Made({7, 8}, {14, 1}, {8, 1}, {14, 1}));                                      // a window
  strided(Made({3, 4, 5}, {0, 5, 1}, {20, 5, 1}, {20, 5, 1}));                          // broken into two dimensions
  strided(Made({2, 3, 2, 5, 3, 2}, {1440, 1, 240, 3, 48, 15}, {1000, 100, 40, 8, 2, 1}, {1, 2, 6, 12, 60, 180}));
  strided(
      Made({2, 1, 3, 2, 3, 4, 2, 5}, {5000, 0, 1, 700, 90, 13, 300, 3}, {1, 2, 3, 4, 5, 6, 7, 8},
           {9, 1, 9, 2, 9, 3, 9, 4}));
  return verdict();
}
