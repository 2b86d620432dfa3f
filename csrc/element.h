// One element of any dtype, to and from the scalar that arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>

#include "network.h"

namespace l2l {

L2L_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
L2L_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// To nearest, ties to even.
L2L_HOST_DEVICE uint16_t to_bfloat16(float x) {
  uint32_t bits = float_bits(x);
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
L2L_HOST_DEVICE float from_bfloat16(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

L2L_HOST_DEVICE float widen(float x) { return x; }
L2L_HOST_DEVICE double widen(double x) { return x; }
L2L_HOST_DEVICE float widen(BFloat16 x) { return from_bfloat16(x.bits); }
L2L_HOST_DEVICE float widen(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Moving the exponent's bias by a product also makes denormals come out right.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even.
L2L_HOST_DEVICE void narrow(double x, double& to) { to = x; }
L2L_HOST_DEVICE void narrow(double x, float& to) { to = float(x); }
L2L_HOST_DEVICE void narrow(float x, float& to) { to = x; }
L2L_HOST_DEVICE void narrow(float x, double& to) { to = x; }
L2L_HOST_DEVICE void narrow(float x, BFloat16& to) { to.bits = to_bfloat16(x); }
L2L_HOST_DEVICE void narrow(double x, BFloat16& to) { narrow(float(x), to); }
L2L_HOST_DEVICE void narrow(float x, Half& to) {
  uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    to.bits = uint16_t(sign | 0x7e00);
  } else if (rest >= 0x477ff000) {  // rounds to 2^16
    to.bits = uint16_t(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // denormal: adding 0.5 leaves the rounded bits at the bottom
    to.bits = uint16_t(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3f000000));
  } else {
    to.bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
  }
}
L2L_HOST_DEVICE void narrow(double x, Half& to) { narrow(float(x), to); }

// Calls f with a null pointer of the dtype's element type.
template <class F>
L2L_HOST_DEVICE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::float16: return f(static_cast<Half*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
  }
}

L2L_HOST_DEVICE int size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace l2l
