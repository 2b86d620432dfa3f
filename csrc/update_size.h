// How far a tensor moves, from what its coordinates sum up to: normalize.update_sizes_.
#pragma once

#include <cmath>

#include "network.h"

namespace l2l {

// The root mean square r that the updates of a tensor are scaled to: `rms`. With v, of networks with moments, rms is for
// noise, and gradients that agree from step to step have more, at most `most`:
//   r = rms * sqrt((1 + beta1) / (1 - beta1)) * RMS(m / (1 - beta1^step)) / sqrt(v / (1 - b^step)),   b = 0.999
struct UpdateSize {
  double rms, most;

  // Moves v on to b v + (1 - b) mean grad^2. What is not finite leaves v, but for its bias.
  //   mean_square, finite: of the gradient; momentum_square: mean m^2 after the step.
  template <class T>
  L2L_HOST_DEVICE double next(
      T& v, double mean_square, bool finite, double momentum_square, double step, double beta1) const {
    constexpr double kSlow = 0.999, kGrowth = 100;  // normalize.SLOW_BETA, MOST_GROWTH
    constexpr double kSmallest = 0x1p-126;          // reference.SMALLEST
    const double bias_before = 1 - std::pow(kSlow, step - 1), bias = 1 - std::pow(kSlow, step);
    const double before = bias_before > 0 ? double(v) / bias_before : 0;
    if (before > 0 && mean_square > kGrowth * before) mean_square = kGrowth * before;
    v = T(kSlow * double(v) + (1 - kSlow) * (finite ? mean_square : before));
    const double unbiased = double(v) / bias;
    if (unbiased < kSmallest) return finite ? 0 : rms;
    const double noise = std::sqrt((1 - beta1) / (1 + beta1));  // RMS of a momentum of noise, in the noise's
    const double r = rms / noise * std::sqrt(momentum_square / unbiased) / (1 - std::pow(beta1, step));
    return r > most ? most : r;
  }
};

}  // namespace l2l
