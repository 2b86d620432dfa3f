// The kernels' own exp2 and log in float32.
//
//   exp2     relative error <= 2e-7 for y in [-126, 42]; below, between 0 and 2^-126. NaN gives NaN.
//   log      error <= 1e-7 |log x| + 5e-8 from the least denormal to the largest float; log 0 = -inf,
//            log inf = inf, NaN gives NaN.
//   sigmoid  error <= 1.5e-7, and tanh error <= 2e-7, of any x, infinities included; both are exact at 0.
//
// tests/native/kernels_test.cpp holds every instruction set to these bounds.
#pragma once

namespace l2l {
namespace {

template <class V>
L2L_INLINE V exp2(V y) {
  y = clamp_exponent(y);
  V f = fraction(y);
  // Minimax in relative error on [0, 1], 8.2e-8, among those that are 1 at 0: tanh 0 is 0 and sigmoid 0 is a half.
  V p = fma(V(0.001867130163), f, V(0.009017030125));
  p = fma(p, f, V(0.05579991324));
  p = fma(p, f, V(0.2401644501));
  p = fma(p, f, V(0.6931513118));
  p = fma(p, f, V(1));
  return scale(p, y);
}

template <class V>
L2L_INLINE V log(V x) {
  V exponent, f = split(x, exponent) - V(1);
  // log(1 + f) = f - f^2 / 2 + f^3 P(f) with P minimax on [-1/4, 1/2]: relative error 5e-9.
  V p = fma(V(-0.045074816289), f, V(0.10463026327));
  p = fma(p, f, V(-0.13161196442));
  p = fma(p, f, V(0.14478395371));
  p = fma(p, f, V(-0.1664731196));
  p = fma(p, f, V(0.19990861175));
  p = fma(p, f, V(-0.25000095845));
  p = fma(p, f, V(0.33333449114));
  V square = f * f;
  V tail = fma(V(-0.5), square, p * f * square);
  // ln 2 in two parts of one sign, the first exact times any exponent.
  return fma(exponent, V(0.693145751953125), f + fma(exponent, V(1.428606765330187e-6), tail));
}

}  // namespace
}  // namespace l2l
