// Products of weights and activations in bfloat16, summed in float32 by AMX. Include inside the AMX unit only.
#pragma once

#include "cell.h"
#include "product_pairs.h"

namespace l2l {
namespace {

struct BlockProduct {
  template <class V>
  using Gate = Coarse;
  static constexpr WeightOrder kOrder = WeightOrder::blocks;

  // Pre-activations of a layer's gates, scaled: row gate * hidden + unit.
  template <class V, int NV>
  static void gates(
      const Packed<float>& packed, const TileStep<float>& tile, int layer, const float* inputs, int64_t input_stride) {
    static_assert(V::kLanes == kBlock && NV <= 4, "");
    constexpr int width = NV * V::kLanes;
    const Network& net = packed.net;
    const int rows = kGates * net.hidden, depth = pair_blocks(net, layer), columns = block_pairs(net, layer);

    // The first pair of columns is two ones, for the biases.
    float* to = tile.columns;
    for (int v = 0; v < NV; ++v, to += V::kLanes) PairProduct::pair(V(1), V(1)).store(to);
    to = PairProduct::gather<V, NV>(inputs, input_stride, net.layer_inputs(layer), to);
    to = PairProduct::gather<V, NV>(
        tile.state + net.h_row(layer) * tile.state_stride, tile.state_stride, net.hidden, to);
    for (; to < tile.columns + depth * columns * width; to += V::kLanes) V(0).store(to);

    configure(rows < kBlock ? rows : kBlock, columns);
    const uint32_t* weights = packed.pairs[layer];
    for (int block = 0; block < blocks(rows); ++block) {
      multiply<NV>(weights, tile.columns, depth, columns, tile.activations + block_start(block, rows) * width);
      weights += depth * kBlock * kBlock;
    }
    _tile_release();
  }

 private:
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
  static L2L_INLINE void multiply(const uint32_t* weights, const float* pairs, int depth, int columns, float* gates) {
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
      weights += kBlock * kBlock;
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
