// Sixteen float32 coordinates in an AVX-512 register. Include inside the AVX-512 units only.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kWide = 4;  // vectors in a full tile: 4 gates x 4 vectors of accumulators hide an FMA's latency
  static constexpr bool kInterleave = true;  // registers enough for products and activations at once
  static constexpr int kOuterRows = 5;  // register block of the outer product: 5 x 5 of 32 registers
  static constexpr int kOuterColumns = 5;

  __m512 v;

  Vec() = default;
  L2L_INLINE Vec(__m512 x) : v(x) {}
  L2L_INLINE explicit Vec(double x) : v(_mm512_set1_ps(float(x))) {}
  L2L_INLINE static Vec load(const float* p) { return _mm512_load_ps(p); }
  L2L_INLINE static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  L2L_INLINE void store(float* p) const { _mm512_store_ps(p, v); }
};

using Mask = __mmask16;

L2L_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
L2L_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
L2L_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
L2L_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
L2L_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
L2L_INLINE Vec times_one_plus(Vec a, Vec e) { return _mm512_fmadd_ps(a.v, e.v, a.v); }
L2L_INLINE Vec times_one_minus(Vec a, Vec e) { return _mm512_fnmadd_ps(a.v, e.v, a.v); }
L2L_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }  // b where either is NaN
L2L_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
L2L_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
L2L_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
L2L_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b.v, a.v); }
L2L_INLINE bool all(Mask m) { return m == 0xffff; }

// y - floor(y); 0 for infinities.
L2L_INLINE Vec fraction(Vec y) { return _mm512_reduce_ps(y.v, 0x01); }
// p * 2^floor(y).
L2L_INLINE Vec scale(Vec p, Vec y) { return _mm512_scalef_ps(p.v, y.v); }
L2L_INLINE Vec clamp_exponent(Vec y) { return y; }
// x = mantissa * 2^exponent, mantissa in [0.75, 1.5); mantissa 1 and an infinite exponent for 0 and infinity.
L2L_INLINE Vec split(Vec x, Vec& exponent) {
  __m512 mantissa = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  exponent = _mm512_sub_ps(_mm512_getexp_ps(x.v), _mm512_getexp_ps(mantissa));
  return mantissa;
}

// 16 x 16 block: to[c * to_row + r] = from[r * from_row + c].
L2L_INLINE void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) r[k] = _mm512_load_ps(from + k * from_row);
#pragma GCC unroll 8
  for (int k = 0; k < 16; k += 2) {
    t[k] = _mm512_unpacklo_ps(r[k], r[k + 1]);
    t[k + 1] = _mm512_unpackhi_ps(r[k], r[k + 1]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 16; k += 4) {
    r[k] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[k]), _mm512_castps_pd(t[k + 2])));
    r[k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[k]), _mm512_castps_pd(t[k + 2])));
    r[k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[k + 1]), _mm512_castps_pd(t[k + 3])));
    r[k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[k + 1]), _mm512_castps_pd(t[k + 3])));
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_f32x4(r[k], r[k + 4], 0x88);
    t[k + 4] = _mm512_shuffle_f32x4(r[k], r[k + 4], 0xdd);
    t[k + 8] = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0x88);
    t[k + 12] = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm512_store_ps(to + k * to_row, _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88));
    _mm512_store_ps(to + (k + 4) * to_row, _mm512_shuffle_f32x4(t[k + 4], t[k + 12], 0x88));
    _mm512_store_ps(to + (k + 8) * to_row, _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd));
    _mm512_store_ps(to + (k + 12) * to_row, _mm512_shuffle_f32x4(t[k + 4], t[k + 12], 0xdd));
  }
}

}  // namespace
}  // namespace l2l
