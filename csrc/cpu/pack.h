// Packs the flat weight vector for the CPU kernels; see packed.h.
#pragma once

#include <cmath>
#include <vector>

#include "../lstm_cell.h"
#include "../element.h"
#include "packed.h"

namespace l2l {

template <class T>
Corrections<T> bias_corrections(const Network& net, double step) {
  return {T(1 / (1 - std::pow(net.beta1, step))), T(1 / (1 - std::pow(net.beta2, step)))};
}

template <class T>
class Packer {
 public:
  enum Run { kForward, kBackward };

  Packer(const Network& net, const T* weights, Run run, WeightOrder order = WeightOrder::scalars) : weights_(weights) {
    const WeightLayout at{net};
    const int hidden = net.hidden;
    const bool backward = run == kBackward;
    for (int layer = 0; layer < net.layers; ++layer) {
      const int inputs = net.layer_inputs(layer);
      gates_.push_back(pack_gates(at, layer));
      if (order == WeightOrder::pairs) pairs_.push_back(pack_pairs(gates_.back(), net, layer));
      if (order == WeightOrder::blocks) pairs_.push_back(pack_blocks(gates_.back(), net, layer));
      inputs_t_.push_back(backward ? transpose(at.weight_ih(layer), kGates * hidden, inputs) : std::vector<T>());
      hidden_t_.push_back(backward ? transpose(at.weight_hh(layer), kGates * hidden, hidden) : std::vector<T>());
    }
    if (net.projection) {
      projection_ = pack_projection(at);
      projection_t_ = transpose(at.projection_weight(), hidden, net.inputs());
    }
    for (auto list : {&gates_, &inputs_t_, &hidden_t_})
      for (const std::vector<T>& block : *list) pointers_.push_back(block.data());
    for (const std::vector<uint32_t>& block : pairs_) pair_pointers_.push_back(block.data());
    packed_ = {
        net,
        T(1 / net.preprocess_p),
        T(std::exp(-net.preprocess_p)),
        T(std::exp(net.preprocess_p)),
        weights[at.head_bias()],
        projection_.data(),
        pointers_.data(),
        weights + at.head_weight(),
        weights + at.linear_weight(),
        pair_pointers_.data(),
        projection_t_.data(),
        pointers_.data() + net.layers,
        pointers_.data() + 2 * net.layers,
    };
  }

  Packer(const Packer&) = delete;
  Packer& operator=(const Packer&) = delete;

  // Points into this object and into the flat weights.
  const Packed<T>& packed() const { return packed_; }

 private:
  std::vector<T> pack_gates(const WeightLayout& at, int layer) const {
    const int hidden = at.net.hidden, inputs = at.net.layer_inputs(layer);
    std::vector<T> block;
    block.reserve(size_t(hidden) * (1 + inputs + hidden) * kGates);
    for (int unit = 0; unit < hidden; ++unit) {
      auto push = [&](auto value) {
        for (int gate = 0; gate < kGates; ++gate) block.push_back(T(gate_scale(gate)) * value(gate * hidden + unit));
      };
      push([&](int row) { return weights_[at.bias_ih(layer) + row] + weights_[at.bias_hh(layer) + row]; });
      for (int k = 0; k < inputs; ++k) push([&](int row) { return weights_[at.weight_ih(layer) + row * inputs + k]; });
      for (int k = 0; k < hidden; ++k) push([&](int row) { return weights_[at.weight_hh(layer) + row * hidden + k]; });
    }
    return block;
  }

  // These two from what pack_gates returned.
  static std::vector<uint32_t> pack_pairs(const std::vector<T>& gates, const Network& net, int layer) {
    const int hidden = net.hidden, inputs = net.layer_inputs(layer);
    std::vector<uint32_t> block;
    block.reserve(size_t(hidden) * (1 + pairs(inputs) + pairs(hidden)) * kGates);
    for (int unit = 0; unit < hidden; ++unit) {
      const T* from = gates.data() + size_t(unit) * (1 + inputs + hidden) * kGates;
      auto push = [&](auto word) {
        for (int gate = 0; gate < kGates; ++gate, ++from) block.push_back(word());
      };
      push([&] { return float_bits(float(*from)); });
      for (int count : {inputs, hidden})
        for (int k = 0; k < count; k += 2) {
          const bool whole = k + 1 < count;
          push([&] { return pair(float(from[0]), whole ? float(from[kGates]) : 0.0f); });
          if (whole) from += kGates;
        }
    }
    return block;
  }

  static std::vector<uint32_t> pack_blocks(const std::vector<T>& gates, const Network& net, int layer) {
    const int rows = kGates * net.hidden, depth = pair_blocks(net, layer), columns = block_pairs(net, layer);
    const std::vector<uint32_t> words = pack_pairs(gates, net, layer);
    const int count = all_pairs(net, layer);
    std::vector<uint32_t> packed(size_t(blocks(rows)) * depth * kBlock * kBlock);
    uint32_t* to = packed.data();
    for (int b = 0; b < blocks(rows); ++b)
      for (int start = 0; start < depth * columns; start += columns)
        for (int row = block_start(b, rows); row < block_start(b, rows) + kBlock; ++row)
          for (int k = start; k < start + kBlock; ++k, ++to) {
            if (row >= rows || k >= start + columns || k >= count) continue;
            const uint32_t word = words[(size_t(row % net.hidden) * count + k) * kGates + row / net.hidden];
            if (k > 0) {
              *to = word;
            } else {
              const float bias = bits_float(word);
              *to = pair(bias, bias - from_bfloat16(to_bfloat16(bias)));
            }
          }
    return packed;
  }

  static uint32_t pair(float low, float high) { return to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16; }

  std::vector<T> pack_projection(const WeightLayout& at) const {
    const int hidden = at.net.hidden, inputs = at.net.inputs();
    std::vector<T> block;
    for (int group = 0; group < groups(hidden); ++group)
      for (int k = -1; k < inputs; ++k)
        for (int row = group * kGroup; row < (group + 1) * kGroup; ++row)
          block.push_back(
              row >= hidden ? T(0)
              : k < 0       ? weights_[at.projection_bias() + row]
                            : weights_[at.projection_weight() + row * inputs + k]);
    return block;
  }

  std::vector<T> transpose(int64_t start, int rows, int columns) const {
    std::vector<T> block;
    block.reserve(size_t(groups(columns)) * rows * kGroup);
    for (int group = 0; group < groups(columns); ++group)
      for (int row = 0; row < rows; ++row)
        for (int k = group * kGroup; k < (group + 1) * kGroup; ++k)
          block.push_back(k < columns ? weights_[start + int64_t(row) * columns + k] : T(0));
    return block;
  }

  const T* weights_;
  std::vector<T> projection_, projection_t_;
  std::vector<std::vector<T>> gates_, inputs_t_, hidden_t_;
  std::vector<const T*> pointers_;
  std::vector<std::vector<uint32_t>> pairs_;
  std::vector<const uint32_t*> pair_pointers_;
  Packed<T> packed_;
};

}  // namespace l2l
