// A tile's coordinates in memory, for the kernels of the step on the matrix units.
#pragma once

#include "matrix_cell.cuh"
#include "matrix_step.h"

namespace l2l {
namespace matrix {

struct StepCall {
  Cell<float> cell;
  Starts starts;
  Scalar lr;
  float weight_decay;
  bool maximize;
};

// With a state of T.
template <class T>
using ArithmeticOf = std::conditional_t<sizeof(T) == 4, Exact, Quick>;

// Four state elements.
template <class T>
using PieceOf = std::conditional_t<sizeof(T) == 4, float4, uint2>;

L2L_DEVICE Four to_four(const float4& piece) { return {{piece.x, piece.y, piece.z, piece.w}}; }
L2L_DEVICE Four to_four(const uint2& piece) {
  return {{bits_float(piece.x << 16), bits_float(piece.x & 0xffff0000u), bits_float(piece.y << 16),
           bits_float(piece.y & 0xffff0000u)}};
}
L2L_DEVICE void set(float4& piece, const Four& x) { piece = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]); }
L2L_DEVICE void set(uint2& piece, const Four& x) {
  piece = make_uint2(device::floats_bfloat16(x.at[0], x.at[1]), device::floats_bfloat16(x.at[2], x.at[3]));
}

// The part of a tile's state that a lane holds: coordinates 4 r .. 4 r + 3 of unit q of every slot.
template <class T>
struct Part {
  T* first;       // of the first slot
  int64_t pitch;  // elements from one row to the next
  int count;      // how many of the four coordinates there are

  L2L_DEVICE T* row(int row) const { return first + row * pitch; }
};

// The coordinates are counted as bits of the tile's. Were they clamped to 0 .. 4 instead, and compared with 4 later, the
// assembler of CUDA 13.0 would take both for one instruction (VIMNMX.RELU on sm_90) whose predicate is another one's:
// on an H100 the fourth of a lane's coordinates was then lost in tiles that are not whole.
template <class T>
L2L_DEVICE Part<T> part(const DenseEntry& entry, const Tile& tile, const Network& net) {
  const Place place;
  const uint32_t of_tile = uint32_t(uint64_t(~0u) >> (kWidth - tile.count));
  const int count = device::count_ones(of_tile >> kOwn * place.r & 15);
  T* const row = static_cast<T*>(entry.state) + (net.moment_rows() + place.q) * entry.state_row;
  return {row + (count ? tile.first + kOwn * place.r : 0), entry.state_row, count};
}

template <class T>
L2L_DEVICE Four load_all(const T* from) {
  return to_four(*reinterpret_cast<const PieceOf<T>*>(from));
}

// The first `count`, then zeros.
template <class T>
L2L_DEVICE Four load_some(const T* from, int count) {
  if (count == kOwn) return load_all(from);
  Four four = {};
#pragma unroll
  for (int n = 0; n < kOwn - 1; ++n)
    if (n < count) four.at[n] = widen(from[n]);
  return four;
}

// Those of the four whose bit is set in `keep`.
template <class T>
L2L_DEVICE void store_some(T* to, const Four& values, uint32_t keep) {
#pragma unroll
  for (int n = 0; n < kOwn; ++n)
    if (keep >> n & 1) narrow(values.at[n], to[n]);
}

// What the owner of a coordinate needs of it first.
struct Own {
  float grad;
  Moments<V> moments;
};

template <class T>
L2L_DEVICE Own load_own(const DenseEntry& entry, const Tile& tile, const Network& net) {
  Own own = {0, {V(0), V(0)}};
  if (device::lane() >= tile.count) return own;
  const int64_t at = tile.first + device::lane();
  own.grad = load<float>(entry.grad, entry.grad_dtype, at);
  if (net.has_moments()) {
    const T* const state = static_cast<const T*>(entry.state) + at;
    own.moments = {V(widen(state[0])), V(widen(state[entry.state_row]))};
  }
  return own;
}

template <class T>
L2L_DEVICE void store_moments(const DenseEntry& entry, int64_t at, const Moments<V>& moments) {
  T* const state = static_cast<T*>(entry.state) + at;
  narrow(moments.m.v, state[0]);
  narrow(moments.v.v, state[entry.state_row]);
}

// Which coordinates change: all of the tile's, or, of the lane's four, those whose bit is set.
struct Changes {
  bool all;
  uint32_t of_four;

  L2L_DEVICE static Changes of(bool own) {
    const uint32_t lanes = device::ballot(own);
    return {lanes == ~0u, lanes >> kOwn * Place().r & 15};
  }
};

// A coordinate's new value, from the head's output.
L2L_DEVICE float moved(float theta, float y, float lr, const StepCall& call) {
  return theta + lr * (call.cell.output_scale * y - call.weight_decay * theta);
}

}  // namespace matrix
}  // namespace l2l
