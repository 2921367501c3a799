// The tile GEMM of quantised types where 8 bits of activations are enough: weights become int8 tiles in the first level
// cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][64 k] times [64 k][16 rows], integers accumulated by TDPBSSD over a chunk of 256
// k, which have one step for a token and one for a row; then they are scaled and added to the output. Two panels and
// two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/products.h"
#include "kernels/amx/weights_int8.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Integers of two groups of tokens and two panels.
struct alignas(64) Int8Products {
  int32_t tiles[2][2][kTileTokens][kPanelRows];  // [group][panel]
};

// The product of a chunk and a pair of groups, and where it goes.
struct Int8Job {
  int num_tokens = 0;  // 0: there is none
  int num_rows = 0;
  bool starts = false;                             // overwrites the output instead of adding to it
  const float* token_steps[2] = {};                // of its groups: [16]
  const float (*row_steps)[kPanelRows] = nullptr;  // [panel]
  float* output = nullptr;                         // of the first token and row
};

// output += step of the row * step of the token * products, for one group and panel.
inline void scale_products(const Int8Job& job, const Int8Products& products, int group, int panel, size_t stride) {
  const int rows = job.num_rows - panel * kPanelRows, rest = job.num_tokens - group * kTileTokens;
  const int tokens = rest < kTileTokens ? rest : kTileTokens;
  const __mmask16 there = rows >= kPanelRows ? 0xffff : static_cast<__mmask16>((1u << rows) - 1);
  const __mmask16 before = job.starts ? 0 : there;
  const float* token_steps = job.token_steps[group];
  const Floats row_step = load_floats(job.row_steps[panel]);
  float* to = job.output + group * kTileTokens * stride + panel * kPanelRows;
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t, to += stride) {
    const Floats product = to_floats(load(products.tiles[group][panel][t]));
    const Floats step = multiply(row_step, splat_float(token_steps[t]));
    _mm512_mask_storeu_ps(to, there, multiply_add(product, step, _mm512_maskz_loadu_ps(before, to)));
  }
}

// Multiplies jobs one behind: storing a tile waits for its products and holds up everything behind it, so the tiles of
// a job are stored when the next begins, and its integers scaled between the products of that: a chunk has a step for
// each tile.
struct Int8Pipeline {
  Int8Products products;
  Int8Job last;
  size_t stride;  // of the output

  inline bool has(int tile) const {
    return tile / 2 * kTileTokens < last.num_tokens && tile % 2 * kPanelRows < last.num_rows;
  }

  inline void scale(int tile) {
    if (has(tile)) scale_products(last, products, tile / 2, tile % 2, stride);
  }

  inline void store_tiles() {
    if (has(0)) _tile_stored(0, products.tiles[0][0], kTileRowBytes);
    _tile_zero(0);
    if (has(1)) _tile_stored(1, products.tiles[0][1], kTileRowBytes);
    _tile_zero(1);
    if (has(2)) _tile_stored(2, products.tiles[1][0], kTileRowBytes);
    _tile_zero(2);
    if (has(3)) _tile_stored(3, products.tiles[1][1], kTileRowBytes);
    _tile_zero(3);
  }

  // a0, a1: the tiles of the job's groups of tokens.
  template <bool kTwoGroups, bool kTwoPanels>
  inline void multiply(const Int8Tiles& weights, const uint8_t* a0, const uint8_t* a1, int num_steps,
                       const WeightsAhead& weights_ahead, const ActivationsAhead& activations_ahead) {
    store_tiles();
    add_products<TileFormat::INT8_256, kTwoGroups, kTwoPanels>(weights, a0, a1, num_steps, weights_ahead,
                                                               activations_ahead, [&](int s) { scale(s); });
    for (int tile = num_steps; tile < 4; ++tile) scale(tile);
  }

  inline void finish() {
    store_tiles();
    for (int tile = 0; tile < 4; ++tile) scale(tile);
  }
};

// Up to kTokensAtOnce tokens.
template <class Maker>
inline void tile_gemm_int8_tokens(const TileGemmParams& p, const uint8_t* group, int num_tokens, float* outputs) {
  constexpr int kPair = 2 * kTileTokens;
  alignas(64) Int8Tiles tiles;
  alignas(64) WeightSteps row_steps[2];
  alignas(64) Maker maker;
  Int8Pipeline pipeline;
  pipeline.stride = p.output_stride;
  const bool exact = num_tokens <= kPair;
  const int first = exact && num_tokens < kTileTokens ? num_tokens : kTileTokens;
  configure_tiles(first, exact ? num_tokens - first : kTileTokens);
  const size_t ahead_of_step = activations_ahead_of_step(p, kTileBytes / kInt8TileK, kInt8Steps);
  const uint8_t* next_a = group + int8_tile(p.k_end);
  int number = 0;
  for (int row = 0; row < p.num_rows; row += kRows) {
    const int num_rows = p.num_rows - row < kRows ? p.num_rows - row : kRows;
    const bool two_panels = num_rows > kPanelRows;
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    for (int k = p.k_begin; k < p.k_end; k += kMaxCodesK, ++number, next_a += kInt8Steps * ahead_of_step) {
      const int num_k = p.k_end - k < kMaxCodesK ? p.k_end - k : kMaxCodesK;
      WeightSteps& steps = row_steps[number % 2];
      maker.make(panel, k, num_k, tiles, 0, steps);
      if (two_panels) maker.make(panel + p.panel_bytes, k, num_k, tiles, 1, steps);
      const int num_steps = (num_k + kInt8TileK - 1) / kInt8TileK;
      WeightsAhead ahead = weights_ahead<Maker>(p, row, k, kInt8Steps);
      const uint8_t* a = group + int8_tile(k);
      const uint8_t* token_steps = group + int8_token_steps(p.k, k);
      const uint8_t* later = next_a;
      float* output = outputs + row;
      for (int token = 0; token < num_tokens; token += kPair, output += kPair * p.output_stride) {
        const Int8Job job{
            num_tokens - token < kPair ? num_tokens - token : kPair,
            num_rows,
            k == p.k_begin && !p.accumulate,
            {reinterpret_cast<const float*>(token_steps), reinterpret_cast<const float*>(token_steps + p.group_bytes)},
            steps,
            output};
        with_tiles(job.num_tokens > kTileTokens, two_panels, [&](auto two_groups, auto two_panels) {
          pipeline.multiply<two_groups(), two_panels()>(
              tiles, a, a + p.group_bytes, num_steps, ahead,
              {{later, two_groups() ? later + p.group_bytes : nullptr}, ahead_of_step});
        });
        pipeline.last = job;
        a += 2 * p.group_bytes, token_steps += 2 * p.group_bytes, later += 2 * p.group_bytes;
        ahead = {};
      }
    }
  }
  pipeline.finish();
  _tile_release();
}

template <class Maker>
inline void tile_gemm_int8(const TileGemmParams& p) {
  for (int token = 0; token < p.num_tokens; token += kTokensAtOnce)
    tile_gemm_int8_tokens<Maker>(p, p.activations + static_cast<size_t>(token / kTileTokens) * p.group_bytes,
                                 p.num_tokens - token < kTokensAtOnce ? p.num_tokens - token : kTokensAtOnce,
                                 p.output + static_cast<size_t>(token) * p.output_stride);
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
