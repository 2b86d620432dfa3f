// The kernels' own exp2 and log in float32.
//
//   exp2   relative error <= 3e-7 for y in [-126, 127]; below, between 0 and 2^-126. NaN gives NaN.
//   log    error <= 2e-7 |log x| + 1e-7 for x from the least denormal to infinity; log 0 = -inf, NaN gives NaN.
// So gate_exp's sigmoid and tanh are within 3e-7 of the truth everywhere. tests/native holds them to these bounds.
#pragma once

namespace l2l {
namespace {

template <class V>
L2L_INLINE V exp2(V y) {
  y = clamp_exponent(y);
  V f = fraction(y);
  // Minimax in relative error on [0, 1], 7.5e-8.
  V p = fma(V(0.0018775767), f, V(0.0089893397));
  p = fma(p, f, V(0.0558263175));
  p = fma(p, f, V(0.2401536107));
  p = fma(p, f, V(0.6931530833));
  p = fma(p, f, V(0.9999999404));
  return scale(p, y);
}

template <class V>
L2L_INLINE V log(V x) {
  V exponent, f = split(x, exponent) - V(1);
  // log(1 + f) = f - f^2 / 2 + f^3 P(f); P is that of Cephes' logf.
  V p = fma(V(7.0376836292e-2), f, V(-1.1514610310e-1));
  p = fma(p, f, V(1.1676998740e-1));
  p = fma(p, f, V(-1.2420140846e-1));
  p = fma(p, f, V(1.4249322787e-1));
  p = fma(p, f, V(-1.6668057665e-1));
  p = fma(p, f, V(2.0000714765e-1));
  p = fma(p, f, V(-2.4999993993e-1));
  p = fma(p, f, V(3.3333331174e-1));
  V square = f * f;
  V tail = fma(V(-0.5), square, p * f * square);
  // ln 2 in two parts, the first exact times any exponent.
  return fma(exponent, V(0.693359375), f + fma(exponent, V(-2.12194440e-4), tail));
}

}  // namespace
}  // namespace l2l
