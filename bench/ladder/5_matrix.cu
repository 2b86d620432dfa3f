// Rung 5. The matrix units, in tf32 with float32's accuracy; a warp takes a tile of 32 coordinates.
//
// The coordinates are the rows of the products, the gates their columns. Which of them is which row, column and k is ours to
// choose, so that a lane's results are just what it needs next (docs/kernels.md has a picture). With lane = 4 r + q a lane has
//   rows     r and r + 8 of two fragments: the coordinates 4 r .. 4 r + 3, which are 16 bytes of a state row
//   columns  2 q and 2 q + 1 of the fragments (j, 0) and (j, 1): the gates i, f and g, o of unit 4 j + q
//   k        q and q + 4 of chunk m: element q of the slots 2 m and 2 m + 1; slot s of h is the units 4 s .. 4 s + 3
// so it has all four gates of its units, computes c' and h' alone, and its h' are its part of the next left operand.
//
// tf32 has 11 bits. A factor is high + low, and x w = high high + low high + high low, to within 2^-22 of it.
//
// What is left to the library's own kernel (csrc/cuda/matrix_step.cu): the two small products in one instruction of
// float16; states that arrive by asynchronous copies before they are needed; stores that do not wait between products.
#include "common.h"

using namespace ladder;

constexpr int kSlots = kHidden / 4, kOwn = 4, kWarps = 8;

struct Four {
  float at[kOwn];
};

L2L_DEVICE float high(float x) { return device::bits_float((device::float_bits(x) + 0x1000u) & ~0x1fffu); }

// ---------------------------------------------------------------- the weights in shared memory, in fragments

// A layer's left operand is the slots of its inputs, then those of its h: chunks of two slots.
L2L_HOST_DEVICE constexpr int input_slots(int layer) { return layer ? kSlots : 1; }
L2L_HOST_DEVICE constexpr int chunks(int layer) { return (input_slots(layer) + kSlots) / 2; }
L2L_HOST_DEVICE constexpr int fragments(int layer) { return kSlots * chunks(layer) * 2; }

struct Weights {
  static constexpr int kFragments = fragments(0) + fragments(1);
  static constexpr int kBytes = (kFragments * 32 + kLayers * kHidden) * 16 + (kHidden + 1) * 4;

  // A lane's part of a fragment: high of both its k, then low of both.
  float4* parts = reinterpret_cast<float4*>(device::shared_memory());
  float4* bias = parts + kFragments * 32;  // [layer][unit]: i, f, g, o
  float* head = reinterpret_cast<float*>(bias + kLayers * kHidden);

  L2L_DEVICE const float4* of(int layer, int j) const {
    return parts + ((layer ? fragments(0) : 0) + j * chunks(layer) * 2) * 32 + device::lane();
  }

  L2L_DEVICE void load(const float* weights) {
    for (int i = threadIdx.x; i < kFragments * 32; i += blockDim.x) {
      const int l = i >= fragments(0) * 32, fragment = i / 32 - (l ? fragments(0) : 0), lane = i % 32;
      const int j = fragment / (chunks(l) * 2), m = fragment / 2 % chunks(l), half = fragment % 2;
      const float a = weight(layer_of(weights, l), l, j, half, 2 * m, lane);
      const float b = weight(layer_of(weights, l), l, j, half, 2 * m + 1, lane);
      parts[i] = make_float4(high(a), high(b), a - high(a), b - high(b));
    }
    for (int i = threadIdx.x; i < kLayers * kHidden; i += blockDim.x) {
      const Layer layer = layer_of(weights, i / kHidden);
      float four[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const int row = gate * kHidden + i % kHidden;
        four[gate] = float(gate_scale(gate)) * (layer.bias_ih[row] + layer.bias_hh[row]);
      }
      bias[i] = make_float4(four[0], four[1], four[2], four[3]);
    }
    const float* const from = weights + WeightLayout{kNetwork}.head_weight();
    for (int i = threadIdx.x; i <= kHidden; i += blockDim.x) head[i] = from[i];
    __syncthreads();
  }

 private:
  // Of the lane's column r of the fragment (j, half), and element q of a slot.
  L2L_DEVICE static float weight(const Layer& layer, int l, int j, int half, int slot, int lane) {
    const int r = lane / 4, q = lane % 4, gate = 2 * half + r % 2, row = gate * kHidden + 4 * j + r / 2;
    const float scale = float(gate_scale(gate));
    if (slot >= input_slots(l)) return scale * layer.hh[row * kHidden + 4 * (slot - input_slots(l)) + q];
    const int k = 4 * slot + q;
    return k < layer.inputs ? scale * layer.ih[row * layer.inputs + k] : 0.0f;
  }
};

// ---------------------------------------------------------------- one tile

struct Chunk {
  uint32_t high[2][4], low[2][4];  // of two row fragments: element q of both slots, for the lane's coordinates

  Chunk() = default;
  L2L_DEVICE Chunk(const Four& first, const Four& second) {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const float a = ::high(first.at[n]), b = ::high(second.at[n]);
      high[n / 2][n % 2] = device::float_bits(a);
      high[n / 2][n % 2 + 2] = device::float_bits(b);
      low[n / 2][n % 2] = device::float_bits(first.at[n] - a);
      low[n / 2][n % 2 + 2] = device::float_bits(second.at[n] - b);
    }
  }

  // acc[row fragment] += this times a fragment of weights, the small products first.
  L2L_DEVICE void multiply(float (&acc)[2][4], const float4& part) const {
    const uint32_t w_high[2] = {device::float_bits(part.x), device::float_bits(part.y)};
    const uint32_t w_low[2] = {device::float_bits(part.z), device::float_bits(part.w)};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      device::multiply_tf32(acc[t], low[t], w_high);
      device::multiply_tf32(acc[t], high[t], w_low);
      device::multiply_tf32(acc[t], high[t], w_high);
    }
  }
};

struct Tile {
  const Call& call;
  int64_t first;
  int r = device::lane() / 4, q = device::lane() % 4;

  // Of unit 4 slot + q, 16 bytes: the lane's four coordinates.
  L2L_DEVICE Four* at(int row, int slot) const {
    return reinterpret_cast<Four*>(call.state + (row + 4 * slot + q) * call.padded + first + 4 * r);
  }

  // Feature q of the four coordinates, which are one slot: two features, then zeros.
  L2L_DEVICE Four features() const {
    Four slot;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const LogSign<V> both = features_of(call.grad[first + 4 * r + n]);
      slot.at[n] = q == 0 ? both.log.v : q == 1 ? both.sign.v : 0.0f;
    }
    return slot;
  }

  template <int kLayer>
  L2L_DEVICE void run_layer(const Weights& weights) const {
    constexpr int h_row = 2 * kLayer * kHidden, c_row = h_row + kHidden, below = h_row - 2 * kHidden;
    constexpr int inputs = input_slots(kLayer);
    auto slot = [&](int i) {
      if (i >= inputs) return *at(h_row, i - inputs);
      return kLayer ? *at(below, i) : features();
    };
    Chunk operand[chunks(kLayer)];
#pragma unroll
    for (int m = 0; m < chunks(kLayer); ++m) operand[m] = Chunk(slot(2 * m), slot(2 * m + 1));
#pragma unroll 1
    for (int j = 0; j < kSlots; ++j) {
      const float4 bias = weights.bias[kLayer * kHidden + 4 * j + q];
      float if_[2][4], go[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if_[t][0] = if_[t][2] = bias.x;
        if_[t][1] = if_[t][3] = bias.y;
        go[t][0] = go[t][2] = bias.z;
        go[t][1] = go[t][3] = bias.w;
      }
      const float4* const part = weights.of(kLayer, j);
#pragma unroll
      for (int m = 0; m < chunks(kLayer); ++m) {
        operand[m].multiply(if_, part[2 * m * 32]);
        operand[m].multiply(go, part[(2 * m + 1) * 32]);
      }
      Four c = *at(c_row, j), h;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        const int t = n / 2, e = n % 2 * 2;
        const V c_new = lstm_c(V(if_[t][e]), V(if_[t][e + 1]), V(go[t][e]), V(c.at[n]));
        c.at[n] = c_new.v;
        h.at[n] = lstm_h(V(go[t][e + 1]), c_new).v;
      }
      *at(c_row, j) = c;
      *at(h_row, j) = h;
    }
  }

  // The sum over the units of all four lanes of equal r, for the coordinate 4 r + q, which is the lane's own.
  L2L_DEVICE float head(const Weights& weights) const {
    Four sum = {};
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const Four h = *at(2 * (kLayers - 1) * kHidden, j);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) sum.at[n] = std::fma(weights.head[4 * j + q], h.at[n], sum.at[n]);
    }
    float own = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      sum.at[n] += device::shuffle_xor(sum.at[n], 1);
      sum.at[n] += device::shuffle_xor(sum.at[n], 2);
      if (n == q) own = sum.at[n];
    }
    return own + weights.head[kHidden];
  }
};

__global__ void __launch_bounds__(kWarps * 32) matrix(Call call) {
  Weights weights;
  weights.load(call.weights);
  const int64_t tiles = call.padded / kTile, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t t = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32; t < tiles; t += warps) {
    const Tile tile = {call, t * kTile};
    tile.run_layer<0>(weights);
    tile.run_layer<1>(weights);
    const float y = tile.head(weights);
    call.param[t * kTile + device::lane()] += call.lr * kScale * y;
  }
}

int main() {
  return climb("matrix", true, [](const Call& call) {
    const int64_t blocks = (call.padded / kTile + kWarps - 1) / kWarps;
    const dim3 grid(unsigned(std::min<int64_t>(blocks, 2 * device::multiprocessors())));
    return device::launch(matrix, grid, dim3(kWarps * 32), Weights::kBytes, nullptr, call);
  });
}
