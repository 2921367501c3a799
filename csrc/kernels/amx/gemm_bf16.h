// The tile GEMM of float types: weights become bfloat16 tiles in the first level cache, used by all tokens of the
// expert.
//
// tokens x weight rows = [16 tokens][32 k] times [32 k][16 rows], accumulated in float32 by TDPBF16PS. A step is 32 k.
// Two panels and two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/amx/tiles.h"
#include "kernels/panel/gemm_float.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kStepK = 32;
constexpr int kSteps = 8;                            // of weights made into tiles at once: 16 KiB, two panels
using WeightTiles = uint8_t[kSteps][2][kTileBytes];  // [step][panel]: [k / 2][16 rows][2]

// Sums of up to 2 token tiles x 2 panels over num_steps steps. output: of the first token and row.
template <bool kTwoTokenTiles, bool kTwoPanels>
inline void multiply_tiles(const WeightTiles& weights, const uint8_t* a0, const uint8_t* a1, int num_steps,
                           float* output, size_t stride_bytes, bool accumulate) {
  auto* out = reinterpret_cast<char*>(output);
  auto* below = out + kTileTokens * stride_bytes;
  if (accumulate) {
    _tile_loadd(0, out, stride_bytes);
    if constexpr (kTwoPanels) _tile_loadd(1, out + kTileRowBytes, stride_bytes);
    if constexpr (kTwoTokenTiles) _tile_loadd(2, below, stride_bytes);
    if constexpr (kTwoTokenTiles && kTwoPanels) _tile_loadd(3, below + kTileRowBytes, stride_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoTokenTiles) _tile_zero(2);
    if constexpr (kTwoTokenTiles && kTwoPanels) _tile_zero(3);
  }
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(6, weights[s][0], kTileRowBytes);
    _tile_loadd(4, a0 + s * kTileBytes, kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, weights[s][1], kTileRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoTokenTiles) {
      _tile_loadd(5, a1 + s * kTileBytes, kTileRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride_bytes);
  if constexpr (kTwoPanels) _tile_stored(1, out + kTileRowBytes, stride_bytes);
  if constexpr (kTwoTokenTiles) _tile_stored(2, below, stride_bytes);
  if constexpr (kTwoTokenTiles && kTwoPanels) _tile_stored(3, below + kTileRowBytes, stride_bytes);
}

// Two vectors of float32 to 16 pairs of bfloat16, rounded to nearest even.
inline Ints round_to_pairs(Floats even, Floats odd) {
  const Ints low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
  const Ints high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
  return bit_or(low, shift_left<16>(high));
}

// num_k weights of a panel from k on to tiles[..][which].
template <class Weights>
inline void make_tiles(const uint8_t* panel, int k, int num_k, WeightTiles& tiles, int which) {
  constexpr size_t kStep = size_t{kPanelRows} * Weights::kBytes;
  const uint8_t* rows = panel + static_cast<size_t>(k) * kStep;
  for (int i = 0; i < num_k / 2; ++i, rows += 2 * kStep) {
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(rows) + 4096), _MM_HINT_T0);
    store(tiles[i / 16][which] + i % 16 * kTileRowBytes,
          round_to_pairs(Weights::load_rows(rows), Weights::load_rows(rows + kStep)));
  }
}

template <class Weights>
inline void tile_gemm_float(const TileGemmParams& p) {
  alignas(64) WeightTiles weights;
  alignas(64) float edge[2 * kTileTokens * 2 * kPanelRows];  // where a tile would reach past the last row
  const size_t stride_bytes = p.output_stride * sizeof(float);
  int configured = 0;
  for (int row = 0; row < p.num_rows; row += 2 * kPanelRows) {
    const int num_rows = p.num_rows - row < 2 * kPanelRows ? p.num_rows - row : 2 * kPanelRows;
    const bool two_panels = num_rows > kPanelRows, whole = num_rows % kPanelRows == 0;
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    for (int k = p.k_begin; k < p.k_end; k += kSteps * kStepK) {
      const int num_k = p.k_end - k < kSteps * kStepK ? p.k_end - k : kSteps * kStepK;
      make_tiles<Weights>(panel, k, num_k, weights, 0);
      if (two_panels) make_tiles<Weights>(panel + p.panel_bytes, k, num_k, weights, 1);
      const int num_steps = num_k / kStepK;
      const bool accumulate = p.accumulate || k > p.k_begin;
      const uint8_t* a = p.activations + static_cast<size_t>(k / kStepK) * kTileBytes;
      for (int token = 0; token < p.num_tokens; token += 2 * kTileTokens, a += 2 * p.group_bytes) {
        const int tokens = p.num_tokens - token < 2 * kTileTokens ? p.num_tokens - token : 2 * kTileTokens;
        const int first = tokens < kTileTokens ? tokens : kTileTokens;
        if (tokens != configured) configure_tiles(first, tokens - first), configured = tokens;
        float* output = p.output + static_cast<size_t>(token) * p.output_stride + row;
        const auto multiply = [&](float* to, size_t to_stride) {
          const uint8_t* a1 = a + p.group_bytes;
          if (tokens > kTileTokens && two_panels)
            multiply_tiles<true, true>(weights, a, a1, num_steps, to, to_stride, accumulate);
          else if (tokens > kTileTokens)
            multiply_tiles<true, false>(weights, a, a1, num_steps, to, to_stride, accumulate);
          else if (two_panels)
            multiply_tiles<false, true>(weights, a, a1, num_steps, to, to_stride, accumulate);
          else
            multiply_tiles<false, false>(weights, a, a1, num_steps, to, to_stride, accumulate);
        };
        if (whole) {
          multiply(output, stride_bytes);
          continue;
        }
        constexpr size_t kEdgeStride = 2 * kPanelRows;
        for (int t = 0; t < tokens && accumulate; ++t)
          std::memcpy(edge + t * kEdgeStride, output + t * p.output_stride, num_rows * sizeof(float));
        multiply(edge, kEdgeStride * sizeof(float));
        for (int t = 0; t < tokens; ++t)
          std::memcpy(output + t * p.output_stride, edge + t * kEdgeStride, num_rows * sizeof(float));
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
