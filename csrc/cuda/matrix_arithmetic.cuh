// How a kernel on the matrix units multiplies and forms its activations: as exactly as its state is kept.
//
// A chunk is kGroup slots of a left operand, for the lane's four coordinates: rows r and r + 8 of two row fragments. A
// fragment of weights is what meets it; matrix_cell.cuh says which k is whose.
#pragma once

#include "matrix_weights.cuh"
#include "real.cuh"

namespace l2l {
namespace matrix {

using V = Real<float>;

constexpr int kOwn = 4;  // coordinates of which a lane holds states

// One number for each of the lane's coordinates.
struct Four {
  float at[kOwn];
};

// Float32's accuracy, for a state of float32. A factor is high + low, high its nearest in tf32, and
//   x w = high(x) high(w) + low(x) w + x low(w)
// to within low * low, 2^-24 of it. The last two are at most 2^-12 of it each, so float16 is enough for their factors,
// and its instruction takes 16 k in the time of 8 in tf32: both sums in one. A factor in float16 is off by 2^-12 of
// itself or 2^-25 (see kBelow); beyond 65,504 it stays there, which leaves such a product tf32's accuracy.
struct Exact {
  static constexpr int kGroup = 2;
  using Fragment = float4;  // high of both k; as two of float16 each, the pair of the whole and the pair of low

  struct Chunk {
    uint32_t high[2][4];  // in tf32
    uint32_t both[2][4];  // in float16: the pair of low, then the pair of the whole
  };

  // x = high + low, high in tf32 (the nearest), low exact.
  L2L_DEVICE static float high(float x) {
    return device::bits_float((device::float_bits(x) + 0x1000u) & ~0x1fffu);
  }

  // What comes from below may be large, features in the hundreds. The low that it meets is in float16, off by 2^-25 at
  // least, so it is taken times 2^8, and what comes from below times 2^-8.
  L2L_HOST_DEVICE static constexpr float scale_of(bool below) { return below ? 0x1p-8f : 1; }

  // below: how many of the two slots, the first before the second, come from below; 0 or less: none.
  L2L_DEVICE static Fragment fragment(const float (&k)[kGroup], int below) {
    const float a = high(k[0]), b = high(k[1]);
    const uint32_t whole = device::floats_float16(k[0], k[1]);
    const uint32_t low =
        device::floats_float16((k[0] - a) * (1 / scale_of(below > 0)), (k[1] - b) * (1 / scale_of(below > 1)));
    return make_float4(a, b, device::bits_float(whole), device::bits_float(low));
  }

  L2L_DEVICE static Chunk chunk(const Four (&slots)[kGroup], int below) {
    const float scale[2] = {scale_of(below > 0), scale_of(below > 1)};
    Chunk made;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int t = n / 2, row = n % 2;
      const float first = slots[0].at[n], second = slots[1].at[n], a = high(first), b = high(second);
      made.high[t][row] = device::float_bits(a);
      made.high[t][row + 2] = device::float_bits(b);
      made.both[t][row] = device::floats_float16(first - a, second - b);
      made.both[t][row + 2] = device::floats_float16(scale[0] * first, scale[1] * second);
    }
    return made;
  }

  // acc[column fragment][row fragment] += a chunk of the operand times fragments of weights, the small products first.
  template <int kColumns>
  L2L_DEVICE static void multiply(float (&acc)[kColumns][2][4], const Chunk& left, const Fragment (&weights)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const uint32_t both[2] = {device::float_bits(weights[column].z), device::float_bits(weights[column].w)};
#pragma unroll
      for (int t = 0; t < 2; ++t) device::multiply_float16(acc[column][t], left.both[t], both);
    }
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const uint32_t high[2] = {device::float_bits(weights[column].x), device::float_bits(weights[column].y)};
#pragma unroll
      for (int t = 0; t < 2; ++t) device::multiply_tf32(acc[column][t], left.high[t], high);
    }
  }

  // lstm_c and lstm_h, of sums that scale has prepared for them.
  L2L_HOST_DEVICE static constexpr double scale(int gate) { return gate_scale(gate); }
  L2L_DEVICE static float c(float i, float f, float g, float c) { return lstm_c(V(i), V(f), V(g), V(c)).v; }
  L2L_DEVICE static float h(float o, float c) { return lstm_h(V(o), V(c)).v; }
};

// For a state of bfloat16, which is rounded by up to 2^-9 of itself at every step: factors in float16, off by 2^-12, sums
// in float32, and the special-function unit's own tanh, off by 2^-11 of its value. A step takes half the instructions.
struct Quick {
  static constexpr int kGroup = 4;
  using Fragment = uint2;  // pairs of float16

  struct Chunk {
    uint32_t pairs[2][4];
  };

  L2L_DEVICE static Fragment fragment(const float (&k)[kGroup], int) {
    return make_uint2(device::floats_float16(k[0], k[1]), device::floats_float16(k[2], k[3]));
  }

  L2L_DEVICE static Chunk chunk(const Four (&slots)[kGroup], int) {
    Chunk made;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      made.pairs[n / 2][n % 2] = device::floats_float16(slots[0].at[n], slots[1].at[n]);
      made.pairs[n / 2][n % 2 + 2] = device::floats_float16(slots[2].at[n], slots[3].at[n]);
    }
    return made;
  }

  template <int kColumns>
  L2L_DEVICE static void multiply(float (&acc)[kColumns][2][4], const Chunk& left, const Fragment (&weights)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const uint32_t pairs[2] = {weights[column].x, weights[column].y};
#pragma unroll
      for (int t = 0; t < 2; ++t) device::multiply_float16(acc[column][t], left.pairs[t], pairs);
    }
  }

  // sigmoid(z) = 1/2 + tanh(z / 2) / 2.
  L2L_HOST_DEVICE static constexpr double scale(int gate) { return gate == kCell ? 1 : 0.5; }
  L2L_DEVICE static float c(float i, float f, float g, float c) {
    const float half_g = 0.5f * device::fast_tanh(g), half_c = 0.5f * c;
    return std::fma(half_c, device::fast_tanh(f), std::fma(half_g, device::fast_tanh(i), half_g + half_c));
  }
  L2L_DEVICE static float h(float o, float c) {
    const float half = 0.5f * device::fast_tanh(c);
    return std::fma(half, device::fast_tanh(o), half);
  }
};

}  // namespace matrix
}  // namespace l2l
