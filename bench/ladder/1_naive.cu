// Rung 1. One thread for each coordinate, everything from global memory, the state of a coordinate in one piece.
//
// It is what the equations say, line by line. Its faults: neighbouring threads read states 320 bytes apart, so every load
// of a warp touches 32 lines of cache; and every weight is loaded, from the cache at best, for one multiply-add, the loads
// of neighbouring inputs one by one.
#include "common.h"

using namespace ladder;

__global__ void naive(Call call) {
  const int64_t n = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (n >= call.count) return;
  float* const state = call.state + n * kRows;

  float x[kHidden], h[kHidden];
  const LogSign<V> features = features_of(call.grad[n]);
  x[0] = features.log.v;
  x[1] = features.sign.v;
#pragma unroll
  for (int l = 0; l < kLayers; ++l) {
    const Layer layer = layer_of(call.weights, l);
    float *const h_row = state + 2 * l * kHidden, *const c_row = h_row + kHidden;
    for (int k = 0; k < kHidden; ++k) h[k] = h_row[k];
    for (int unit = 0; unit < kHidden; ++unit) {
      V z[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const int row = gate * kHidden + unit;
        float sum = layer.bias_ih[row] + layer.bias_hh[row];
        for (int k = 0; k < layer.inputs; ++k) sum += layer.ih[row * layer.inputs + k] * x[k];
        for (int k = 0; k < kHidden; ++k) sum += layer.hh[row * kHidden + k] * h[k];
        z[gate] = V(sum * float(gate_scale(gate)));
      }
      const V c = lstm_c(z[kInput], z[kForget], z[kCell], V(c_row[unit]));
      c_row[unit] = c.v;
      h_row[unit] = lstm_h(z[kOutput], c).v;
    }
    for (int k = 0; k < kHidden; ++k) x[k] = h_row[k];
  }
  const float* const head = call.weights + WeightLayout{kNetwork}.head_weight();
  float y = head[kHidden];
  for (int k = 0; k < kHidden; ++k) y += head[k] * x[k];
  call.param[n] += call.lr * kScale * y;
}

int main() {
  return climb("naive", false, [](const Call& call) {
    return device::launch(naive, dim3(unsigned((call.count + 127) / 128)), dim3(128), 0, nullptr, call);
  });
}
