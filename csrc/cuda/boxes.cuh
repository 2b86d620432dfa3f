// Hopper's copy engine: a box of 32 coordinates by some rows of state, between device and shared memory, in one
// instruction of one thread. Names as in device.cuh; GPUs before it use none of them (device::has_boxes).
#pragma once

#include "device.cuh"

#ifndef L2L_CUDA_EMULATOR

#include <cuda.h>

namespace l2l {
namespace device {

// ---------------------------------------------------------------- host

using BoxMap = CUtensorMap;  // where a tensor's rows lie; kernels take it as a part of a __grid_constant__

// Whether the device has them and the kernel was compiled for them: one that the driver makes of PTX for an earlier GPU
// was not, and would do nothing.
template <class... Parameters>
bool has_boxes(void (*kernel)(Parameters...)) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaFuncAttributes compiled = {};
  return major >= 9 && cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90;
}

// Of `rows` rows of `count` elements of 4 or 2 bytes, `pitch` bytes apart; boxes are of 32 elements by box_rows. The
// start and the pitch are multiples of 16 bytes. False where the driver refuses.
inline bool map_boxes(
    BoxMap& map, void* data, int element_bytes, int64_t count, int64_t rows, int64_t pitch, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return false;
  const cuuint64_t sizes[2] = {cuuint64_t(count), cuuint64_t(rows)}, pitches[1] = {cuuint64_t(pitch)};
  const cuuint32_t box[2] = {kWarp, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto type = element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // 32 elements of 2 bytes are half a line: the other half, of the next tile, comes to the second-level cache with it.
  const auto ahead = element_bytes == 4 ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  return encode(
             &map, type, 2, data, sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_NONE, ahead, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---------------------------------------------------------------- device
// Empty before Hopper: the host asks has_boxes first.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define L2L_BOXES 1
#else
#define L2L_BOXES 0
#endif
constexpr bool kBoxes = L2L_BOXES;

using Arrival = uint64_t;  // in shared memory: counts the bytes of a box that have come

L2L_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread, before a barrier of the block.
L2L_DEVICE void arrival_begin(Arrival* arrival) {
#if L2L_BOXES
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Waits for the box that was sent for as the first, third, .. (parity 0) or as the second, fourth, .. (1).
L2L_DEVICE void arrival_wait(Arrival* arrival, uint32_t parity) {
#if L2L_BOXES
  asm volatile(
      "{ .reg .pred there;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
      "@!there bra again; }" ::"r"(shared_address(arrival)), "r"(parity)
      : "memory");
#endif
}

// Sends for a box of `bytes`, whole: what lies outside of the tensor comes as zeros. shared: aligned to 128 bytes.
L2L_DEVICE void box_load(void* shared, const BoxMap& map, int64_t column, int row, int bytes, Arrival* arrival) {
#if L2L_BOXES
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(int(column)), "r"(row), "r"(shared_address(arrival))
      : "memory");
#endif
}

// What this thread has written to shared memory is there for the copy engine; before the barrier ahead of box_store.
L2L_DEVICE void boxes_written() {
#if L2L_BOXES
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Stores a box, but for what lies outside of the tensor.
L2L_DEVICE void box_store(const BoxMap& map, int64_t column, int row, const void* shared) {
#if L2L_BOXES
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(int(column)), "r"(row), "r"(shared_address(shared))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until shared memory has been read by this thread's stores.
L2L_DEVICE void box_stores_read() {
#if L2L_BOXES
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}  // namespace device
}  // namespace l2l

#endif
