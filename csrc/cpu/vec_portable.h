// A few coordinates in the compiler's own vector type: float32 or float64, for any machine.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

template <class T>
struct Portable {
  using Scalar = T;
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kWide = 2;
  static constexpr bool kInterleave = false;
  static constexpr int kOuterRows = 2;
  static constexpr int kOuterColumns = 4;

  typedef T Register __attribute__((vector_size(16)));
  Register v;

  Portable() = default;
  L2L_INLINE Portable(Register x) : v(x) {}
  L2L_INLINE explicit Portable(double x) {
    for (int k = 0; k < kLanes; ++k) v[k] = T(x);
  }
  L2L_INLINE static Portable load(const T* p) { return *reinterpret_cast<const Register*>(p); }
  L2L_INLINE static Portable broadcast(const T* p) { return Portable(double(*p)); }
  L2L_INLINE void store(T* p) const { *reinterpret_cast<Register*>(p) = v; }
};

template <class T>
struct PortableMask {
  decltype(typename Portable<T>::Register{} < typename Portable<T>::Register{}) m;
};

// Lane by lane: what the compiler has no vector operation for.
template <class T, class F>
L2L_INLINE Portable<T> each(Portable<T> a, F f) {
  for (int k = 0; k < Portable<T>::kLanes; ++k) a.v[k] = f(a.v[k]);
  return a;
}

#define L2L_BINARY(op)                                               \
  template <class T>                                                 \
  L2L_INLINE Portable<T> operator op(Portable<T> a, Portable<T> b) { \
    return a.v op b.v;                                               \
  }
L2L_BINARY(+)
L2L_BINARY(-)
L2L_BINARY(*)
L2L_BINARY(/)
#undef L2L_BINARY

template <class T>
L2L_INLINE Portable<T> fma(Portable<T> a, Portable<T> b, Portable<T> c) {
  return a.v * b.v + c.v;
}
template <class T>
L2L_INLINE PortableMask<T> less(Portable<T> a, Portable<T> b) {
  return {a.v < b.v};
}
template <class T>
L2L_INLINE Portable<T> select(PortableMask<T> mask, Portable<T> a, Portable<T> b) {
  using Bits = decltype(mask.m);
  return typename Portable<T>::Register((mask.m & Bits(a.v)) | (~mask.m & Bits(b.v)));
}
template <class T>
L2L_INLINE bool all(PortableMask<T> mask) {
  bool every = true;
  for (int k = 0; k < Portable<T>::kLanes; ++k) every &= mask.m[k] != 0;
  return every;
}
template <class T>
L2L_INLINE Portable<T> min(Portable<T> a, Portable<T> b) {  // b where either is NaN
  return select(less(a, b), a, b);
}
template <class T>
L2L_INLINE Portable<T> abs(Portable<T> a) {
  return each(a, [](T x) { return std::fabs(x); });
}
template <class T>
L2L_INLINE Portable<T> sqrt(Portable<T> a) {
  return each(a, [](T x) { return std::sqrt(x); });
}

// y - floor(y), for finite y of magnitude below 2^22.
L2L_INLINE Portable<float> floor_below(Portable<float> y) {
  const Portable<float> magic(0x1.8p23);
  Portable<float> nearest = (y + magic) - magic;
  return nearest - select(less(y, nearest), Portable<float>(1.0), Portable<float>(0.0));
}
L2L_INLINE Portable<float> fraction(Portable<float> y) { return y - floor_below(y); }
// p * 2^floor(y) for -126 <= y <= 127.
L2L_INLINE Portable<float> scale(Portable<float> p, Portable<float> y) {
  typedef int32_t Int __attribute__((vector_size(16)));
  Portable<float> shifted = floor_below(y) + Portable<float>(0x1.8p23 + 127);
  return p * Portable<float>(Portable<float>::Register(Int(shifted.v) << 23));
}
L2L_INLINE Portable<float> clamp_exponent(Portable<float> y) {  // NaN passes
  return select(less(y, Portable<float>(-126.0)), Portable<float>(-126.0), y);
}
// x = mantissa * 2^exponent, mantissa in [0.75, 1.5); mantissa 1 and an infinite exponent for 0 and infinity.
L2L_INLINE Portable<float> split(Portable<float> x, Portable<float>& exponent) {
  for (int k = 0; k < Portable<float>::kLanes; ++k) {
    int n = 0;
    float value = x.v[k], mantissa = std::frexp(value, &n);  // [0.5, 1)
    bool low = mantissa < 0.75f;
    bool special = value == 0 || std::isinf(value);
    exponent.v[k] = special ? (value == 0 ? -INFINITY : INFINITY) : float(n - low);
    x.v[k] = special ? 1.0f : mantissa * (low ? 2.0f : 1.0f);
  }
  return x;
}

L2L_INLINE Portable<double> exp2(Portable<double> y) {
  return each(y, [](double x) { return std::exp2(x); });
}
L2L_INLINE Portable<double> log(Portable<double> x) {
  return each(x, [](double y) { return std::log(y); });
}

// Block of kLanes x kLanes: to[c * to_row + r] = from[r * from_row + c].
template <class T>
L2L_INLINE void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int lanes = Portable<T>::kLanes;
  for (int r = 0; r < lanes; ++r)
    for (int c = 0; c < lanes; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace
}  // namespace l2l
