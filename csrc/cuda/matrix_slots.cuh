// The hidden sizes that the matrix units take: whole slots of four units, as many as there are instances for. The one
// list of them; 4, 8, 12, 16, 20 and 32.
#pragma once

#include <type_traits>

#include "../network.h"
#include "device.cuh"

namespace l2l {
namespace matrix {
namespace {

// Threads of a team of warps, one warp for each slot.
L2L_HOST_DEVICE constexpr int team(int slots) { return slots * device::kWarp; }

// Calls f with the slots of the hidden size as a constant; false where it is not among the supported.
template <class F>
bool with_slots(int hidden, F f) {
  auto with = [&](auto slots) {
    if (hidden != 4 * slots()) return false;
    f(slots);
    return true;
  };
  using std::integral_constant;
  return with(integral_constant<int, 1>()) || with(integral_constant<int, 2>()) || with(integral_constant<int, 3>()) ||
         with(integral_constant<int, 4>()) || with(integral_constant<int, 5>()) || with(integral_constant<int, 8>());
}

}  // namespace
}  // namespace matrix
}  // namespace l2l
