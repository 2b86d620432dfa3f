// One step of the network for a tile of 32 coordinates, by one warp on the matrix units.
//
// A product has the coordinates as rows, the gates as columns. Which coordinate, gate and k stand in which row, column
// and k of a fragment is ours to choose, so that a lane's results are just what it needs next. With lane = 4 r + q:
//   rows     the lane's four rows, r and r + 8 of two fragments, are the coordinates 4 r .. 4 r + 3 of the tile: 16
//            bytes of a state row
//   columns  its two columns of fragments (j, 0) and (j, 1) are the gates i, f and g, o of unit 4 j + q
//   k        q and q + 4 of chunk m are element q of the slots 2 m and 2 m + 1; slot s of h is the units 4 s .. 4 s + 3
// So a lane owns units q, 4 + q, 8 + q, .. of four coordinates: it has all four gates of each and its c, and the h that
// it forms is its part of the left operand of the next product. Activations never leave the lane.
//
// The products keep float32's accuracy. A factor is high + low, high its nearest in tf32, and
//   x w = high(x) high(w) + low(x) w + x low(w)
// to within low * low, 2^-24 of it. The last two are at most 2^-12 of it each, so float16 is enough for their factors,
// and its instruction takes 16 k in the time of 8 in tf32: both sums in one. A factor in float16 is off by 2^-12 of
// itself or 2^-25 (see kBelow); beyond 65,504 it stays there, which leaves such a product tf32's accuracy.
#pragma once

#include "matrix_weights.cuh"
#include "tile.cuh"

namespace l2l {
namespace matrix {

using V = Real<float>;

constexpr int kOwn = 4;  // coordinates of which a lane holds states

struct Place {
  int r = device::lane() / 4, q = device::lane() % 4;
};

// One number for each of the lane's coordinates.
struct Four {
  float at[kOwn];
};

// A chunk of a left operand, two slots, for each of the two row fragments.
struct Chunk {
  uint32_t high[2][4];  // in tf32
  uint32_t both[2][4];  // in float16: the pair of low, then the pair of the whole
};

// below: as fragment has it.
L2L_DEVICE Chunk chunk(const Four& first, const Four& second, int below) {
  const float scale[2] = {scale_of(below > 0), scale_of(below > 1)};
  Chunk made;
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int t = n / 2, row = n % 2;
    const float a = high(first.at[n]), b = high(second.at[n]);
    made.high[t][row] = device::float_bits(a);
    made.high[t][row + 2] = device::float_bits(b);
    made.both[t][row] = device::floats_float16(first.at[n] - a, second.at[n] - b);
    made.both[t][row + 2] = device::floats_float16(scale[0] * first.at[n], scale[1] * second.at[n]);
  }
  return made;
}

// acc[column fragment][row fragment] += a chunk of the operand times fragments of weights, the small products first.
template <int kColumns>
L2L_DEVICE void multiply(float (&acc)[kColumns][2][4], const Chunk& left, const float4 (&weights)[kColumns]) {
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const uint32_t both[2] = {device::float_bits(weights[column].z), device::float_bits(weights[column].w)};
#pragma unroll
    for (int t = 0; t < 2; ++t) device::multiply_float16(acc[column][t], left.both[t], both);
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const uint32_t high[2] = {device::float_bits(weights[column].x), device::float_bits(weights[column].y)};
#pragma unroll
    for (int t = 0; t < 2; ++t) device::multiply_tf32(acc[column][t], left.high[t], high);
  }
}

// What a layer multiplies: the slots from below, its own h and, if that makes them even, zeros.
template <int kInputs, int kSlots>
struct Operand {
  static constexpr int kChunks = chunks(kInputs, kSlots);
  Chunk parts[kChunks];

  template <class Below, class H>
  L2L_DEVICE Operand(const Below& below, const H& h) {
    Four slots[2 * kChunks] = {};
#pragma unroll
    for (int i = 0; i < kInputs; ++i) slots[i] = below(i);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) slots[kInputs + j] = h(j);
#pragma unroll
    for (int m = 0; m < kChunks; ++m) parts[m] = chunk(slots[2 * m], slots[2 * m + 1], kInputs - 2 * m);
  }
};

// The gates of one slot's units and what follows from them. fragments(m, half): of chunk m and gates i, f or g, o.
template <int kChunks, class Fragments>
L2L_DEVICE void run_slot(
    const Chunk (&operand)[kChunks], const float4& bias, const Fragments& fragments, const Four& c_old, Four& c,
    Four& h) {
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
    const float4 pair[2] = {fragments(m, 0), fragments(m, 1)};
    multiply(acc, operand[m], pair);
  }
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const float* const if_ = acc[0][n / 2] + n % 2 * 2;
    const float* const go = acc[1][n / 2] + n % 2 * 2;
    const V c_new = lstm_c(V(if_[0]), V(if_[1]), V(go[0]), V(c_old.at[n]));
    c.at[n] = c_new.v;
    h.at[n] = lstm_h(V(go[1]), c_new).v;
  }
}

// One layer with the weights that Packer left, where memory is
//   below(i)       slot i of what comes from below: features, projected features, the new h of the layer before
//   h(j), c(j)     slot j of the old state; h_read() follows the last h
//   keep(j, c, h)  takes the new ones, h for the next layer's below too: the last below and h were read before
// There is no branch in it, so that the products of one slot and the activations of another overlap.
template <int kSlots, int kInputs, class Memory>
L2L_DEVICE void run_layer(const float4* weights, Memory& memory) {
  constexpr int kChunks = chunks(kInputs, kSlots);
  const Operand<kInputs, kSlots> operand([&](int i) { return memory.below(i); }, [&](int j) { return memory.h(j); });
  memory.h_read();

  const float4* const biases = weights + layer_fragments(kInputs, kSlots);
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const float4* const from = weights + j * kChunks * 2 * device::kWarp + device::lane();
    Four c, h;
    run_slot(
        operand.parts, biases[4 * j + Place().q], [&](int m, int half) { return from[(2 * m + half) * device::kWarp]; },
        memory.c(j), c, h);
    memory.keep(j, c, h);
  }
}

// Two slots of the projected features, p and p + 1 with p even, put below the first layer.
template <int kSlots, class Weights, class Memory>
L2L_DEVICE void project_two(int p, const Chunk& features, const Weights& weights, Memory& memory) {
  float acc[1][2][4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int slot = p + e % 2;
    acc[0][0][e] = acc[0][1][e] = slot < kSlots ? weights.bias(4 * slot + Place().q) : 0.0f;
  }
  const float4 column[1] = {weights.fragment(p / 2, device::lane())};
  multiply(acc, features, column);
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

// y, the head's output, for the lane's own coordinate. weights: [hidden], then the bias.
template <int kSlots, class Memory>
L2L_DEVICE float head(const Network& net, const float* weights, const Memory& memory) {
  Four partial = {};
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const float w = weights[4 * j + Place().q];
    const Four h = memory.below(j);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) partial.at[n] = std::fma(w, h.at[n], partial.at[n]);
  }
  const float y = sum_for_owner(partial) + weights[4 * kSlots];
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

// y of the lane's own coordinate; features: of that coordinate. memory.begin(layer) and memory.end() enclose a layer,
// memory.put_below(i, x) leaves what the first one finds below.
template <int kSlots, class Memory>
L2L_DEVICE float run_network(const Network& net, const float4* weights, const float (&features)[4], Memory& memory) {
  const Four input = feature_slot(features, net.inputs());
  int layer = 0;
  if (net.projection) {
    const Chunk operand = chunk(input, Four{}, 1);
#pragma unroll
    for (int p = 0; p < kSlots; p += 2) project_two<kSlots>(p, operand, PackedProjection(weights, kSlots), memory);
    weights += projection_size(kSlots);
  } else {
    memory.put_below(0, input);
    memory.begin(0);
    run_layer<kSlots, 1>(weights, memory);
    memory.end();
    weights += layer_size(1, kSlots);
    layer = 1;
  }
#pragma unroll 1
  for (; layer < net.layers; ++layer) {
    memory.begin(layer);
    run_layer<kSlots, kSlots>(weights, memory);
    memory.end();
    weights += layer_size(kSlots, kSlots);
  }
  return head<kSlots>(net, reinterpret_cast<const float*>(weights), memory);
}

}  // namespace matrix
}  // namespace l2l
