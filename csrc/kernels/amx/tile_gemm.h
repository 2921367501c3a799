// The tile GEMM: weights of any type become bfloat16 tiles in the first level cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][32 k] times [32 k][16 rows], accumulated in float32 by TDPBF16PS. A step is 32 k.
// Two panels and two tiles of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/kernel_table.h"
#include "kernels/panel.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kChunkSteps = 8;                            // of weights made into tiles at once: 16 KiB for two panels
constexpr int kChunkK = kChunkSteps * kTileK;             // 256, a whole number of blocks of every type
constexpr size_t kRowBytes = 64;                          // of a tile
using WeightTiles = uint8_t[kChunkSteps][2][kTileBytes];  // [step][panel]: [k / 2][16 rows][2]

// Tile registers: 0 to 3 sums [token tile][panel], 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// first, second: tokens in the two token tiles, 1 to 16 (the second may be 0 and is then not to be used).
inline void configure_tiles(int first, int second) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kRowBytes;
    config.rows[i] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(first);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(second == 0 ? 16 : second);
  _tile_loadconfig(&config);
}

// Sums of up to 2 token tiles x 2 panels over num_steps steps. output: of the first token and row.
template <bool kTwoTokenTiles, bool kTwoPanels>
inline void multiply_tiles(const WeightTiles& weights, const uint8_t* a0, const uint8_t* a1, int num_steps,
                           float* output, size_t stride_bytes, bool accumulate) {
  auto* out = reinterpret_cast<char*>(output);
  auto* below = out + kTileTokens * stride_bytes;
  if (accumulate) {
    _tile_loadd(0, out, stride_bytes);
    if constexpr (kTwoPanels) _tile_loadd(1, out + kRowBytes, stride_bytes);
    if constexpr (kTwoTokenTiles) _tile_loadd(2, below, stride_bytes);
    if constexpr (kTwoTokenTiles && kTwoPanels) _tile_loadd(3, below + kRowBytes, stride_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoTokenTiles) _tile_zero(2);
    if constexpr (kTwoTokenTiles && kTwoPanels) _tile_zero(3);
  }
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(6, weights[s][0], kRowBytes);
    _tile_loadd(4, a0 + s * kTileBytes, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, weights[s][1], kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoTokenTiles) {
      _tile_loadd(5, a1 + s * kTileBytes, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride_bytes);
  if constexpr (kTwoPanels) _tile_stored(1, out + kRowBytes, stride_bytes);
  if constexpr (kTwoTokenTiles) _tile_stored(2, below, stride_bytes);
  if constexpr (kTwoTokenTiles && kTwoPanels) _tile_stored(3, below + kRowBytes, stride_bytes);
}

// Source::make(panel, k, num_k, WeightTiles&, which): num_k <= kChunkK weights of a panel from k on, as tiles.
template <class Source>
inline void tile_gemm(const TileGemmParams& p) {
  alignas(64) WeightTiles weights;
  const size_t stride_bytes = p.output_stride * sizeof(float);
  for (int row = 0; row < p.num_rows; row += 2 * kPanelRows) {
    const bool two_panels = row + kPanelRows < p.num_rows;
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    for (int k = 0; k < p.k; k += kChunkK) {
      const int num_k = p.k - k < kChunkK ? p.k - k : kChunkK;
      Source::make(panel, k, num_k, weights, 0);
      if (two_panels) Source::make(panel + p.panel_bytes, k, num_k, weights, 1);
      const int num_steps = num_k / kTileK;
      const bool accumulate = p.accumulate || k > 0;
      const uint8_t* a = p.activations + static_cast<size_t>(k / kTileK) * kTileBytes;
      int configured = -1;
      for (int token = 0; token < p.num_tokens; token += 2 * kTileTokens, a += 2 * p.activation_tile_stride) {
        const int tokens = p.num_tokens - token < 2 * kTileTokens ? p.num_tokens - token : 2 * kTileTokens;
        const int first = tokens < kTileTokens ? tokens : kTileTokens;
        if (tokens != configured) configure_tiles(first, tokens - first), configured = tokens;
        float* output = p.output + static_cast<size_t>(token) * p.output_stride + row;
        const uint8_t* a1 = a + p.activation_tile_stride;
        if (tokens > kTileTokens && two_panels)
          multiply_tiles<true, true>(weights, a, a1, num_steps, output, stride_bytes, accumulate);
        else if (tokens > kTileTokens)
          multiply_tiles<true, false>(weights, a, a1, num_steps, output, stride_bytes, accumulate);
        else if (two_panels)
          multiply_tiles<false, true>(weights, a, a1, num_steps, output, stride_bytes, accumulate);
        else
          multiply_tiles<false, false>(weights, a, a1, num_steps, output, stride_bytes, accumulate);
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
