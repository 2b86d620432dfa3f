// The table of one vector type.
#pragma once

namespace {

template <class V>
Approximations approximations_of(const char* name) {
  return {
      name,
      V::kLanes,
      [](const float* in, float* out) { l2l::exp2(V::load(in)).store(out); },
      [](const float* in, float* out) { l2l::log(V::load(in)).store(out); },
      [](const float* in, float* out) {
        V e = l2l::gate_exp(V::load(in) * V(l2l::gate_scale(l2l::kInput)));
        (V(1) / (V(1) + e)).store(out);
      },
      [](const float* in, float* out) { l2l::tanh_of(V::load(in)).store(out); },
  };
}

}  // namespace
