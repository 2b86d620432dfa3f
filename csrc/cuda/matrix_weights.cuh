// The weights in shared memory in the order in which the matrix units take them; see matrix_cell.cuh for the map.
//
// A fragment is what the 32 lanes hold of a piece of a right operand, 8 columns by the k of one chunk; what one lane holds
// is the business of the arithmetic A (matrix_arithmetic.cuh). In the whole area, one after the other:
//   projection        [units / 8, up] fragments, then the biases [hidden] rounded up to float4
//   layer 0, 1, ..    [hidden / 4][chunks][2] fragments, then the biases [hidden] float4: i, f, g, o
//   head              [hidden], then its bias, rounded up to float4
// Weights of gates are scaled by A::scale.
#pragma once

#include "../lstm_cell.h"
#include "device.cuh"

namespace l2l {
namespace matrix {

// A slot is a group of 4 k. A layer's operand: the slots of its inputs, those of its own h, and zeros that fill the last
// chunk.
template <class A>
L2L_HOST_DEVICE constexpr int chunks(int input_slots, int slots) {
  return (input_slots + slots + A::kGroup - 1) / A::kGroup;
}

// float4s of each part.
template <class A>
struct Sizes {
  L2L_HOST_DEVICE static constexpr int fragments(int count) {
    return count * device::kWarp * int(sizeof(typename A::Fragment)) / int(sizeof(float4));
  }
  L2L_HOST_DEVICE static constexpr int layer_fragments(int input_slots, int slots) {
    return fragments(slots * chunks<A>(input_slots, slots) * 2);
  }
  L2L_HOST_DEVICE static constexpr int layer(int input_slots, int slots) {
    return layer_fragments(input_slots, slots) + 4 * slots;
  }
  L2L_HOST_DEVICE static constexpr int projection_fragments(int slots) { return fragments((slots + 1) / 2); }
  L2L_HOST_DEVICE static constexpr int projection(int slots) { return projection_fragments(slots) + slots; }
  L2L_HOST_DEVICE static constexpr int head(int slots) { return slots + 1; }

  L2L_HOST_DEVICE static int all(const Network& net) {
    const int slots = net.hidden / 4;
    const int first = net.projection ? projection(slots) + layer(slots, slots) : layer(1, slots);
    return first + (net.layers - 1) * layer(slots, slots) + head(slots);
  }
};

// Where each layer and the head begin in the flat vector, worked out by the host: WeightLayout's products of 64 bits
// would cost a warp as many instructions as a slot of units does.
struct Starts {
  int first, second, step, head;  // layer 0, layer 1, from each layer to the next, head

  static Starts of(const Network& net) {
    const WeightLayout at{net};
    const int64_t second = at.weight_ih(1);
    return {int(at.weight_ih(0)), int(second), int(at.weight_ih(2) - second), int(at.head_weight())};
  }
  L2L_DEVICE int layer(int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// What a fragment is formed from: columns r of the pair (j, 0), (j, 1) are gates i, f and g, o of the units
// 4 j .. 4 j + 3, unit by unit.
template <class A, int kSlots, int kInputs>
class LayerWeights {
 public:
  // layer: the layer's weights, which begin with those of its `inputs` inputs.
  L2L_DEVICE LayerWeights(const float* layer, int inputs)
      : inputs_(kInputs > 1 ? kHidden : inputs),  // slots of which there are several are of another layer's h
        ih_(layer),
        hh_(layer + kGates * kHidden * inputs_),
        bias_ih_(hh_ + kGates * kHidden * kHidden),
        bias_hh_(bias_ih_ + kGates * kHidden) {}

  // Of chunk m, half 0 or 1 of the pair, for the lane 4 r + q.
  L2L_DEVICE typename A::Fragment fragment(int j, int half, int r, int m, int q) const {
    float k[A::kGroup];
#pragma unroll
    for (int i = 0; i < A::kGroup; ++i) k[i] = weight(j, half, r, A::kGroup * m + i, q);
    return A::fragment(k, kInputs - A::kGroup * m);
  }

  // Of element q of a slot.
  L2L_DEVICE float weight(int j, int half, int r, int slot, int q) const {
    const int gate = 2 * half + r % 2, row = 2 * half * kHidden + (r % 2 * kHidden + 4 * j + r / 2);
    const float scale = float(A::scale(gate));
    if (slot < kInputs) {
      const int input = 4 * slot + q;
      return kInputs > 1 || input < inputs_ ? scale * ih_[row * inputs_ + input] : 0.0f;
    }
    return slot - kInputs < kSlots ? scale * hh_[row * kHidden + 4 * (slot - kInputs) + q] : 0.0f;
  }

  L2L_DEVICE float bias(int unit, int gate) const {
    const int row = gate * kHidden + unit;
    return float(A::scale(gate)) * (bias_ih_[row] + bias_hh_[row]);
  }

 private:
  static constexpr int kHidden = 4 * kSlots;
  const int inputs_;
  const float *const ih_, *const hh_, *const bias_ih_, *const bias_hh_;
};

// The same of the projection: columns r of fragment p are the units 8 p + 4 (r % 2) + r / 2, its further k's are zero.
template <class A, int kSlots>
class ProjectionWeights {
 public:
  L2L_DEVICE ProjectionWeights(const Network& net, const float* weights)  // with which the flat vector begins
      : inputs_(net.inputs()), weight_(weights), bias_(weights + 4 * kSlots * inputs_) {}

  L2L_DEVICE typename A::Fragment fragment(int p, int lane) const {
    const int q = lane % 4, r = lane / 4, unit = 8 * p + 4 * (r % 2) + r / 2;
    float k[A::kGroup] = {};
    if (unit < 4 * kSlots && q < inputs_) k[0] = weight_[unit * inputs_ + q];
    return A::fragment(k, 1);
  }

  L2L_DEVICE float bias(int unit) const { return bias_[unit]; }

 private:
  const int inputs_;
  const float *const weight_, *const bias_;
};

// The same from where Packer left them.
template <class A>
class PackedProjection {
 public:
  L2L_DEVICE PackedProjection(const float4* weights, int slots)
      : fragments_(reinterpret_cast<const typename A::Fragment*>(weights)),
        biases_(reinterpret_cast<const float*>(weights + Sizes<A>::projection_fragments(slots))) {}

  L2L_DEVICE typename A::Fragment fragment(int p, int lane) const { return fragments_[p * device::kWarp + lane]; }
  L2L_DEVICE float bias(int unit) const { return biases_[unit]; }

 private:
  const typename A::Fragment* const fragments_;
  const float* const biases_;
};

// Packs with all threads of the block, from a copy of the flat weights, which it makes where `flat` points. The caller
// puts a barrier behind it; then the place is free again.
template <class A, int kSlots>
class Packer {
 public:
  L2L_DEVICE Packer(const Network& net, const Starts& starts, const float* weights, float4* to, float* flat)
      : net_(net), starts_(starts), weights_(flat), to_(to) {
    const int count = starts.head + kHidden + 1;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) flat[i] = weights[i];
    __syncthreads();
    if (net.projection) {
      projection();
      layer<kSlots>(0);
    } else {
      layer<1>(0);
    }
    for (int i = 1; i < net.layers; ++i) layer<kSlots>(i);
    each(Sizes<A>::head(kSlots) * 4, [&](int i) {
      reinterpret_cast<float*>(to_)[i] = i <= kHidden ? weights_[starts.head + i] : 0.0f;
    });
  }

 private:
  static constexpr int kHidden = 4 * kSlots;

  template <class Body>
  L2L_DEVICE static void each(int count, const Body& body) {
#pragma unroll 2
    for (int i = threadIdx.x; i < count; i += blockDim.x) body(i);
  }

  template <int kInputs>
  L2L_DEVICE void layer(int layer) {
    constexpr int kChunks = chunks<A>(kInputs, kSlots), kFragments = Sizes<A>::layer_fragments(kInputs, kSlots);
    const LayerWeights<A, kSlots, kInputs> from(weights_ + starts_.layer(layer), net_.layer_inputs(layer));
    const auto to = reinterpret_cast<typename A::Fragment*>(to_);
    each(kSlots * kChunks * 2 * device::kWarp, [&](int i) {
      const int q = i % 4, r = i / 4 % 8, half = i / 32 % 2, m = i / 64 % kChunks, j = i / 64 / kChunks;
      to[i] = from.fragment(j, half, r, m, q);
    });
    to_ += kFragments;
    each(4 * kHidden, [&](int i) { reinterpret_cast<float*>(to_)[i] = from.bias(i / kGates, i % kGates); });
    to_ += 4 * kSlots;
  }

  L2L_DEVICE void projection() {
    const ProjectionWeights<A, kSlots> from(net_, weights_);
    const auto to = reinterpret_cast<typename A::Fragment*>(to_);
    each((kSlots + 1) / 2 * device::kWarp, [&](int i) { to[i] = from.fragment(i / device::kWarp, i % device::kWarp); });
    to_ += Sizes<A>::projection_fragments(kSlots);
    each(kHidden, [&](int i) { reinterpret_cast<float*>(to_)[i] = from.bias(i); });
    to_ += kSlots;
  }

  const Network& net_;
  const Starts& starts_;
  const float* const weights_;
  float4* to_;
};

}  // namespace matrix
}  // namespace l2l
