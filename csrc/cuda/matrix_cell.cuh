// One step of the network for a tile of 32 coordinates, by one warp on the matrix units.
//
// A product has the coordinates as rows, the gates as columns. Which coordinate, gate and k stand in which row, column
// and k of a fragment is ours to choose, so that a lane's results are just what it needs next. With lane = 4 r + q:
//   rows     the lane's four rows, r and r + 8 of two fragments, are the coordinates 4 r .. 4 r + 3 of the tile: 16
//            bytes of a state row
//   columns  its two columns of fragments (j, 0) and (j, 1) are the gates i, f and g, o of unit 4 j + q
//   k        the lane's k of chunk m are element q of the slots g m .. g m + g - 1, g being the arithmetic's kGroup; slot s
//            of h is the units 4 s .. 4 s + 3
// So a lane owns units q, 4 + q, 8 + q, .. of four coordinates: it has all four gates of each and its c, and the h that
// it forms is its part of the left operand of the next product. Activations never leave the lane.
#pragma once

#include "matrix_arithmetic.cuh"
#include "tile.cuh"

namespace l2l {
namespace matrix {

struct Place {
  int r = device::lane() / 4, q = device::lane() % 4;
};

// What a layer multiplies: the slots from below, its own h and, if that fills the last chunk, zeros.
template <class A, int kInputs, int kSlots>
struct Operand {
  static constexpr int kChunks = chunks<A>(kInputs, kSlots);
  typename A::Chunk parts[kChunks];

  template <class Below, class H>
  L2L_DEVICE Operand(const Below& below, const H& h) {
    Four slots[kChunks][A::kGroup] = {};
#pragma unroll
    for (int i = 0; i < kInputs; ++i) slots[i / A::kGroup][i % A::kGroup] = below(i);
#pragma unroll
    for (int j = kInputs; j < kInputs + kSlots; ++j) slots[j / A::kGroup][j % A::kGroup] = h(j - kInputs);
#pragma unroll
    for (int m = 0; m < kChunks; ++m) parts[m] = A::chunk(slots[m], kInputs - A::kGroup * m);
  }
};

// The gates of one slot's units and what follows from them. fragments(m, half): of chunk m and gates i, f or g, o.
template <class A, int kChunks, class Fragments>
L2L_DEVICE void run_slot(
    const typename A::Chunk (&operand)[kChunks], const float4& bias, const Fragments& fragments, const Four& c_old,
    Four& c, Four& h) {
  float acc[2][2][4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    acc[0][t][0] = acc[0][t][2] = bias.x;
    acc[0][t][1] = acc[0][t][3] = bias.y;
    acc[1][t][0] = acc[1][t][2] = bias.z;
    acc[1][t][1] = acc[1][t][3] = bias.w;
  }
#pragma unroll
  for (int m = 0; m < kChunks; ++m) {
    const typename A::Fragment pair[2] = {fragments(m, 0), fragments(m, 1)};
    A::multiply(acc, operand[m], pair);
  }
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const float* const if_ = acc[0][n / 2] + n % 2 * 2;
    const float* const go = acc[1][n / 2] + n % 2 * 2;
    c.at[n] = A::c(if_[0], if_[1], go[0], c_old.at[n]);
    h.at[n] = A::h(go[1], c.at[n]);
  }
}

// One layer with the weights that Packer left, where memory is
//   below(i)       slot i of what comes from below: features, projected features, the new h of the layer before
//   h(j), c(j)     slot j of the old state; h_read() follows the last h
//   keep(j, c, h)  takes the new ones, h for the next layer's below too: the last below and h were read before
// One slot after the other, in a loop: unrolled, both layers would be 40 KB of instructions, more than the caches for them
// hold, and other warps fill the waits as well as another slot of the same would.
template <class A, int kSlots, int kInputs, class Memory>
L2L_DEVICE void run_layer(const float4* weights, Memory& memory) {
  constexpr int kChunks = chunks<A>(kInputs, kSlots);
  const Operand<A, kInputs, kSlots> operand([&](int i) { return memory.below(i); }, [&](int j) { return memory.h(j); });
  memory.h_read();

  const auto packed = reinterpret_cast<const typename A::Fragment*>(weights);
  const float4* const biases = weights + Sizes<A>::layer_fragments(kInputs, kSlots);
#pragma unroll 1
  for (int j = 0; j < kSlots; ++j) {
    const auto from = packed + j * kChunks * 2 * device::kWarp + device::lane();
    Four c, h;
    run_slot<A>(
        operand.parts, biases[4 * j + Place().q], [&](int m, int half) { return from[(2 * m + half) * device::kWarp]; },
        memory.c(j), c, h);
    memory.keep(j, c, h);
  }
}

// Two slots of the projected features, p and p + 1 with p even, put below the first layer.
template <class A, int kSlots, class Weights, class Memory>
L2L_DEVICE void project_two(int p, const typename A::Chunk& features, const Weights& weights, Memory& memory) {
  float acc[1][2][4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int slot = p + e % 2;
    acc[0][0][e] = acc[0][1][e] = slot < kSlots ? weights.bias(4 * slot + Place().q) : 0.0f;
  }
  const typename A::Fragment column[1] = {weights.fragment(p / 2, device::lane())};
  A::multiply(acc, features, column);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    Four projected;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) projected.at[n] = elu(V(acc[0][n / 2][n % 2 * 2 + e])).v;
    if (p + e < kSlots) memory.put_below(p + e, projected);
  }
}

// ---------------------------------------------------------------- between coordinates' owners and slots
// Gradients, parameters and moments go lane by lane: lane = 4 r + q owns coordinate 4 r + q.

// The slot of features of which each lane has those of its own coordinate.
L2L_DEVICE Four feature_slot(const float (&features)[4], int inputs) {
  const Place place;
  Four found = {};
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    if (f >= inputs) break;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const float of_owner = device::shuffle(features[f], 4 * place.r + n);
      if (place.q == f) found.at[n] = of_owner;
    }
  }
  return found;
}

// Sums over the four lanes of equal r; each gets that of its own coordinate.
L2L_DEVICE float sum_for_owner(const Four& partial) {
  const int q = Place().q;
  const bool upper = q & 2, odd = q & 1;
  float pair[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float kept = upper ? partial.at[2 + n] : partial.at[n], sent = upper ? partial.at[n] : partial.at[2 + n];
    pair[n] = kept + device::shuffle_xor(sent, 2);
  }
  return (odd ? pair[1] : pair[0]) + device::shuffle_xor(odd ? pair[0] : pair[1], 1);
}

// What the linear path adds to y, from the features of the lane's own coordinate. Its few weights are read where they
// lie: once a tile, through the cache, the same for all lanes.
L2L_DEVICE float linear_path(const Cell<float>& cell, const Starts& starts, const float (&features)[4]) {
  float sum = 0;
  if (!cell.net.linear_path) return sum;
  const float* const weights = cell.weights + starts.head + cell.net.hidden + 1;  // after the head's
#pragma unroll
  for (int f = 0; f < 4; ++f)
    if (f < cell.net.inputs()) sum = std::fma(__ldg(weights + f), features[f], sum);
  return sum;
}

// y for the lane's own coordinate, to which the linear path adds `linear`. weights: [hidden], then the bias.
template <int kSlots, class Memory>
L2L_DEVICE float head(const Network& net, const float* weights, const Memory& memory, float linear) {
  Four partial = {};
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const float w = weights[4 * j + Place().q];
    const Four h = memory.below(j);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) partial.at[n] = std::fma(w, h.at[n], partial.at[n]);
  }
  float y = sum_for_owner(partial) + weights[4 * kSlots];
  if (net.linear_path) y += linear;
  return net.tanh_output ? tanh_of(V(y)).v : y;
}

// ---------------------------------------------------------------- the whole network

// The features of one coordinate's gradient; advances its moments. scale: of this step; not read without moments.
L2L_DEVICE void preprocess(
    const Cell<float>& cell, const MomentScale<V>& scale, V grad, Moments<V>& moments, float (&features)[4]) {
  const Network& net = cell.net;
  features[0] = features[1] = features[2] = features[3] = 0;
  if (net.features == Features::identity) features[0] = grad.v;
  if (net.has_moments()) {
    moments = advance(moments, grad, scale);
    const Ratios<V> ratio = ratios(moments, grad, scale);
    features[0] = ratio.momentum.v;
    features[1] = ratio.gradient.v;
  }
  if (net.has_log_sign()) {
    const LogSign<V> pair = log_sign(grad, cell.log_sign);
    if (net.has_moments()) {
      features[2] = pair.log.v;
      features[3] = pair.sign.v;
    } else {
      features[0] = pair.log.v;
      features[1] = pair.sign.v;
    }
  }
}

L2L_DEVICE bool unmoved(const Network& net, const Moments<V>& moments) {
  return net.has_moments() && unmoved(moments.v);
}

// The projection's only chunk: the features' slot, then zeros.
template <class A>
L2L_DEVICE typename A::Chunk features_chunk(const Four& input) {
  Four slots[A::kGroup] = {};
  slots[0] = input;
  return A::chunk(slots, 1);
}

// y of the lane's own coordinate; features, linear: of that coordinate. memory.begin(layer) and memory.end() enclose a
// layer, memory.put_below(i, x) leaves what the first one finds below.
template <class A, int kSlots, class Memory>
L2L_DEVICE float run_network(
    const Network& net, const float4* weights, const float (&features)[4], float linear, Memory& memory) {
  const Four input = feature_slot(features, net.inputs());
  int layer = 0;
  if (net.projection) {
    const auto operand = features_chunk<A>(input);
#pragma unroll
    for (int p = 0; p < kSlots; p += 2)
      project_two<A, kSlots>(p, operand, PackedProjection<A>(weights, kSlots), memory);
    weights += Sizes<A>::projection(kSlots);
  } else {
    memory.put_below(0, input);
    memory.begin(0);
    run_layer<A, kSlots, 1>(weights, memory);
    memory.end();
    weights += Sizes<A>::layer(1, kSlots);
    layer = 1;
  }
#pragma unroll 1
  for (; layer < net.layers; ++layer) {
    memory.begin(layer);
    run_layer<A, kSlots, kSlots>(weights, memory);
    memory.end();
    weights += Sizes<A>::layer(kSlots, kSlots);
  }
  return head<kSlots>(net, reinterpret_cast<const float*>(weights), memory, linear);
}

}  // namespace matrix
}  // namespace l2l
