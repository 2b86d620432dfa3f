// Products of weights and activations in bfloat16, two at a time by vdpbf16ps, summed in float32. Include inside the
// units with AVX512_BF16 only.
#pragma once

#include "packed.h"
#include "vec_avx512.h"

namespace l2l {
namespace {

// A vector of gates for which exp2 need be no more exact than pre-activations of bfloat16 products are: 1.1e-4 of its
// value instead of 2e-7, still exact at 0.
struct Coarse : Vec {
  Coarse() = default;
  L2L_INLINE Coarse(Vec x) : Vec(x) {}
  L2L_INLINE explicit Coarse(double x) : Vec(x) {}
};

L2L_INLINE Coarse exp2(Coarse y) {
  Vec n(_mm512_roundscale_ps(y.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)), f = y - n;
  // Minimax in relative error on [-1/2, 1/2], 1.02e-4, among those that are 1 at 0.
  Vec p = fma(Vec(0.0550089319), f, Vec(0.242210959));
  p = fma(p, f, Vec(0.693282927));
  return scale(fma(p, f, Vec(1)), n);
}

struct PairProduct {
  template <class V>
  using Gate = Coarse;
  static constexpr WeightOrder kOrder = WeightOrder::pairs;
  template <class V>
  using Weight = uint32_t;

  template <class V>
  static L2L_INLINE const uint32_t* weights(const Packed<float>& packed, int layer) {
    return packed.pairs[layer];
  }
  // A pair, or the bits of a bias.
  template <class V>
  static L2L_INLINE Vec broadcast(const uint32_t* w) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(int(*w)));
  }
  static L2L_INLINE Vec add(Vec w, Vec x, Vec sum) {
    return _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(w.v), (__m512bh)_mm512_castps_si512(x.v));
  }
  static L2L_INLINE constexpr int columns(int inputs, int hidden) { return pairs(inputs) + pairs(hidden); }

  // Each lane's two numbers as bfloat16, the low one first.
  static L2L_INLINE Vec pair(Vec low, Vec high) {
    const __m512i order = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a,
        0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }

  // `count` rows to pairs(count) rows of pairs; returns where they end.
  template <class V, int NV>
  static L2L_INLINE float* gather(const float* from, int64_t stride, int count, float* to) {
    for (int k = 0; k < count; k += 2, from += 2 * stride)
      for (int at = 0; at < NV * V::kLanes; at += V::kLanes, to += V::kLanes)
        pair(V::load(from + at), k + 1 < count ? V::load(from + stride + at) : V(0)).store(to);
    return to;
  }
};

}  // namespace
}  // namespace l2l
