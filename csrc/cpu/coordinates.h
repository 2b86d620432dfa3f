// Coordinates of tensors of any dtype and strides, to and from the rows of a tile.
#pragma once

#include "bfloat16.h"

namespace l2l {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

L2L_INLINE float widen(float x) { return x; }
L2L_INLINE double widen(double x) { return x; }
L2L_INLINE float widen(BFloat16 x) { return from_bfloat16(x.bits); }
L2L_INLINE float widen(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Moving the exponent's bias by a product also makes denormals come out right.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even.
L2L_INLINE void narrow(double x, double& to) { to = x; }
L2L_INLINE void narrow(double x, float& to) { to = float(x); }
L2L_INLINE void narrow(float x, float& to) { to = x; }
L2L_INLINE void narrow(float x, double& to) { to = x; }
L2L_INLINE void narrow(float x, BFloat16& to) { to.bits = to_bfloat16(x); }
L2L_INLINE void narrow(double x, BFloat16& to) { narrow(float(x), to); }
L2L_INLINE void narrow(float x, Half& to) {
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
L2L_INLINE void narrow(double x, Half& to) { narrow(float(x), to); }

// Calls f with a null pointer of the dtype's element type.
template <class F>
L2L_INLINE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::float16: return f(static_cast<Half*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
  }
}

L2L_INLINE int size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Where the `count` coordinates of a tile lie in one tensor: at data + stride * i, or at data + offsets[i].
struct Place {
  void* data;
  DType dtype;
  int64_t stride;
  const int64_t* offsets;  // null: evenly strided
};

template <class E, class F>
L2L_INLINE void for_each(const Place& place, int64_t start, int count, F f) {
  E* data = static_cast<E*>(place.data) + start;
  if (place.offsets) {
    for (int i = 0; i < count; ++i) f(i, data[place.offsets[i]]);
  } else if (place.stride == 1) {
    for (int i = 0; i < count; ++i) f(i, data[i]);
  } else {
    for (int i = 0; i < count; ++i) f(i, data[i * place.stride]);
  }
}

// Row r of the tile, `width` long, from the coordinates at start + r * step; zeros after the last coordinate.
template <class T>
void load_rows(T* tile, int width, int rows, const Place& place, int64_t start, int64_t step, int count) {
  with_dtype(place.dtype, [&](auto* null) __attribute__((always_inline)) {
    using E = std::remove_pointer_t<decltype(null)>;
    for (int r = 0; r < rows; ++r, tile += width) {
      for_each<E>(place, start + r * step, count, [&](int i, const E& x) { tile[i] = T(widen(x)); });
      for (int i = count; i < width; ++i) tile[i] = 0;
    }
  });
}

// The way back; coordinates with skip[i] stay as they are.
template <class T>
void store_rows(
    const T* tile, int width, int rows, const Place& place, int64_t start, int64_t step, int count, const bool* skip) {
  with_dtype(place.dtype, [&](auto* null) __attribute__((always_inline)) {
    using E = std::remove_pointer_t<decltype(null)>;
    for (int r = 0; r < rows; ++r, tile += width) {
      if (skip) {
        for_each<E>(place, start + r * step, count, [&](int i, E& x) {
          if (!skip[i]) narrow(tile[i], x);
        });
      } else {
        for_each<E>(place, start + r * step, count, [&](int i, E& x) { narrow(tile[i], x); });
      }
    }
  });
}

// Adds to the coordinates, in the wider of their dtype and T.
template <class T>
void add_row(const T* tile, const Place& place, int64_t start, int count, const bool* skip) {
  with_dtype(place.dtype, [&](auto* null) __attribute__((always_inline)) {
    using E = std::remove_pointer_t<decltype(null)>;
    for_each<E>(place, start, count, [&](int i, E& x) {
      if (!skip || !skip[i]) narrow(widen(x) + tile[i], x);
    });
  });
}

// Offsets of coordinates first .. first + count - 1, numbered row-major over the sizes.
inline void offsets_of(
    int dims, const int64_t* sizes, const int64_t* strides, int64_t first, int count, int64_t* offsets) {
  int64_t index[kMaxDims], offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    index[d] = first % sizes[d];
    first /= sizes[d];
    offset += index[d] * strides[d];
  }
  for (int i = 0; i < count; ++i) {
    offsets[i] = offset;
    for (int d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace
}  // namespace l2l
