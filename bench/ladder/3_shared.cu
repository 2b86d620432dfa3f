// Rung 3. Weights in shared memory, x and h in registers.
//
// A block loads the weights once and then takes coordinate after coordinate. Loops over k are unrolled, so x[k] and h[k]
// are registers. The loop over units is not: unrolled, the 5,000 multiply-adds would be 80 KB of instructions. So a new h
// goes to memory at once, where the old one is needed no more, and the next layer reads it back from the cache.
// What is left: a read of 16 bytes from shared memory for every four multiply-adds.
#include "gates.h"

using namespace ladder;

template <int kLayer>
L2L_DEVICE void run_layer(const GatesOf& weights, const Call& call, int64_t n, float (&x)[kHidden]) {
  constexpr int inputs = kLayer ? kHidden : kFeatures, h_row = 2 * kLayer * kHidden, c_row = h_row + kHidden;
  auto state = [&](int row) -> float& { return call.state[row * call.padded + n]; };
  float h[kHidden];
#pragma unroll
  for (int k = 0; k < kHidden; ++k) h[k] = state(h_row + k);
#pragma unroll 1
  for (int unit = 0; unit < kHidden; ++unit) {
    const float4* const w = weights.gates + GatesOf::start(kLayer) + unit * GatesOf::columns(kLayer);
    float4 z = w[inputs + kHidden];  // the bias
    auto add = [&](const float4& gates, float value) {
      z.x = std::fma(gates.x, value, z.x);
      z.y = std::fma(gates.y, value, z.y);
      z.z = std::fma(gates.z, value, z.z);
      z.w = std::fma(gates.w, value, z.w);
    };
#pragma unroll
    for (int k = 0; k < inputs; ++k) add(w[k], x[k]);
#pragma unroll
    for (int k = 0; k < kHidden; ++k) add(w[inputs + k], h[k]);
    const V c = lstm_c(V(z.x), V(z.y), V(z.z), V(state(c_row + unit)));
    state(c_row + unit) = c.v;
    state(h_row + unit) = lstm_h(V(z.w), c).v;
  }
#pragma unroll
  for (int k = 0; k < kHidden; ++k) x[k] = state(h_row + k);
}

__global__ void __launch_bounds__(256) shared(Call call) {
  GatesOf weights;
  weights.load(call.weights);
  for (int64_t n = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; n < call.count; n += int64_t(gridDim.x) * blockDim.x) {
    const LogSign<V> features = features_of(call.grad[n]);
    float x[kHidden] = {features.log.v, features.sign.v};
    run_layer<0>(weights, call, n, x);
    run_layer<1>(weights, call, n, x);
    float y = weights.head[kHidden];
#pragma unroll
    for (int k = 0; k < kHidden; ++k) y = std::fma(weights.head[k], x[k], y);
    call.param[n] += call.lr * kScale * y;
  }
}

int main() {
  return climb("shared", true, [](const Call& call) {
    const int64_t blocks = std::min<int64_t>((call.count + 255) / 256, 4 * device::multiprocessors());
    return device::launch(shared, dim3(unsigned(blocks)), dim3(256), GatesOf::kBytes, nullptr, call);
  });
}
