// Rung 2. The same, but number `row` of all coordinates is one row: what a warp reads is 128 contiguous bytes.
//
// One line has changed, where a state is found. It is the layout that l2l_fast.ops.new_state makes, by strides alone.
#include "common.h"

using namespace ladder;

__global__ void rows(Call call) {
  const int64_t n = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (n >= call.count) return;
  auto state = [&](int row) -> float& { return call.state[row * call.padded + n]; };

  float x[kHidden], h[kHidden];
  const LogSign<V> features = features_of(call.grad[n]);
  x[0] = features.log.v;
  x[1] = features.sign.v;
#pragma unroll
  for (int l = 0; l < kLayers; ++l) {
    const Layer layer = layer_of(call.weights, l);
    const int h_row = 2 * l * kHidden, c_row = h_row + kHidden;
    for (int k = 0; k < kHidden; ++k) h[k] = state(h_row + k);
    for (int unit = 0; unit < kHidden; ++unit) {
      V z[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const int row = gate * kHidden + unit;
        float sum = layer.bias_ih[row] + layer.bias_hh[row];
        for (int k = 0; k < layer.inputs; ++k) sum += layer.ih[row * layer.inputs + k] * x[k];
        for (int k = 0; k < kHidden; ++k) sum += layer.hh[row * kHidden + k] * h[k];
        z[gate] = V(sum * float(gate_scale(gate)));
      }
      const V c = lstm_c(z[kInput], z[kForget], z[kCell], V(state(c_row + unit)));
      state(c_row + unit) = c.v;
      state(h_row + unit) = lstm_h(z[kOutput], c).v;
    }
    for (int k = 0; k < kHidden; ++k) x[k] = state(h_row + k);
  }
  const float* const head = call.weights + WeightLayout{kNetwork}.head_weight();
  float y = head[kHidden];
  for (int k = 0; k < kHidden; ++k) y += head[k] * x[k];
  call.param[n] += call.lr * kScale * y;
}

int main() {
  return climb("rows", true, [](const Call& call) {
    return device::launch(rows, dim3(unsigned((call.count + 127) / 128)), dim3(128), 0, nullptr, call);
  });
}
