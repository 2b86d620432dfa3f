// One coordinate in a register: the scalar that lstm_cell.h is compiled for on a GPU.
//
// In float32, exp2 and reciprocals are the special-function unit's, two and one units in the last place off: as good as
// the CPU kernels' own. Quotients whose reciprocal is denormal become 0; in a cell they are below 1e-12. Everything
// else, and all of float64, is the CUDA library's and correct to its last place or two.
#pragma once

#include <cmath>

#include "../lstm_cell.h"
#include "device.cuh"

namespace l2l {

template <class T>
struct Real {
  T v;

  Real() = default;
  template <class U>
  L2L_DEVICE explicit Real(U x) : v(T(x)) {}
};

template <class T>
L2L_DEVICE Real<T> operator+(Real<T> a, Real<T> b) {
  return Real<T>(a.v + b.v);
}
template <class T>
L2L_DEVICE Real<T> operator-(Real<T> a, Real<T> b) {
  return Real<T>(a.v - b.v);
}
template <class T>
L2L_DEVICE Real<T> operator*(Real<T> a, Real<T> b) {
  return Real<T>(a.v * b.v);
}
L2L_DEVICE Real<float> operator/(Real<float> a, Real<float> b) {
  return Real<float>(a.v * device::fast_reciprocal(b.v));
}
L2L_DEVICE Real<double> operator/(Real<double> a, Real<double> b) { return Real<double>(a.v / b.v); }

template <class T>
L2L_DEVICE Real<T> fma(Real<T> a, Real<T> b, Real<T> c) {
  return Real<T>(std::fma(a.v, b.v, c.v));
}
L2L_DEVICE Real<float> min(Real<float> a, Real<float> b) { return Real<float>(device::min_nan(a.v, b.v)); }
L2L_DEVICE Real<double> min(Real<double> a, Real<double> b) { return a.v < b.v ? a : b; }  // b where either is NaN
template <class T>
L2L_DEVICE Real<T> abs(Real<T> a) {
  return Real<T>(std::fabs(a.v));
}
template <class T>
L2L_DEVICE Real<T> sqrt(Real<T> a) {
  return Real<T>(std::sqrt(a.v));
}
template <class T>
L2L_DEVICE bool less(Real<T> a, Real<T> b) {
  return a.v < b.v;
}
template <class T>
L2L_DEVICE Real<T> select(bool condition, Real<T> a, Real<T> b) {
  return condition ? a : b;
}
L2L_DEVICE Real<float> exp2(Real<float> a) { return Real<float>(device::fast_exp2(a.v)); }
L2L_DEVICE Real<double> exp2(Real<double> a) { return Real<double>(std::exp2(a.v)); }
template <class T>
L2L_DEVICE Real<T> log(Real<T> a) {
  return Real<T>(std::log(a.v));
}

}  // namespace l2l
