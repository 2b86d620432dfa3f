// The machine's ceiling: float32 multiply-adds on registers alone, as many sums at a time as the kernels keep.
#pragma once

#include "packed.h"
#include "vec.h"

namespace l2l {
namespace {

// Returns how many it made.
template <class V>
int64_t multiply_adds(int64_t rounds) {
  constexpr int sums = kGroup * V::kWide;
  V sum[sums], x(1e-3), y(1e-3);
#pragma GCC unroll 16
  for (int k = 0; k < sums; ++k) sum[k] = V(double(k));  // all different, or the compiler makes one of them
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int k = 0; k < sums; ++k) sum[k] = fma(x, y, sum[k]);
  volatile typename V::Scalar kept = 0;  // so that the sums are wanted
  for (int k = 0; k < sums; ++k) {
    alignas(64) typename V::Scalar lanes[V::kLanes];
    sum[k].store(lanes);
    kept = kept + lanes[0];
  }
  return rounds * sums * V::kLanes;
}

}  // namespace
}  // namespace l2l
