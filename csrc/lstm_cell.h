// The mathematics of one step for one coordinate, or for one vector of them: preprocessing, gates, head, derivatives.
//
// Everything is a template over V, a scalar or a vector of coordinates, and over functions found by V's namespace:
// fma, min, abs, sqrt, select, less, exp2, log. The CPU kernels give vectors, the CUDA kernels scalars. The twin is
// cell and cell_backward in l2l_fast/reference.py.
#pragma once

#include "network.h"

namespace l2l {

constexpr double kLog2E = 1.4426950408889634;

// The order of gates in the rows of every weight matrix: torch.nn.LSTM's. A unit's row of a gate is
// gate * hidden + unit.
enum Gate { kInput, kForget, kCell, kOutput, kGates };

// Gates are needed only as e^-z (sigmoid) and e^-2z (tanh), so the weights are multiplied by this beforehand and the
// kernels take exp2 of what comes out.
L2L_HOST_DEVICE constexpr double gate_scale(int gate) { return gate == kCell ? -2 * kLog2E : -kLog2E; }

// ---------------------------------------------------------------- preprocessing

template <class V>
struct LogSign {
  V log, sign;
};

// p, and what is computed from it once: threshold = exp(-p), steep = exp(p).
template <class V>
struct LogSignScale {
  V inverse_p, threshold, steep;
};

template <class V>
L2L_HOST_DEVICE LogSign<V> log_sign(V grad, const LogSignScale<V>& scale) {
  V magnitude = abs(grad);
  auto small = less(magnitude, scale.threshold);
  V sign = select(less(grad, V(0)), V(-1), V(1));
  return {select(small, V(-1), log(magnitude) * scale.inverse_p), select(small, scale.steep * grad, sign)};
}

template <class V>
L2L_HOST_DEVICE V log_sign_backward(V d_log, V d_sign, V grad, const LogSignScale<V>& scale) {
  auto small = less(abs(grad), scale.threshold);
  return select(small, scale.steep * d_sign, d_log * scale.inverse_p / select(small, V(1), grad));
}

// beta1, beta2, eps of the running moments, and the bias corrections of one step: 1 / (1 - beta^step).
template <class V>
struct MomentScale {
  V beta1, beta2, rest1, rest2, eps, correction1, correction2;  // rest = 1 - beta
};

template <class V>
struct Moments {
  V m, v;
};

template <class V>
L2L_HOST_DEVICE Moments<V> advance(Moments<V> old, V grad, const MomentScale<V>& scale) {
  return {fma(scale.beta1, old.m, scale.rest1 * grad), fma(scale.beta2, old.v, scale.rest2 * grad * grad)};
}

// From v: whether no nonzero gradient has come yet. Then y is 0, and the parameter stays where it is, as with any rule
// designed by hand; its state goes on. The bound is float32's smallest normal number: v falls below it again some
// 1,700 steps after the last gradient.
template <class V>
L2L_HOST_DEVICE decltype(less(V(), V())) unmoved(V v) {
  return less(v, V(0x1p-126));
}

template <class V>
struct Ratios {
  V momentum, gradient;
};

template <class V>
L2L_HOST_DEVICE Ratios<V> ratios(Moments<V> moments, V grad, const MomentScale<V>& scale) {
  V inverse = V(1) / (sqrt(moments.v * scale.correction2) + scale.eps);
  return {moments.m * scale.correction1 * inverse, grad * inverse};
}

// d: gradient of the new moments on entry, of the old ones on return. Returns the gradient of grad.
template <class V>
L2L_HOST_DEVICE V
moments_backward(Ratios<V> d_ratios, Moments<V>& d, Moments<V> moments, V grad, const MomentScale<V>& scale) {
  V root = sqrt(moments.v * scale.correction2);
  V inverse = V(1) / (root + scale.eps);
  V d_m = fma(d_ratios.momentum * inverse, scale.correction1, d.m);
  V d_root = (d_ratios.momentum * moments.m * scale.correction1 + d_ratios.gradient * grad) * inverse * inverse;
  // v = 0 only where every gradient so far was 0: both ratios are 0 there, and so is their derivative in v.
  auto some = less(V(0), root);
  V d_v = d.v - select(some, V(0.5) * d_root / select(some, root, V(1)), V(0)) * scale.correction2;
  d = {scale.beta1 * d_m, scale.beta2 * d_v};
  return d_ratios.gradient * inverse + scale.rest1 * d_m + V(2) * scale.rest2 * d_v * grad;
}

// ---------------------------------------------------------------- projection

template <class V>
L2L_HOST_DEVICE V elu(V x) {
  return select(less(V(0), x), x, exp2(min(V(0), x * V(kLog2E))) - V(1));
}

// Derivative of elu, from its value.
template <class V>
L2L_HOST_DEVICE V elu_slope(V y) {
  return select(less(V(0), y), V(1), y + V(1));
}

// ---------------------------------------------------------------- cell

// The product of three (1 + 2^kGateLimit) is finite in float32, and sigmoid is below 1e-12 there.
constexpr double kGateLimit = 42;

// exp2 of a scaled pre-activation; NaN passes.
template <class V>
L2L_HOST_DEVICE V gate_exp(V scaled) {
  return exp2(V(min(V(kGateLimit), scaled)));
}

// a (1 + e) and a (1 - e): one operation where a vector type says so.
template <class V>
L2L_HOST_DEVICE V times_one_plus(V a, V e) {
  return a * (V(1) + e);
}
template <class V>
L2L_HOST_DEVICE V times_one_minus(V a, V e) {
  return a * (V(1) - e);
}

// With E = e^-z (e^-2z for g), sigmoid = 1/(1+E) and tanh = (1-E)/(1+E), so that each half of a unit costs one division.
// The halves are functions of their own because each is a long chain: callers run many of the first, then of the second.

// What lstm_unit_backward needs.
template <class V>
struct Activations {
  V i, f, g, o, tanh_c;
};

// c' = f c + i g, from scaled pre-activations.
template <class V>
L2L_HOST_DEVICE V lstm_c(V i, V f, V g, V c) {
  V one(1);
  V a = one + gate_exp(i), b = one + gate_exp(f), e_g = gate_exp(g);
  V ag = times_one_plus(a, e_g);
  return fma(c, ag, times_one_minus(b, e_g)) / (ag * b);
}

// The same, leaving i, f and g.
template <class V>
L2L_HOST_DEVICE V lstm_c(V i, V f, V g, V c, Activations<V>& saved) {
  V one(1);
  V a = one + gate_exp(i), b = one + gate_exp(f), e_g = gate_exp(g);
  V ag = times_one_plus(a, e_g);
  V inverse = one / (ag * b);
  V inverse_b = inverse * b;
  saved.f = inverse * ag;
  saved.i = times_one_plus(inverse_b, e_g);
  saved.g = times_one_minus(V(inverse_b * a), e_g);
  return fma(saved.f, c, saved.i * saved.g);
}

// h' = o tanh(c').
template <class V>
L2L_HOST_DEVICE V lstm_h(V o, V c_new) {
  V one(1), e_c = gate_exp(c_new * V(gate_scale(kCell)));
  return (one - e_c) / times_one_plus(V(one + gate_exp(o)), e_c);
}

// The same, leaving o and tanh c'.
template <class V>
L2L_HOST_DEVICE V lstm_h(V o, V c_new, Activations<V>& saved) {
  V one(1), e_c = gate_exp(c_new * V(gate_scale(kCell)));
  V d = one + gate_exp(o);
  V inverse = one / times_one_plus(d, e_c);
  saved.o = times_one_plus(inverse, e_c);
  saved.tanh_c = times_one_minus(V(inverse * d), e_c);
  return saved.o * saved.tanh_c;
}

template <class V>
struct UnitGradient {
  V gates[kGates];
  V c;
};

// Gradients of the four (unscaled) pre-activations and of the old c.
template <class V>
L2L_HOST_DEVICE UnitGradient<V> lstm_unit_backward(V d_h, V d_c_new, V c, const Activations<V>& s) {
  V one(1), d_out = d_h * s.o;
  V d_c = fma(d_out, one - s.tanh_c * s.tanh_c, d_c_new);
  UnitGradient<V> d;
  V d_i = d_c * s.i, d_f = d_c * s.f;
  d.gates[kInput] = d_i * s.g * (one - s.i);
  d.gates[kForget] = d_f * c * (one - s.f);
  d.gates[kCell] = d_i * (one - s.g * s.g);
  d.gates[kOutput] = d_out * s.tanh_c * (one - s.o);
  d.c = d_f;
  return d;
}

// ---------------------------------------------------------------- head

template <class V>
L2L_HOST_DEVICE V tanh_of(V x) {
  V e = gate_exp(x * V(gate_scale(kCell)));
  return (V(1) - e) / (V(1) + e);
}

}  // namespace l2l
