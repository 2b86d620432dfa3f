// Rung 4. Two or four coordinates for each thread, so that a weight read from shared memory meets as many, and a state is
// loaded 8 or 16 bytes at a time.
//
// With four, x and h of all of them are 160 registers: few warps fit, and one that waits for memory has few to wait with.
#include "gates.h"

using namespace ladder;

template <int kOwn>
struct alignas(4 * kOwn) Several {
  float at[kOwn];
};

template <int kOwn, int kLayer>
L2L_DEVICE void run_layer(const GatesOf& weights, const Call& call, int64_t first, Several<kOwn> (&x)[kHidden]) {
  constexpr int inputs = kLayer ? kHidden : kFeatures, h_row = 2 * kLayer * kHidden, c_row = h_row + kHidden;
  auto state = [&](int row) { return reinterpret_cast<Several<kOwn>*>(call.state + row * call.padded + first); };
  Several<kOwn> h[kHidden];
#pragma unroll
  for (int k = 0; k < kHidden; ++k) h[k] = *state(h_row + k);
#pragma unroll 1
  for (int unit = 0; unit < kHidden; ++unit) {
    const float4* const w = weights.gates + GatesOf::start(kLayer) + unit * GatesOf::columns(kLayer);
    float4 z[kOwn];
#pragma unroll
    for (int own = 0; own < kOwn; ++own) z[own] = w[inputs + kHidden];  // the bias
    auto add = [&](const float4& gates, const Several<kOwn>& values) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        z[own].x = std::fma(gates.x, values.at[own], z[own].x);
        z[own].y = std::fma(gates.y, values.at[own], z[own].y);
        z[own].z = std::fma(gates.z, values.at[own], z[own].z);
        z[own].w = std::fma(gates.w, values.at[own], z[own].w);
      }
    };
#pragma unroll
    for (int k = 0; k < inputs; ++k) add(w[k], x[k]);
#pragma unroll
    for (int k = 0; k < kHidden; ++k) add(w[inputs + k], h[k]);
    Several<kOwn> c = *state(c_row + unit), h_new;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const V c_new = lstm_c(V(z[own].x), V(z[own].y), V(z[own].z), V(c.at[own]));
      c.at[own] = c_new.v;
      h_new.at[own] = lstm_h(V(z[own].w), c_new).v;
    }
    *state(c_row + unit) = c;
    *state(h_row + unit) = h_new;
  }
#pragma unroll
  for (int k = 0; k < kHidden; ++k) x[k] = *state(h_row + k);
}

template <int kOwn>
__global__ void __launch_bounds__(128) several(Call call) {
  GatesOf weights;
  weights.load(call.weights);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * kOwn;
  for (int64_t n = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * kOwn; n < call.padded; n += stride) {
    Several<kOwn> x[kHidden] = {};
    const Several<kOwn> grad = *reinterpret_cast<const Several<kOwn>*>(call.grad + n);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const LogSign<V> features = features_of(grad.at[own]);
      x[0].at[own] = features.log.v;
      x[1].at[own] = features.sign.v;
    }
    run_layer<kOwn, 0>(weights, call, n, x);
    run_layer<kOwn, 1>(weights, call, n, x);
    auto* const param = reinterpret_cast<Several<kOwn>*>(call.param + n);
    Several<kOwn> theta = *param;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      float y = weights.head[kHidden];
#pragma unroll
      for (int k = 0; k < kHidden; ++k) y = std::fma(weights.head[k], x[k].at[own], y);
      theta.at[own] += call.lr * kScale * y;
    }
    *param = theta;
  }
}

template <int kOwn>
cudaError_t launch(const Call& call) {
  const int64_t threads = call.padded / kOwn;
  const int64_t blocks = std::min<int64_t>((threads + 127) / 128, 4 * device::multiprocessors());
  return device::launch(several<kOwn>, dim3(unsigned(blocks)), dim3(128), GatesOf::kBytes, nullptr, call);
}

int main() { return climb("two", true, launch<2>) || climb("four", true, launch<4>); }
