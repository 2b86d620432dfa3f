// float32 to and from bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "../network.h"

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

}  // namespace l2l
