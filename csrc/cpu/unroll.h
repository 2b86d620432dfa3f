// T steps of one tile, forward.
#pragma once

#include "cell.h"
#include "coordinates.h"
#include "tables.h"

namespace l2l {
namespace {

L2L_INLINE Place coordinates(const Matrix& states) { return {states.data, states.dtype, states.row, nullptr}; }
L2L_INLINE Place steps(const Matrix& series) { return {series.data, series.dtype, series.column, nullptr}; }

template <class T>
L2L_INLINE void keep_skipped(T* next, const T* old, const bool* skip, int width, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < width; ++i)
      if (skip[i]) next[r * width + i] = old[r * width + i];
}

template <class V, int NV>
void unroll_tile(
    const UnrollCall<typename V::Scalar>& call, const Matrix& updates, const Matrix& last, int64_t first, int count,
    typename V::Scalar* scratch) {
  using T = typename V::Scalar;
  constexpr int width = NV * V::kLanes;
  const Network& net = call.packed->net;
  const UnrollArguments& arguments = *call.arguments;
  const int rows = net.state_rows();

  const ForwardScratch<T> at(scratch, net, width);
  T *const grad = at.grad, *const output = at.output;
  T *state = at.state, *new_state = at.new_state;
  bool skip[width];

  load_rows(
      state, width, rows, coordinates(arguments.state), first * arguments.state.row, arguments.state.column, count);
  for (int64_t t = 0; t < arguments.steps; ++t) {
    const Matrix& grads = arguments.grads;
    load_rows(grad, width, 1, steps(grads), t * grads.row + first * grads.column, 0, count);
    const bool some = skip_not_finite<V>(net, grad, width, arguments.state.dtype, skip);
    forward<V, NV, false>(
        *call.packed,
        {grad, state, new_state, width, at.features, at.projected, at.columns, at.activations, output,
         call.corrections[t], {}});
    if (some) keep_skipped(new_state, state, skip, width, rows);
    for (int i = 0; i < width; ++i) output[i] = some && skip[i] ? T(0) : T(net.output_scale) * output[i];
    store_rows(output, width, 1, steps(updates), t * updates.row + first * updates.column, 0, count, nullptr);
    T* spent = state;
    state = new_state;
    new_state = spent;
  }
  store_rows(state, width, rows, coordinates(last), first * last.row, last.column, count, nullptr);
}

}  // namespace
}  // namespace l2l
