// The products of a step back, in blocks of 4 x 4 numbers a thread: each 16 bytes that a thread reads serve 16
// multiply-adds. What is read together lies together: four coordinates of a row, and the four gates of a weight.
#pragma once

#include "tile.cuh"

namespace l2l {

// ---------------------------------------------------------------- the weights' order

// The order in which a block keeps the weights and their gradient: a layer is [columns][hidden][kGates], its columns
// the inputs, then the bias (the sum of both), then h; after the layers come the projection, the head and the linear
// path, each as in the flat vector.
struct Packing {
  Network net;

  L2L_HOST_DEVICE int columns(int layer) const { return net.layer_inputs(layer) + 1 + net.hidden; }
  L2L_HOST_DEVICE int layer(int layer) const {
    if (layer == 0) return 0;
    return kGates * net.hidden * (columns(0) + (layer - 1) * (2 * net.hidden + 1));
  }
  L2L_HOST_DEVICE int projection_weight() const { return layer(net.layers); }  // [hidden][inputs]
  L2L_HOST_DEVICE int projection_bias() const { return projection_weight() + net.hidden * net.inputs(); }
  L2L_HOST_DEVICE int head_weight() const {
    return projection_weight() + (net.projection ? net.hidden * (net.inputs() + 1) : 0);
  }
  L2L_HOST_DEVICE int head_bias() const { return head_weight() + net.hidden; }
  L2L_HOST_DEVICE int linear_weight() const { return head_bias() + 1; }
  L2L_HOST_DEVICE int count() const { return linear_weight() + net.linear_inputs(); }

  // A multiple of 16 bytes.
  L2L_HOST_DEVICE int padded() const { return (count() + 3) / 4 * 4; }
  // Of the columns past the last that multiply_transposed reads, and leaves: up to three.
  L2L_HOST_DEVICE int overrun() const { return ((net.hidden + 3) / 4 * 4 - net.hidden) * kGates * net.hidden; }

  // The weight's place in the flat vector, and its twin's: the other bias, otherwise the same.
  struct Flat {
    int64_t first, second;
  };
  L2L_HOST_DEVICE Flat flat(int i) const {
    const WeightLayout at{net};
    if (i >= head_weight()) return same(at.head_weight() + (i - head_weight()));
    if (i >= projection_weight()) return same(at.projection_weight() + (i - projection_weight()));
    int layer_of = 0;
    while (layer_of + 1 < net.layers && i >= layer(layer_of + 1)) ++layer_of;
    const int hidden = net.hidden, inputs = net.layer_inputs(layer_of), rest = (i - layer(layer_of)) / kGates;
    const int column = rest / hidden;
    const int64_t row = i % kGates * hidden + (rest - column * hidden);
    if (column < inputs) return same(at.weight_ih(layer_of) + row * inputs + column);
    if (column > inputs) return same(at.weight_hh(layer_of) + row * hidden + (column - inputs - 1));
    return {at.bias_ih(layer_of) + row, at.bias_hh(layer_of) + row};
  }

 private:
  L2L_HOST_DEVICE static Flat same(int64_t at) { return {at, at}; }
};

template <class T>
L2L_DEVICE void pack(const Network& net, T* packed, const T* weights) {
  const Packing packing{net};
  for (int i = threadIdx.x; i < packing.count(); i += blockDim.x) {
    const Packing::Flat at = packing.flat(i);
    const T weight = __ldg(weights + at.first);
    packed[i] = at.second == at.first ? weight : weight + __ldg(weights + at.second);
  }
}

// ---------------------------------------------------------------- vectors

// n neighbours, read and written at once (16 bytes at a time).
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Several {
  T v[n];
};

template <int n, class T>
L2L_DEVICE Several<T, n> take(const T* from) {
  return *reinterpret_cast<const Several<T, n>*>(from);
}
template <class T, int n>
L2L_DEVICE void put(T* to, const Several<T, n>& values) {
  *reinterpret_cast<Several<T, n>*>(to) = values;
}

constexpr int kQuads = kWidth / 4;  // a row's coordinates by fours: a thread has those of quad lane % kQuads

L2L_DEVICE int quad() { return device::lane() % kQuads; }

// ---------------------------------------------------------------- gates

// A warp forms the gates of two units at once: its lanes are [2 units][2 parts of the sum][kQuads]. After the sum each
// part has two of its quad's coordinates. Of an odd number of units the last one's neighbour is formed too, from what
// lies there, and left.
struct GatePlace {
  int part, unit, coordinate;  // the first of two

  L2L_DEVICE explicit GatePlace(int pair)
      : part(device::lane() / kQuads % 2),
        unit(2 * pair + device::lane() / (2 * kQuads)),
        coordinate(4 * quad() + 2 * part) {}
};

// sum[gate][c] += weights[k][unit][gate] rows[k][c] over the k of this thread's part; w and x at the first row, the
// thread's unit and quad.
template <class T>
L2L_DEVICE void add_gates(T (&sum)[kGates][4], const T* w, int w_row, const T* x, int count, int part) {
  auto add = [&] {
    const Several<T, kGates> of_w = take<kGates>(w);
    const Several<T, 4> of_x = take<4>(x);
#pragma unroll
    for (int g = 0; g < kGates; ++g)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[g][c] = std::fma(of_w.v[g], of_x.v[c], sum[g][c]);
  };
  w += part * w_row;
  x += part * kStride<T>;
#pragma unroll 5
  for (int k = 0; k < count / 2; ++k) {
    add();
    w += 2 * w_row;
    x += 2 * kStride<T>;
  }
  if (count % 2 && part == 0) add();
}

// The unscaled pre-activations of this thread's unit for its two coordinates. Every lane of the warp takes part.
template <class T>
L2L_DEVICE void sum_gates(
    T (&z)[kGates][2], const Network& net, const T* weights, int layer, const GatePlace& at, const T* inputs,
    const T* h) {
  const int count = net.layer_inputs(layer), w_row = kGates * net.hidden;
  const T* w = weights + Packing{net}.layer(layer) + kGates * at.unit;
  const Several<T, kGates> bias = take<kGates>(w + count * w_row);
  T sum[kGates][4] = {};
  if (count == net.hidden)  // known when the kernel is compiled
    add_gates(sum, w, w_row, inputs + 4 * quad(), net.hidden, at.part);
  else
    add_gates(sum, w, w_row, inputs + 4 * quad(), count, at.part);
  add_gates(sum, w + (count + 1) * w_row, w_row, h + 4 * quad(), net.hidden, at.part);
#pragma unroll
  for (int g = 0; g < kGates; ++g)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T mine = at.part ? sum[g][2 + j] : sum[g][j], other = at.part ? sum[g][j] : sum[g][2 + j];
      z[g][j] = mine + device::shuffle_xor(other, kQuads) + bias.v[g];
    }
}

// ---------------------------------------------------------------- transposed products

// to[k] = sum over units and gates of weights[k][unit][gate] d[gate][unit], for four k from `first` on, those below
// `count`, and the coordinates whose bit is set in `live`. A warp's task: its lanes are [4 parts of the units][kQuads],
// and each part has one k after the sum.
template <class T>
L2L_DEVICE void multiply_transposed(
    T* to, const T* weights, const T* d, int hidden, int first, int count, uint32_t live) {
  const int part = device::lane() / kQuads;
  T sum[4][4] = {};  // of k and coordinate
  auto add = [&](int unit) {
    Several<T, kGates> w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = take<kGates>(weights + ((first + j) * hidden + unit) * kGates);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const Several<T, 4> x = take<4>(d + (g * hidden + unit) * kStride<T> + 4 * quad());
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[j][c] = std::fma(w[j].v[g], x.v[c], sum[j][c]);
    }
  };
#pragma unroll 1
  for (int u = 0; u < hidden / 4; ++u) add(4 * u + part);
  if (hidden % 4 && hidden / 4 * 4 + part < hidden) add(hidden / 4 * 4 + part);

  T half[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool high = part & 2;
      half[j][c] = (high ? sum[2 + j][c] : sum[j][c]) +
                   device::shuffle_xor(high ? sum[j][c] : sum[2 + j][c], 2 * kQuads);
    }
  Several<T, 4> whole;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const bool odd = part & 1;
    whole.v[c] = (odd ? half[1][c] : half[0][c]) + device::shuffle_xor(odd ? half[0][c] : half[1][c], kQuads);
  }
  if (first + part >= count) return;
  T* const at = to + (first + part) * kStride<T> + 4 * quad();
  if (live != 0xffffffffu) {
    const Several<T, 4> old = take<4>(at);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (!(live >> (4 * quad() + c) & 1)) whole.v[c] = old.v[c];
  }
  put(at, whole);
}

// ---------------------------------------------------------------- sums over the tile

// sums[k][unit][gate] += sum over the tile's coordinates of d[gate][unit] x[k], for one unit and the first `count` of
// four k; sums and d begin at the unit, sums and x at the first k. One thread's task. Rows of x past `count` are read
// and left: others always follow.
template <class T>
L2L_DEVICE void add_outer(T* sums, const T* d, int hidden, const T* x, int count) {
  T sum[4][kGates] = {};
#pragma unroll 1
  for (int q = 0; q < kQuads; ++q) {
    Several<T, 4> of_d[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) of_d[g] = take<4>(d + g * hidden * kStride<T> + 4 * q);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Several<T, 4> of_x = take<4>(x + j * kStride<T> + 4 * q);
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int g = 0; g < kGates; ++g) sum[j][g] = std::fma(of_d[g].v[c], of_x.v[c], sum[j][g]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < count) {
      T* const at = sums + j * hidden * kGates;
      Several<T, kGates> now = take<kGates>(at);
#pragma unroll
      for (int g = 0; g < kGates; ++g) now.v[g] += sum[j][g];
      put(at, now);
    }
}

// The sum over the tile's coordinates of a row, or of the products of two.
template <class T>
L2L_DEVICE T sum_row(const T* a) {
  Several<T, 4> sum = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const Several<T, 4> of_a = take<4>(a + 4 * q);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum.v[c] += of_a.v[c];
  }
  return (sum.v[0] + sum.v[1]) + (sum.v[2] + sum.v[3]);
}

template <class T>
L2L_DEVICE T sum_products(const T* a, const T* b) {
  Several<T, 4> sum = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const Several<T, 4> of_a = take<4>(a + 4 * q), of_b = take<4>(b + 4 * q);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum.v[c] = std::fma(of_a.v[c], of_b.v[c], sum.v[c]);
  }
  return (sum.v[0] + sum.v[1]) + (sum.v[2] + sum.v[3]);
}

}  // namespace l2l
