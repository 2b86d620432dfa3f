// The weights in shared memory in the order in which the matrix units take them; see matrix_cell.cuh for the map.
//
// A fragment is what the 32 lanes hold of a [8 k, 8 columns] piece of a right operand: one float4 a lane. With
// lane = 4 r + q that is, of column r, high(k = q), high(k = q + 4), and as two of float16 each, k = q in the lower half,
// the pair of the whole and the pair of low. In the whole area, one after the other:
//   projection        [units / 8, up][32 lanes] float4, then the biases [hidden] rounded up to float4
//   layer 0, 1, ..    [hidden / 4][chunks of 8 k][2][32 lanes] float4, then the biases [hidden] float4: i, f, g, o
//   head              [hidden], then its bias, rounded up to float4
// Gates are scaled by gate_scale.
#pragma once

#include "../lstm_cell.h"
#include "device.cuh"

namespace l2l {
namespace matrix {

// A slot is a group of 4 k. A layer's operand: the slots of its inputs, those of its own h, and one of zeros if that
// makes them even.
L2L_HOST_DEVICE constexpr int chunks(int input_slots, int slots) { return (input_slots + slots + 1) / 2; }

// float4s of each part.
L2L_HOST_DEVICE constexpr int projection_fragments(int slots) { return (slots + 1) / 2 * device::kWarp; }
L2L_HOST_DEVICE constexpr int layer_fragments(int input_slots, int slots) {
  return slots * chunks(input_slots, slots) * 2 * device::kWarp;
}
L2L_HOST_DEVICE constexpr int layer_size(int input_slots, int slots) {
  return layer_fragments(input_slots, slots) + 4 * slots;
}
L2L_HOST_DEVICE constexpr int projection_size(int slots) { return projection_fragments(slots) + slots; }
L2L_HOST_DEVICE constexpr int head_size(int slots) { return slots + 1; }

L2L_HOST_DEVICE int weights_size(const Network& net) {
  const int slots = net.hidden / 4;
  const int first = net.projection ? projection_size(slots) + layer_size(slots, slots) : layer_size(1, slots);
  return first + (net.layers - 1) * layer_size(slots, slots) + head_size(slots);
}

// x = high + low, high in tf32 (the nearest), low exact.
L2L_DEVICE float high(float x) {
  return device::bits_float((device::float_bits(x) + 0x1000u) & ~0x1fffu);
}

// What comes from below may be large, features in the hundreds. The low that it meets is in float16, off by 2^-25 at
// least, so it is taken times 2^8, and what comes from below times 2^-8.
constexpr float kBelow = 0x1p-8f;
L2L_HOST_DEVICE constexpr float scale_of(bool below) { return below ? kBelow : 1; }

// below: how many of the two slots that it meets, the first before the second, come from below; 0 or less: none.
L2L_DEVICE float4 fragment(float first, float second, int below) {
  const float a = high(first), b = high(second);
  const uint32_t whole = device::floats_float16(first, second);
  const uint32_t low =
      device::floats_float16((first - a) * (1 / scale_of(below > 0)), (second - b) * (1 / scale_of(below > 1)));
  return make_float4(a, b, device::bits_float(whole), device::bits_float(low));
}

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
template <int kSlots, int kInputs>
class LayerWeights {
 public:
  // layer: the layer's weights, which begin with those of its `inputs` inputs.
  L2L_DEVICE LayerWeights(const float* layer, int inputs)
      : inputs_(kInputs > 1 ? kHidden : inputs),  // slots of which there are several are of another layer's h
        ih_(layer),
        hh_(layer + kGates * kHidden * inputs_),
        bias_ih_(hh_ + kGates * kHidden * kHidden),
        bias_hh_(bias_ih_ + kGates * kHidden) {}

  // Of element q of a slot.
  L2L_DEVICE float weight(int j, int half, int r, int slot, int q) const {
    const int gate = 2 * half + r % 2, row = 2 * half * kHidden + (r % 2 * kHidden + 4 * j + r / 2);
    const float scale = float(gate_scale(gate));
    if (slot < kInputs) {
      const int input = 4 * slot + q;
      return kInputs > 1 || input < inputs_ ? scale * ih_[row * inputs_ + input] : 0.0f;
    }
    return slot - kInputs < kSlots ? scale * hh_[row * kHidden + 4 * (slot - kInputs) + q] : 0.0f;
  }

  L2L_DEVICE float bias(int unit, int gate) const {
    const int row = gate * kHidden + unit;
    return float(gate_scale(gate)) * (bias_ih_[row] + bias_hh_[row]);
  }

 private:
  static constexpr int kHidden = 4 * kSlots;
  const int inputs_;
  const float *const ih_, *const hh_, *const bias_ih_, *const bias_hh_;
};

// The same of the projection: columns r of fragment p are the units 8 p + 4 (r % 2) + r / 2, its second k's are zero.
template <int kSlots>
class ProjectionWeights {
 public:
  L2L_DEVICE ProjectionWeights(const Network& net, const float* weights)  // with which the flat vector begins
      : inputs_(net.inputs()), weight_(weights), bias_(weights + 4 * kSlots * inputs_) {}

  L2L_DEVICE float4 fragment(int p, int lane) const {
    const int q = lane % 4, r = lane / 4, unit = 8 * p + 4 * (r % 2) + r / 2;
    return matrix::fragment(unit < 4 * kSlots && q < inputs_ ? weight_[unit * inputs_ + q] : 0.0f, 0.0f, 1);
  }

  L2L_DEVICE float bias(int unit) const { return bias_[unit]; }

 private:
  const int inputs_;
  const float *const weight_, *const bias_;
};

// The same from where Packer left them.
class PackedProjection {
 public:
  L2L_DEVICE PackedProjection(const float4* weights, int slots)
      : fragments_(weights), biases_(reinterpret_cast<const float*>(weights + projection_fragments(slots))) {}

  L2L_DEVICE float4 fragment(int p, int lane) const { return fragments_[p * device::kWarp + lane]; }
  L2L_DEVICE float bias(int unit) const { return biases_[unit]; }

 private:
  const float4* const fragments_;
  const float* const biases_;
};

// Packs with all threads of the block, from a copy of the flat weights, which it makes where `flat` points. The caller
// puts a barrier behind it; then the place is free again.
template <int kSlots>
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
    each(head_size(kSlots) * 4, [&](int i) {
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
    constexpr int kChunks = chunks(kInputs, kSlots);
    const LayerWeights<kSlots, kInputs> from(weights_ + starts_.layer(layer), net_.layer_inputs(layer));
    each(layer_fragments(kInputs, kSlots), [&](int i) {
      const int q = i % 4, r = i / 4 % 8, half = i / 32 % 2, m = i / 64 % kChunks, j = i / 64 / kChunks;
      const float first = from.weight(j, half, r, 2 * m, q), second = from.weight(j, half, r, 2 * m + 1, q);
      to_[i] = fragment(first, second, kInputs - 2 * m);
    });
    to_ += layer_fragments(kInputs, kSlots);
    each(4 * kHidden, [&](int i) { reinterpret_cast<float*>(to_)[i] = from.bias(i / kGates, i % kGates); });
    to_ += 4 * kSlots;
  }

  L2L_DEVICE void projection() {
    const ProjectionWeights<kSlots> from(net_, weights_);
    each(projection_fragments(kSlots), [&](int i) { to_[i] = from.fragment(i / device::kWarp, i % device::kWarp); });
    to_ += projection_fragments(kSlots);
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
