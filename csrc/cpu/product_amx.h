// Products of weights and activations in bfloat16, summed in float32 by AMX. Include inside the AMX unit only.
//
// Not vdpbf16ps: where it was measured (a Xeon with AMX), it does half the multiply-adds a second of float32 FMAs.
#pragma once

namespace l2l {
namespace {

struct PairProduct {
  static constexpr bool kPairs = true;

  template <class V, int NV>
  static void gates(
      const Packed<float>& packed, const TileStep<float>& tile, int layer, const float* inputs, int64_t input_stride,
      float* gates) {
    static_assert(V::kLanes == kBlock && NV <= 4, "");
    constexpr int width = NV * V::kLanes;
    const Network& net = packed.net;
    const int rows = kGates * net.hidden, depth = pair_blocks(net, layer), columns = block_pairs(net, layer);

    float* to = tile.pairs;
    auto put = [&](V low, V high) {
      pair(low, high).store(to);
      to += V::kLanes;
    };
    auto put_rows = [&](const float* from, int64_t stride, int count) {
      for (int k = 0; k < count; k += 2)
        for (int at = 0; at < width; at += V::kLanes)
          put(V::load(from + k * stride + at), k + 1 < count ? V::load(from + (k + 1) * stride + at) : V(0));
    };
    for (int v = 0; v < NV; ++v) put(V(1), V(1));
    put_rows(inputs, input_stride, net.layer_inputs(layer));
    put_rows(tile.state + net.h_row(layer) * tile.state_stride, tile.state_stride, net.hidden);
    while (to < tile.pairs + depth * columns * width) put(V(0), V(0));

    configure(rows < kBlock ? rows : kBlock, columns);
    const uint16_t* weights = packed.pairs[layer];
    for (int block = 0; block < blocks(rows); ++block) {
      multiply<NV>(weights, tile.pairs, depth, columns, gates + block_start(block, rows) * width);
      weights += depth * kBlock * kBlock * 2;
    }
    _tile_release();
  }

 private:
  // Each lane's two numbers as bfloat16, the low one first.
  static L2L_INLINE Vec pair(Vec low, Vec high) {
    const __m512i order = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a,
        0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }

  // GCC's AMX intrinsics do not say what memory they touch, so fences stand around them.

  // Registers 0 .. 3: sums, one for each vector of coordinates; 4: weights; 5 .. 7: coordinates.
  static void configure(int rows, int columns) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int k = 0; k < 8; ++k) {
      config.row_bytes[k] = uint16_t(k == 4 ? columns * 4 : 64);
      config.rows[k] = uint8_t(k < 5 ? rows : columns);
    }
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

  // One block of gate rows.
  template <int NV>
  static L2L_INLINE void multiply(const uint16_t* weights, const float* pairs, int depth, int columns, float* gates) {
    constexpr int width = NV * kBlock, row_bytes = width * int(sizeof(float));
    asm volatile("" ::: "memory");
    _tile_zero(0);
    if constexpr (NV > 1) _tile_zero(1);
    if constexpr (NV > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < depth; ++k) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(5, pairs, row_bytes);
      if constexpr (NV > 1) _tile_loadd(6, pairs + kBlock, row_bytes);
      if constexpr (NV > 2) _tile_loadd(7, pairs + 2 * kBlock, row_bytes);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (NV > 2) _tile_loadd(5, pairs + 3 * kBlock, row_bytes);
      if constexpr (NV > 1) _tile_dpbf16ps(1, 4, 6);
      if constexpr (NV > 2) {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 4, 5);
      }
      weights += kBlock * kBlock * 2;
      pairs += columns * width;
    }
    _tile_stored(0, gates, row_bytes);
    if constexpr (NV > 1) _tile_stored(1, gates + kBlock, row_bytes);
    if constexpr (NV > 2) {
      _tile_stored(2, gates + 2 * kBlock, row_bytes);
      _tile_stored(3, gates + 3 * kBlock, row_bytes);
    }
    asm volatile("" ::: "memory");
  }
};

}  // namespace
}  // namespace l2l
