// The weights in the order in which the CPU kernels read them, with what else a network needs computed once.
//
// A product of a matrix and a tile goes by groups of four rows of the matrix: one scalar of each row after the other,
// column by column, so that every load of a tile row meets four weights. The last group is padded with zeros.
#pragma once

#include "../network.h"

namespace l2l {

constexpr int kGroup = 4;

L2L_HOST_DEVICE constexpr int groups(int rows) { return (rows + kGroup - 1) / kGroup; }

// How the step's product takes the gates' weights: as they are, in groups; as pairs of neighbouring columns in bfloat16,
// in groups; or such pairs in blocks for AMX.
enum class WeightOrder { scalars, pairs, blocks };

// Inputs and hidden units are each padded to whole pairs with zero weights.
L2L_HOST_DEVICE constexpr int pairs(int columns) { return (columns + 1) / 2; }

// A block is 16 rows of the matrix times up to 16 pairs of columns, one register of AMX. The first pair of columns is
// the bias in two halves, against ones. The pairs are shared out evenly among the blocks, so that little is padded.
constexpr int kBlock = 16;

L2L_HOST_DEVICE constexpr int blocks(int rows) { return (rows + kBlock - 1) / kBlock; }

L2L_HOST_DEVICE int all_pairs(const Network& net, int layer) {
  return 1 + pairs(net.layer_inputs(layer)) + pairs(net.hidden);
}
L2L_HOST_DEVICE int pair_blocks(const Network& net, int layer) { return blocks(all_pairs(net, layer)); }
L2L_HOST_DEVICE int block_pairs(const Network& net, int layer) {
  const int count = pair_blocks(net, layer);
  return (all_pairs(net, layer) + count - 1) / count;
}

// Rows that a tile of any layer's columns takes, in any order.
L2L_HOST_DEVICE int column_rows(const Network& net) {
  const int inputs = net.hidden > net.inputs() ? net.hidden : net.inputs();
  const int scalars = inputs + net.hidden, in_blocks = kBlock * blocks(1 + 2 * pairs(inputs));
  return scalars > in_blocks ? scalars : in_blocks;
}

// The first gate row of a block. The last block begins early enough to be whole, unless there are too few rows at all.
L2L_HOST_DEVICE constexpr int block_start(int block, int rows) {
  int last = rows > kBlock ? rows - kBlock : 0;
  return block * kBlock < last ? block * kBlock : last;
}

// Bias corrections of the moments at one step: 1 / (1 - beta^step).
template <class T>
struct Corrections {
  T first, second;
};

template <class T>
struct Packed {
  Network net;
  T inverse_p, threshold, steep;  // of the log_sign features: 1/p, exp(-p), exp(p)
  T head_bias;

  // Forward. A group begins with its four biases.
  const T* projection;    // [groups(hidden)][1 + inputs][4]
  const T* const* gates;  // a layer: [hidden][1 + layer_inputs + hidden][4], a unit's gates scaled by gate_scale
  const T* head;          // [hidden]
  const T* linear;        // [inputs] (with a linear path)
  // The gates in bfloat16, null unless asked for; the lower half of a word is the column that comes first. A layer:
  //   in pairs:  [hidden][1 + pairs(layer_inputs) + pairs(hidden)][4], the first of them biases in float32;
  //   in blocks: [blocks(4 * hidden)][pair_blocks][16 rows][16 pairs].
  const uint32_t* const* pairs;

  // Backward: transposed, without biases or scale.
  const T* projection_t;     // [groups(inputs)][hidden][4]
  const T* const* inputs_t;  // a layer: [groups(layer_inputs)][4 * hidden][4]
  const T* const* hidden_t;  // a layer: [groups(hidden)][4 * hidden][4]
};

}  // namespace l2l
