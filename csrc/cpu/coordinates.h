// Coordinates of tensors of any dtype and strides, to and from the rows of a tile.
#pragma once

#include "../element.h"
#include "../lstm_step.h"
#include "vec.h"

namespace l2l {
namespace {

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
