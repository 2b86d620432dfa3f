// Outer products summed over the coordinates of a tile: how gradients of weight matrices are formed.
//
// The rows of a gradient lie across the lanes, so its rows are first transposed to [coordinate][row]; then a block of
// the gradient stays in registers while the tile's coordinates go by.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

template <class V>
L2L_INLINE constexpr int padded(int rows) {
  return (rows + V::kLanes - 1) / V::kLanes * V::kLanes;
}

// to[coordinate][row] = from[row][coordinate]. Reads rows up to a multiple of kLanes; those past the last give garbage,
// which stays in columns that nobody reads.
template <class V>
void transpose_rows(const typename V::Scalar* from, int width, int rows, typename V::Scalar* to) {
  for (int row = 0; row < rows; row += V::kLanes)
    for (int at = 0; at < width; at += V::kLanes)
      transpose(from + row * width + at, width, to + at * padded<V>(rows) + row, padded<V>(rows));
}

// A block of R vectors of rows and C columns: sum[c][r] += sum over i of rows[i][r] * columns[c][i].
template <class V, int R, int C>
L2L_INLINE void outer_block(
    typename V::Scalar* sum, const typename V::Scalar* rows, int stride, const typename V::Scalar* columns, int width) {
  V acc[C][R];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[c][r] = V::load(sum + c * stride + r * V::kLanes);
  for (int i = 0; i < width; ++i) {
    V row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = V::load(rows + i * stride + r * V::kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      V x = V::broadcast(columns + c * width + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[c][r] = fma(x, row[r], acc[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[c][r].store(sum + c * stride + r * V::kLanes);
}

template <class V, int R>
L2L_INLINE void outer_strip(
    typename V::Scalar* sum, const typename V::Scalar* rows, int stride, const typename V::Scalar* columns, int count,
    int width) {
  constexpr int C = V::kOuterColumns;
  int c = 0;
  for (; c + C <= count; c += C) outer_block<V, R, C>(sum + c * stride, rows, stride, columns + c * width, width);
  for (; c < count; ++c) outer_block<V, R, 1>(sum + c * stride, rows, stride, columns + c * width, width);
}

// sum[c][r] += sum over i of rows[i][r] * columns[c][i], for `count` columns and padded(row_count) rows.
template <class V>
void outer(
    typename V::Scalar* sum, const typename V::Scalar* rows, int row_count, const typename V::Scalar* columns,
    int count, int width) {
  constexpr int R = V::kOuterRows;
  const int stride = padded<V>(row_count);
  int r = 0;
  for (; r + R * V::kLanes <= stride; r += R * V::kLanes)
    outer_strip<V, R>(sum + r, rows + r, stride, columns, count, width);
  for (; r < stride; r += V::kLanes) outer_strip<V, 1>(sum + r, rows + r, stride, columns, count, width);
}

// sum[r] += sum over i of rows[i][r].
template <class V>
void sum_rows(typename V::Scalar* sum, const typename V::Scalar* rows, int row_count, int width) {
  const int stride = padded<V>(row_count);
  for (int r = 0; r < stride; r += V::kLanes) {
    V even = V::load(sum + r), odd(0);
    for (int i = 0; i < width; i += 2) {
      even = even + V::load(rows + i * stride + r);
      odd = odd + V::load(rows + (i + 1) * stride + r);
    }
    (even + odd).store(sum + r);
  }
}

}  // namespace
}  // namespace l2l
