// A tensor of the step with as few dimensions as its strides allow.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "lstm_step.h"

namespace l2l {

// Strides of coordinates that lie one after another, in the order of the dimensions.
inline std::vector<int64_t> in_a_row(int dims, const int64_t* sizes) {
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (int d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

// A tensor with its dimensions in the parameter's memory order, neighbours merged where all three tensors allow it, so
// that tensors that share one dense memory order have one dimension.
struct Flat {
  std::vector<int64_t> sizes, param, grad, state;
  StepTensor tensor;

  explicit Flat(const StepTensor& from) : tensor(from) {
    std::vector<int> order(from.dims);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(
        order.begin(), order.end(), [&](int a, int b) { return from.param.strides[a] > from.param.strides[b]; });
    for (int d : order) {
      const int64_t size = from.sizes[d];
      const int64_t strides[] = {from.param.strides[d], from.grad.strides[d], from.state.strides[d]};
      if (size == 1) continue;
      if (!sizes.empty() && param.back() == strides[0] * size && grad.back() == strides[1] * size &&
          state.back() == strides[2] * size) {
        sizes.back() *= size;
        param.back() = strides[0];
        grad.back() = strides[1];
        state.back() = strides[2];
      } else {
        sizes.push_back(size);
        param.push_back(strides[0]);
        grad.push_back(strides[1]);
        state.push_back(strides[2]);
      }
    }
    if (sizes.empty()) sizes = param = grad = state = {1};
    tensor.dims = int(sizes.size());
    tensor.sizes = sizes.data();
    tensor.param.strides = param.data();
    tensor.grad.strides = grad.data();
    tensor.state.strides = state.data();
  }
  Flat(Flat&&) = default;  // a moved vector keeps its memory, so the pointers stay good
  Flat(const Flat& other) : sizes(other.sizes), param(other.param), grad(other.grad), state(other.state) {
    tensor = other.tensor;
    tensor.sizes = sizes.data();
    tensor.param.strides = param.data();
    tensor.grad.strides = grad.data();
    tensor.state.strides = state.data();
  }
};

}  // namespace l2l
