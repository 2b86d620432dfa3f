// The weights in the order in which the CPU kernels read them, with what else a network needs computed once.
//
// A product of a matrix and a tile goes by groups of four rows of the matrix: one scalar of each row after the other,
// column by column, so that every load of a tile row meets four weights. The last group is padded with zeros.
#pragma once

#include "../network.h"

namespace l2l {

constexpr int kGroup = 4;

L2L_HOST_DEVICE constexpr int groups(int rows) { return (rows + kGroup - 1) / kGroup; }

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

  // Backward: transposed, without biases or scale.
  const T* projection_t;     // [groups(inputs)][hidden][4]
  const T* const* inputs_t;  // a layer: [groups(layer_inputs)][4 * hidden][4]
  const T* const* hidden_t;  // a layer: [groups(hidden)][4 * hidden][4]
};

}  // namespace l2l
