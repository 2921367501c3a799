// The tile GEMM: weights of all types become bfloat16 tiles in the first level cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][32 k] times [32 k][16 rows], accumulated in float32 by TDPBF16PS. A step is 32 k.
// Two panels and two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/products.h"
#include "kernels/amx/weights_bf16.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Up to 2 groups of tokens x 2 panels, whose sums are in tiles 0 to 3.
template <bool kTwoGroups, bool kTwoPanels>
struct TileSums {
  static inline void zero() {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoGroups) _tile_zero(2);
    if constexpr (kTwoGroups && kTwoPanels) _tile_zero(3);
  }

  // sums: of the first token and row
  static inline void load(const float* sums, size_t stride) {
    const float* below = sums + kTileTokens * stride;
    stride *= sizeof(float);
    _tile_loadd(0, sums, stride);
    if constexpr (kTwoPanels) _tile_loadd(1, sums + kPanelRows, stride);
    if constexpr (kTwoGroups) _tile_loadd(2, below, stride);
    if constexpr (kTwoGroups && kTwoPanels) _tile_loadd(3, below + kPanelRows, stride);
  }

  static inline void store(float* sums, size_t stride) {
    float* below = sums + kTileTokens * stride;
    stride *= sizeof(float);
    _tile_stored(0, sums, stride);
    if constexpr (kTwoPanels) _tile_stored(1, sums + kPanelRows, stride);
    if constexpr (kTwoGroups) _tile_stored(2, below, stride);
    if constexpr (kTwoGroups && kTwoPanels) _tile_stored(3, below + kPanelRows, stride);
  }
};

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
  const size_t ahead_of_step = activations_ahead_of_step(p, kTileBytes / kStepK, kSteps);
  const uint8_t* next_a = activations + static_cast<size_t>(p.k_end / kStepK) * kTileBytes;
  for (int row = 0; row < p.num_rows; row += kRows) {
    const int num_rows = p.num_rows - row < kRows ? p.num_rows - row : kRows;
    const bool two_panels = num_rows > kPanelRows;
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    float* output = outputs + row;
    beside.first_token = num_rows % kPanelRows == 0 ? whole_tokens : 0;
    beside.num_tokens = num_tokens;
    beside.num_rows = num_rows;
    if (p.accumulate) beside.load(output, p.output_stride);
    for (int k = p.k_begin; k < p.k_end; k += kMaxCodesK, next_a += kSteps * ahead_of_step) {
      const int num_k = p.k_end - k < kMaxCodesK ? p.k_end - k : kMaxCodesK;
      maker.make(panel, k, num_k, tiles, 0);
      if (two_panels) maker.make(panel + p.panel_bytes, k, num_k, tiles, 1);
      const int num_steps = num_k / kStepK;
      WeightsAhead ahead = weights_ahead<Maker>(p, row, k, kSteps);
      const uint8_t* a = activations + static_cast<size_t>(k / kStepK) * kTileBytes;
      for (int token = 0; token < num_tokens; token += kPair, a += 2 * p.group_bytes) {
        float* to = token < beside.first_token ? output + token * p.output_stride : beside.sums[token];
        const size_t stride = token < beside.first_token ? p.output_stride : kRows;
        // The sums of a single pair stay in their tiles.
        const bool starts = k == p.k_begin, ends = k + num_k == p.k_end, moves = num_tokens > kPair;
        with_tiles(num_tokens - token > kTileTokens, two_panels, [&](auto two_groups, auto two_panels) {
          using Tiles = TileSums<two_groups(), two_panels()>;
          if (starts && !p.accumulate)
            Tiles::zero();
          else if (starts || moves)
            Tiles::load(to, stride);
          const uint8_t* later = next_a + static_cast<size_t>(token / kTileTokens) * p.group_bytes;
          add_products<TileFormat::BF16, two_groups(), two_panels()>(
              tiles, a, a + p.group_bytes, num_steps, ahead,
              {{later, two_groups() ? later + p.group_bytes : nullptr}, ahead_of_step}, [](int) {});
          if (ends || moves) Tiles::store(to, stride);
        });
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
