// The weights in shared memory for rungs 3 and 4: the four gates of a unit and an input side by side, so that one read of
// 16 bytes, which all lanes of a warp share, is enough for four multiply-adds of each. Scaled by what the cell takes out of
// its exponentials; the bias is one more input, which is 1.
#pragma once

#include "common.h"

namespace ladder {

struct GatesOf {
  // float4s of a layer, [unit][input, h, bias].
  L2L_HOST_DEVICE static constexpr int columns(int layer) { return (layer ? kHidden : kFeatures) + kHidden + 1; }
  L2L_HOST_DEVICE static constexpr int start(int layer) { return layer ? kHidden * columns(0) : 0; }
  static constexpr int kBytes = (kHidden * (kFeatures + 3 * kHidden + 2) * 4 + kHidden + 1) * 4;

  float4* gates = reinterpret_cast<float4*>(device::shared_memory());
  float* head = reinterpret_cast<float*>(gates + start(1) + kHidden * columns(1));  // [kHidden], then its bias

  // By all threads of the block; ends with a barrier.
  L2L_DEVICE void load(const float* weights) {
    for (int l = 0; l < kLayers; ++l) {
      const Layer layer = layer_of(weights, l);
      for (int i = threadIdx.x; i < kHidden * columns(l); i += blockDim.x) {
        const int unit = i / columns(l), k = i % columns(l);
        float four[kGates];
        for (int gate = 0; gate < kGates; ++gate) {
          const int row = gate * kHidden + unit;
          const float w = k < layer.inputs ? layer.ih[row * layer.inputs + k]
              : k < layer.inputs + kHidden ? layer.hh[row * kHidden + k - layer.inputs]
                                           : layer.bias_ih[row] + layer.bias_hh[row];
          four[gate] = w * float(gate_scale(gate));
        }
        gates[start(l) + i] = make_float4(four[0], four[1], four[2], four[3]);
      }
    }
    const float* const from = weights + WeightLayout{kNetwork}.head_weight();
    for (int i = threadIdx.x; i <= kHidden; i += blockDim.x) head[i] = from[i];
    __syncthreads();
  }
};

}  // namespace ladder
