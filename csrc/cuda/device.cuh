// The device's own instruments, each under one name: launches, shuffles, matrix units, asynchronous copies, the
// special-function unit. Kernels use these and standard C++ alone, so that tests/cuda/emulator.h, which has the same
// names, can run every kernel on a machine without a GPU.
#pragma once

#ifdef L2L_CUDA_EMULATOR
#include L2L_CUDA_EMULATOR
#else

#include <cuda_runtime.h>

#include <cstdint>

#define L2L_DEVICE __device__ __forceinline__

namespace l2l {
namespace device {

constexpr int kWarp = 32;

// ---------------------------------------------------------------- threads of a warp

L2L_DEVICE int lane() { return threadIdx.x & (kWarp - 1); }

// All 32 lanes take part.
template <class T>
L2L_DEVICE T shuffle(T value, int from_lane) {
  return __shfl_sync(0xffffffffu, value, from_lane);
}

template <class T>
L2L_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Bit l: the value of lane l.
L2L_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

L2L_DEVICE int count_ones(uint32_t bits) { return __popc(bits); }

// ---------------------------------------------------------------- matrix units

// d += a b, for a [16, 8] and b [8, 8] in tf32 (float32 whose last 13 bits are not read), d [16, 8] in float32.
// With r = lane / 4 and q = lane % 4 a lane holds
//   a[0..3] = a(r, q), a(r + 8, q), a(r, q + 4), a(r + 8, q + 4)
//   b[0..1] = b(q, r), b(q + 4, r)
//   d[0..3] = d(r, 2q), d(r, 2q + 1), d(r + 8, 2q), d(r + 8, 2q + 1)
L2L_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a [16, 16] and b [16, 8] in float16, two to a register, the first in the lower half:
//   a[0..3] = a(r, 2q..), a(r + 8, 2q..), a(r, 2q + 8..), a(r + 8, 2q + 8..)
//   b[0..1] = b(2q.., r), b(2q + 8.., r)
L2L_DEVICE void multiply_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---------------------------------------------------------------- asynchronous copies

// 16 bytes from device to shared memory, both aligned to 16: the first `bytes` of them, then zeros. Read after
// copies_landed, and not between. The whole line of 128 bytes comes as far as the second-level cache: a neighbour asks
// for the rest of it.
L2L_DEVICE void copy_16(void* shared, const void* global, int bytes = 16) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// The same with 8 bytes.
L2L_DEVICE void copy_8(void* shared, const void* global, int bytes = 8) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Ends a group of this thread's copies.
L2L_DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest `pending` groups of this thread have landed.
template <int pending>
L2L_DEVICE void copies_landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---------------------------------------------------------------- special functions

// Each one instruction; denormal inputs and results become zero. Errors as the PTX manual states them.
L2L_DEVICE float fast_exp2(float x) {  // 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

L2L_DEVICE float fast_reciprocal(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

L2L_DEVICE float fast_tanh(float x) {  // 2^-11 of its value
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN where either is.
L2L_DEVICE float min_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Two of bfloat16, rounded to nearest; low in the lower half.
L2L_DEVICE uint32_t floats_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// The same of float16; what is too large becomes the largest there is, 65,504.
L2L_DEVICE uint32_t floats_float16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

L2L_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
L2L_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }

// ---------------------------------------------------------------- launches

// The block's dynamic shared memory, aligned to a line of 128 bytes.
L2L_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char l2l_shared[];
  return l2l_shared;
}

// Bytes of shared memory that a block may be given on the current device.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 48 * 1024;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Runs kernel(arguments...) on the stream. A kernel that needs more than 48 KB of shared memory is allowed it first.
template <class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace device
}  // namespace l2l

#endif
