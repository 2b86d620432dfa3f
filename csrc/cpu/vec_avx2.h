// Eight float32 coordinates in an AVX2 register. Include inside the AVX2 unit only.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kWide = 2;       // 4 gates x 2 vectors of accumulators: as many as hide an FMA's latency
  static constexpr bool kInterleave = false;
  static constexpr int kOuterRows = 3;  // register block of the outer product: 3 x 4 of 16 registers
  static constexpr int kOuterColumns = 4;

  __m256 v;

  Vec() = default;
  L2L_INLINE Vec(__m256 x) : v(x) {}
  L2L_INLINE explicit Vec(double x) : v(_mm256_set1_ps(float(x))) {}
  L2L_INLINE static Vec load(const float* p) { return _mm256_load_ps(p); }
  L2L_INLINE static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  L2L_INLINE void store(float* p) const { _mm256_store_ps(p, v); }
};

using Mask = Vec;  // all bits of a lane, or none

L2L_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
L2L_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
L2L_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
L2L_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
L2L_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
L2L_INLINE Vec times_one_plus(Vec a, Vec e) { return _mm256_fmadd_ps(a.v, e.v, a.v); }
L2L_INLINE Vec times_one_minus(Vec a, Vec e) { return _mm256_fnmadd_ps(a.v, e.v, a.v); }
L2L_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }  // b where either is NaN
L2L_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
L2L_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
L2L_INLINE Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
L2L_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m.v); }
L2L_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.v) == 0xff; }

// y - floor(y), for finite y.
L2L_INLINE Vec fraction(Vec y) { return _mm256_sub_ps(y.v, _mm256_floor_ps(y.v)); }
// p * 2^floor(y) for y <= 127; below 2^-126 it stays there.
L2L_INLINE Vec scale(Vec p, Vec y) {
  __m256i n = _mm256_cvttps_epi32(_mm256_floor_ps(y.v));
  return _mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
}
L2L_INLINE Vec clamp_exponent(Vec y) { return _mm256_max_ps(_mm256_set1_ps(-126.0f), y.v); }  // NaN passes
// x = mantissa * 2^exponent, mantissa in [0.75, 1.5); mantissa 1 and an infinite exponent for 0 and infinity.
L2L_INLINE Vec split(Vec x, Vec& exponent) {
  const __m256 tiny = _mm256_set1_ps(0x1p-126f), infinity = _mm256_set1_ps(INFINITY), zero = _mm256_setzero_ps();
  __m256 denormal = _mm256_cmp_ps(x.v, tiny, _CMP_LT_OQ);
  __m256 normal = _mm256_blendv_ps(x.v, _mm256_mul_ps(x.v, _mm256_set1_ps(0x1p24f)), denormal);
  __m256i bits = _mm256_castps_si256(normal);
  __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
  __m256 mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
  __m256 e = _mm256_sub_ps(_mm256_cvtepi32_ps(n), _mm256_and_ps(denormal, _mm256_set1_ps(24.0f)));
  __m256 is_zero = _mm256_cmp_ps(x.v, zero, _CMP_EQ_OQ), is_infinite = _mm256_cmp_ps(x.v, infinity, _CMP_EQ_OQ);
  e = _mm256_blendv_ps(e, _mm256_set1_ps(-INFINITY), is_zero);
  exponent = _mm256_blendv_ps(e, infinity, is_infinite);
  mantissa = _mm256_blendv_ps(mantissa, _mm256_set1_ps(1.0f), _mm256_or_ps(is_zero, is_infinite));
  return _mm256_blendv_ps(mantissa, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
}

// 8 x 8 block: to[c * to_row + r] = from[r * from_row + c].
L2L_INLINE void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) r[k] = _mm256_load_ps(from + k * from_row);
#pragma GCC unroll 4
  for (int k = 0; k < 8; k += 2) {
    t[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
    t[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
  }
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    r[k] = _mm256_shuffle_ps(t[k], t[k + 2], 0x44);
    r[k + 1] = _mm256_shuffle_ps(t[k], t[k + 2], 0xee);
    r[k + 2] = _mm256_shuffle_ps(t[k + 1], t[k + 3], 0x44);
    r[k + 3] = _mm256_shuffle_ps(t[k + 1], t[k + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm256_store_ps(to + k * to_row, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_store_ps(to + (k + 4) * to_row, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  }
}

}  // namespace
}  // namespace l2l
