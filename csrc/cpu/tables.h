// What each instruction set exports: kernels on one tile, as plain functions.
#pragma once

#include "../lstm_step.h"
#include "../lstm_unroll.h"
#include "packed.h"

namespace l2l {

template <class T>
struct StepCall {
  const Packed<T>* packed;
  T lr;
  T weight_decay;
  bool maximize;
};

template <class T>
struct UnrollCall {
  const Packed<T>* packed;
  const Corrections<T>* corrections;  // [steps]
  const UnrollArguments* arguments;
  const UnrollGradients* gradients;  // backward only
  // Backward only: the coordinates to run, in rising order; null: all. Where some are left out, no gradients but those of
  // updates and weights are given or asked for.
  const int64_t* chosen;
};

// Each kernel works on coordinates first .. first + count - 1 (of the chosen ones), count <= tile, in uninitialised
// scratch aligned to 64 bytes.
template <class T>
struct StepKernel {
  int tile;  // coordinates in a full tile
  WeightOrder order;
  void (*step)(const StepCall<T>&, const StepTensor&, const Corrections<T>&, int64_t first, int count, T* scratch);
};

template <class T>
struct UnrollKernels {
  int tile;   // coordinates in a full tile
  int lanes;  // coordinates in the narrowest
  void (*unroll)(const UnrollCall<T>&, const Matrix& updates, const Matrix& last, int64_t first, int count, T* scratch);
  // Scratch of unroll_backward, in scalars, for tiles up to `width` wide.
  int64_t (*backward_scratch)(const Network&, int width, int64_t steps);
  // Adds the tile's gradient of the weights to d_weights, in the order of the flat weight vector.
  void (*unroll_backward)(const UnrollCall<T>&, int64_t first, int count, T* scratch, double* d_weights);
};

template <class T>
struct Kernels {
  StepKernel<T> step;
  UnrollKernels<T> unroll;
  int64_t (*multiply_adds)(int64_t rounds);  // on registers alone: the ceiling that benches measure
};

extern const Kernels<float> kPortableFloat;
extern const Kernels<double> kPortableDouble;
#if defined(__x86_64__)
extern const Kernels<float> kAvx2;
extern const Kernels<float> kAvx512;
// Products in bfloat16 are the step's alone: what the unroll ops hand to meta-training stays float32 arithmetic.
extern const StepKernel<float> kAvx512Bf16;
extern const StepKernel<float> kAmxBf16;
#endif

// The scratch of the step and of the forward unroll, for tiles of `width` coordinates; what each part is, TileStep says.
template <class T>
struct ForwardScratch {
  T *grad, *output, *features, *projected, *columns, *activations, *state, *new_state, *end;

  // No more is done with `at` than adding to it.
  L2L_HOST_DEVICE ForwardScratch(T* at, const Network& net, int width) {
    grad = at;
    output = grad + width;
    features = output + width;
    projected = features + 4 * width;
    columns = projected + groups(net.hidden) * kGroup * width;
    activations = columns + column_rows(net) * width;
    state = activations + 5 * net.hidden * width;  // four gates, then tanh c
    new_state = state + net.state_rows() * width;
    end = new_state + net.state_rows() * width;
  }
  // How long it is, in scalars.
  static L2L_HOST_DEVICE int64_t size(const Network& net, int width) {
    T origin;
    return ForwardScratch(&origin, net, width).end - &origin;
  }
};

}  // namespace l2l
