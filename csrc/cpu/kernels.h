// Every kernel, for the vector type Vec that the including unit has defined.
#pragma once

#include "../lstm_cell.h"
#include "math.h"
#include "coordinates.h"
#include "cell.h"
#include "step.h"
#include "unroll.h"
#include "outer.h"
#include "unroll_backward.h"
#include "peak.h"
#include "tables.h"
#include "vec.h"

namespace l2l {
namespace {

// The last tile of a tensor may be a narrow one.
template <class V, class F>
L2L_INLINE void with_width(int count, F f) {
  constexpr int lanes = V::kLanes;
  if (count <= lanes) return f(std::integral_constant<int, 1>());
  if (V::kWide > 2 && count <= 2 * lanes) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, V::kWide>());
}

template <class V, class Product = ScalarProduct, class T = typename V::Scalar>
constexpr StepKernel<T> step_kernel() {
  return {
      V::kWide * V::kLanes, Product::kOrder,
      [](const StepCall<T>& call, const StepTensor& tensor, const Corrections<T>& corrections, int64_t first, int count,
         T* scratch) {
        with_width<V>(count, [&](auto wide) {
          step_tile<V, wide, Product>(call, tensor, corrections, first, count, scratch);
        });
      }};
}

template <class V, class T = typename V::Scalar>
constexpr UnrollKernels<T> unroll_kernels() {
  return {
      V::kWide * V::kLanes,
      V::kLanes,
      [](const UnrollCall<T>& call, const Matrix& updates, const Matrix& last, int64_t first, int count, T* scratch) {
        with_width<V>(count, [&](auto wide) { unroll_tile<V, wide>(call, updates, last, first, count, scratch); });
      },
      [](const Network& net, int width, int64_t steps) { return backward_scratch<V>(net, width, steps); },
      [](const UnrollCall<T>& call, int64_t first, int count, T* scratch, double* d_weights) {
        with_width<V>(count, [&](auto wide) { unroll_backward_tile<V, wide>(call, first, count, scratch, d_weights); });
      },
  };
}

template <class V, class T = typename V::Scalar>
constexpr Kernels<T> kernels() {
  return {step_kernel<V>(), unroll_kernels<V>(), multiply_adds<V>};
}

}  // namespace
}  // namespace l2l
