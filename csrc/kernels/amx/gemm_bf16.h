// The tile GEMM: weights of all types become bfloat16 tiles in the first level cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][32 k] times [32 k][16 rows], accumulated in float32 by TDPBF16PS. A step is 32 k.
// Two panels and two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/tiles.h"
#include "kernels/amx/weights_bf16.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kRows = 2 * kPanelRows;  // weight rows computed together
constexpr int kTokensAtOnce = 256;

constexpr int kChunksAhead = 2;  // how far ahead weights are asked for, of 1 to 10 microseconds each

// The weights of a later chunk, asked for a few lines at a time while the tile unit works.
struct Ahead {
  const uint8_t* panels[2] = {nullptr, nullptr};  // nullptr: nothing
  size_t bytes_of_step = 0;                       // of each

  inline void prefetch(int step) const {
    for (const uint8_t* panel : panels)
      for (size_t i = 0; panel != nullptr && i < bytes_of_step; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(panel + step * bytes_of_step + i), _MM_HINT_T1);
  }
};

// Of the chunk at k of the panels from row on.
template <class Maker>
inline Ahead find_ahead(const TileGemmParams& p, int row, int k) {
  k += kChunksAhead * kMaxCodesK;
  if (k >= p.k_end) k -= (p.k_end - p.k_begin + kMaxCodesK - 1) / kMaxCodesK * kMaxCodesK, row += kRows;
  if (k < p.k_begin || row >= p.num_rows) return {};
  const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes +
                         static_cast<size_t>(k / kMaxCodesK) * Maker::kChunkBytes;
  return {{panel, row + kPanelRows < p.num_rows ? panel + p.panel_bytes : nullptr}, Maker::kChunkBytes / kSteps};
}

// Sums of up to 2 groups of tokens x 2 panels over num_steps steps. output: of the first token and row.
template <bool kTwoGroups, bool kTwoPanels>
inline void multiply_tiles(const WeightTiles& weights, const uint8_t* a0, const uint8_t* a1, int num_steps,
                           float* output, size_t stride_bytes, bool accumulate, const Ahead& ahead) {
  auto* out = reinterpret_cast<char*>(output);
  auto* below = out + kTileTokens * stride_bytes;
  if (accumulate) {
    _tile_loadd(0, out, stride_bytes);
    if constexpr (kTwoPanels) _tile_loadd(1, out + kTileRowBytes, stride_bytes);
    if constexpr (kTwoGroups) _tile_loadd(2, below, stride_bytes);
    if constexpr (kTwoGroups && kTwoPanels) _tile_loadd(3, below + kTileRowBytes, stride_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoGroups) _tile_zero(2);
    if constexpr (kTwoGroups && kTwoPanels) _tile_zero(3);
  }
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(6, weights[s][0], kTileRowBytes);
    _tile_loadd(4, a0 + s * kTileBytes, kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, weights[s][1], kTileRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoGroups) {
      _tile_loadd(5, a1 + s * kTileBytes, kTileRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
    ahead.prefetch(s);
  }
  _tile_stored(0, out, stride_bytes);
  if constexpr (kTwoPanels) _tile_stored(1, out + kTileRowBytes, stride_bytes);
  if constexpr (kTwoGroups) _tile_stored(2, below, stride_bytes);
  if constexpr (kTwoGroups && kTwoPanels) _tile_stored(3, below + kTileRowBytes, stride_bytes);
}

// Where the sums of a part of a call are while it is computed: in the output, or beside it where tiles would reach past
// the last row or token of that.
struct SumsBeside {
  alignas(64) float sums[kTokensAtOnce][kRows];
  int first_token, num_tokens;  // of the part
  int num_rows;

  inline void load(const float* output, size_t stride) {
    for (int t = first_token; t < num_tokens; ++t) std::memcpy(sums[t], output + t * stride, num_rows * sizeof(float));
  }
  inline void store(float* output, size_t stride) const {
    for (int t = first_token; t < num_tokens; ++t) std::memcpy(output + t * stride, sums[t], num_rows * sizeof(float));
  }
};

// Up to kTokensAtOnce tokens.
template <class Maker>
inline void tile_gemm_tokens(const TileGemmParams& p, const uint8_t* activations, int num_tokens, float* outputs) {
  constexpr int kPair = 2 * kTileTokens;
  alignas(64) WeightTiles tiles;
  alignas(64) Maker maker;
  SumsBeside beside;
  // Few tokens are all that tiles hold. Of many, the last tile is computed whole: configuring tiles takes as long as
  // several products.
  const bool exact = num_tokens <= kPair;
  const int first = exact && num_tokens < kTileTokens ? num_tokens : kTileTokens;
  configure_tiles(first, exact ? num_tokens - first : kTileTokens);
  const int whole_tokens = exact || num_tokens % kTileTokens == 0 ? num_tokens : num_tokens / kPair * kPair;
  for (int row = 0; row < p.num_rows; row += kRows) {
    const int num_rows = p.num_rows - row < kRows ? p.num_rows - row : kRows;
    const bool two_panels = num_rows > kPanelRows;
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    float* output = outputs + row;
    beside.first_token = num_rows % kPanelRows == 0 ? whole_tokens : 0;
    beside.num_tokens = num_tokens;
    beside.num_rows = num_rows;
    if (p.accumulate) beside.load(output, p.output_stride);
    for (int k = p.k_begin; k < p.k_end; k += kMaxCodesK) {
      const int num_k = p.k_end - k < kMaxCodesK ? p.k_end - k : kMaxCodesK;
      maker.make(panel, k, num_k, tiles, 0);
      if (two_panels) maker.make(panel + p.panel_bytes, k, num_k, tiles, 1);
      const int num_steps = num_k / kStepK;
      const bool accumulate = p.accumulate || k > p.k_begin;
      Ahead ahead = find_ahead<Maker>(p, row, k);
      const uint8_t* a0 = activations + static_cast<size_t>(k / kStepK) * kTileBytes;
      for (int token = 0; token < num_tokens; token += kPair, a0 += 2 * p.group_bytes) {
        const uint8_t* a1 = a0 + p.group_bytes;
        const bool two_groups = num_tokens - token > kTileTokens;
        float* to = token < beside.first_token ? output + token * p.output_stride : beside.sums[token];
        const size_t stride = (token < beside.first_token ? p.output_stride : kRows) * sizeof(float);
        if (two_groups && two_panels)
          multiply_tiles<true, true>(tiles, a0, a1, num_steps, to, stride, accumulate, ahead);
        else if (two_groups)
          multiply_tiles<true, false>(tiles, a0, a1, num_steps, to, stride, accumulate, ahead);
        else if (two_panels)
          multiply_tiles<false, true>(tiles, a0, a1, num_steps, to, stride, accumulate, ahead);
        else
          multiply_tiles<false, false>(tiles, a0, a1, num_steps, to, stride, accumulate, ahead);
        ahead = {};
      }
    }
    beside.store(output, p.output_stride);
  }
  _tile_release();
}

template <class Maker>
inline void tile_gemm_bf16(const TileGemmParams& p) {
  for (int token = 0; token < p.num_tokens; token += kTokensAtOnce)
    tile_gemm_tokens<Maker>(p, p.activations + static_cast<size_t>(token / kTileTokens) * p.group_bytes,
                            p.num_tokens - token < kTokensAtOnce ? p.num_tokens - token : kTokensAtOnce,
                            p.output + static_cast<size_t>(token) * p.output_stride);
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
