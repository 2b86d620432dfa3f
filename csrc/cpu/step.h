// The optimizer's step on one tile of one tensor.
#pragma once

#include "cell.h"
#include "coordinates.h"
#include "tables.h"

namespace l2l {
namespace {

// Rows of V's own scalars, each beginning at a whole vector.
template <class V>
L2L_INLINE bool aligned(const Place& place, int64_t row) {
  using T = typename V::Scalar;
  return place.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32) && place.stride == 1 && !place.offsets &&
         reinterpret_cast<uintptr_t>(place.data) % sizeof(V) == 0 && row % V::kLanes == 0;
}

template <class V, int NV, class Product>
void step_tile(
    const StepCall<typename V::Scalar>& call, const StepTensor& tensor,
    const Corrections<typename V::Scalar>& corrections, int64_t first, int count, typename V::Scalar* scratch) {
  using T = typename V::Scalar;
  constexpr int width = NV * V::kLanes;
  const Network& net = call.packed->net;

  const ForwardScratch<T> rows(scratch, net, width);
  T *const grad = rows.grad, *const output = rows.output, *const state = rows.state, *const new_state = rows.new_state;

  int64_t offsets[3][width];
  Place places[3];
  const Strided* tensors[3] = {&tensor.param, &tensor.grad, &tensor.state};
  for (int k = 0; k < 3; ++k) {
    const Strided& from = *tensors[k];
    if (tensor.dims == 1) {
      places[k] = {from.data, from.dtype, from.strides[0], nullptr};
    } else {
      offsets_of(tensor.dims, tensor.sizes, from.strides, first, count, offsets[k]);
      places[k] = {from.data, from.dtype, 0, offsets[k]};
    }
  }
  auto start = [&](int k) { return tensor.dims == 1 ? first * places[k].stride : 0; };
  const Place &param = places[0], &state_place = places[2];

  // The next tile's rows; the state's are called for unit by unit.
  auto next = [&](int k, int64_t row) -> Ahead {
    if (tensor.dims != 1 || places[k].stride != 1) return {};
    const int64_t size = size_of(places[k].dtype);
    return {static_cast<const char*>(places[k].data) + (first + width) * size, row * size, int(width * size)};
  };
  next(0, 0).fetch(0);
  next(1, 0).fetch(0);

  load_rows(grad, width, 1, places[1], start(1), 0, count);
  if (call.maximize)
    for (int i = 0; i < width; ++i) grad[i] = -grad[i];
  bool marks[width];
  const bool* skip = skip_not_finite<V>(net, grad, width, state_place.dtype, marks) ? marks : nullptr;

  // A state that lies as new_state lays it out is worked on where it is; any other goes through the scratch.
  const bool direct = !skip && count == width && aligned<V>(state_place, tensor.state_row);
  TileStep<T> tile = {
      grad, state, new_state, width, rows.features, rows.projected, rows.columns, rows.activations, output, corrections,
      next(2, tensor.state_row)};
  if (direct) {
    T* data = static_cast<T*>(state_place.data) + first;
    tile.state = tile.new_state = data;
    tile.state_stride = tensor.state_row;
  } else {
    load_rows(state, width, net.state_rows(), state_place, start(2), tensor.state_row, count);
  }
  forward<V, NV, false, Product>(*call.packed, tile);

  // The tile's gradient is spent; its row takes the parameter's change.
  T* change = grad;
  load_rows(change, width, 1, param, start(0), 0, count);
  const T scale = T(net.output_scale);
  for (int i = 0; i < width; ++i) change[i] = call.lr * (scale * output[i] - call.weight_decay * change[i]);
  add_row(change, param, start(0), count, skip);
  if (!direct) store_rows(new_state, width, net.state_rows(), state_place, start(2), tensor.state_row, count, skip);
}

}  // namespace
}  // namespace l2l
