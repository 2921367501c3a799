// The tile GEMM of quantised types where 8 bits of activations are enough: weights become int8 tiles in the first level
// cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][64 k] times [64 k][16 rows], integers accumulated by TDPBSSD over a chunk of 256
// k, which have one step for a token and one for a row; then they are scaled and added to the output. Two panels and
// two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/ahead.h"
#include "kernels/amx/products.h"
#include "kernels/amx/weights_int8.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// The product of a chunk and a pair of groups of tokens, and where it goes.
struct Int8Job {
  const float (*row_steps)[kPanelRows] = nullptr;  // [panel]
  const float* token_steps[2] = {};                // of its groups: [16]
  float* output = nullptr;                         // of the first token and row
  int num_tokens = 0;                              // 0: there is none
  int num_rows = 0;
  bool starts = false;  // overwrites the output instead of adding to it
};

// Multiplies jobs one behind: storing a tile waits for its products and holds up everything behind it, so the tiles of
// a job are stored when those of the next begin, and its integers scaled between the products of that: a chunk has a
// step for each tile.
struct Int8Pipeline {
  alignas(64) int32_t products[2][2][kTileTokens][kPanelRows];  // [group][panel], of the last job
  // In turn, and not copied: a copy of what was just written waits for all that is being stored.
  Int8Job jobs[2];
  const Int8Job* last = &jobs[0];
  size_t stride;     // of the output
  int group_tokens;  // of a whole group

  // output += step of the row * step of the token * products.
  KT_FORCE_INLINE void scale(int tile) {
    const int group = tile / 2, panel = tile % 2;
    const Int8Job& job = *last;
    const int rows = job.num_rows - panel * kPanelRows, rest = job.num_tokens - group * group_tokens;
    if (rows <= 0) return;
    const int tokens = rest < group_tokens ? rest : group_tokens;
    const __mmask16 there = rows >= kPanelRows ? 0xffff : static_cast<__mmask16>((1u << rows) - 1);
    const __mmask16 before = job.starts ? 0 : there;
    const size_t step_to = stride;  // here and below: read once, as storing floats may change what is pointed to
    const float* token_steps = job.token_steps[group];
    const Floats row_step = load_floats(job.row_steps[panel]);
    float* to = job.output + group * group_tokens * step_to + panel * kPanelRows;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t, to += step_to) {
      const Floats product = to_floats(load(products[group][panel][t]));
      const Floats step = multiply(row_step, splat_float(token_steps[t]));
      _mm512_mask_storeu_ps(to, there, multiply_add(product, step, _mm512_maskz_loadu_ps(before, to)));
    }
  }

  // Tile registers have literal names only.
  template <int kTile>
  inline void store_tile() {
    const bool is_there = kTile / 2 * group_tokens < last->num_tokens && kTile % 2 * kPanelRows < last->num_rows;
    int32_t (*to)[kPanelRows] = products[kTile / 2][kTile % 2];
    if constexpr (kTile == 0) {
      if (is_there) _tile_stored(0, to, kTileRowBytes);
      _tile_zero(0);
    } else if constexpr (kTile == 1) {
      if (is_there) _tile_stored(1, to, kTileRowBytes);
      _tile_zero(1);
    } else if constexpr (kTile == 2) {
      if (is_there) _tile_stored(2, to, kTileRowBytes);
      _tile_zero(2);
    } else {
      if (is_there) _tile_stored(3, to, kTileRowBytes);
      _tile_zero(3);
    }
  }

  Int8Job& next() { return jobs[last == &jobs[0]]; }

  // Multiplies next(); a0, a1: the tiles of its groups of tokens.
  template <bool kTwoGroups, bool kTwoPanels, bool kMakes, class Maker>
  inline void run(const Int8Tiles& weights, const uint8_t* a0, const uint8_t* a1, int num_steps, Making<Maker>& making,
                  bool prefetches, const ActivationsAhead& ahead) {
    if constexpr (!kTwoPanels) store_tile<1>();
    if constexpr (!kTwoGroups) store_tile<2>();
    if constexpr (!kTwoGroups || !kTwoPanels) store_tile<3>();
    add_products<TileFormat::INT8_256, kTwoGroups, kTwoPanels>(
        weights.tiles, a0, a1, num_steps, [&](auto tile) { store_tile<tile()>(); },
        [&](int s, auto i, auto n) {
          if constexpr (kMakes) making.template after_product<i(), n()>(s);
        },
        [&](int s) {
          if (prefetches) making.prefetch(s);
          ahead.prefetch(s);
          scale(s);
        });
    for (int tile = num_steps; tile < 4; ++tile) scale(tile);
    last = &next();
  }

  inline void finish() {
    store_tile<0>();
    store_tile<1>();
    store_tile<2>();
    store_tile<3>();
    for (int tile = 0; tile < 4; ++tile) scale(tile);
  }
};

// Up to kTokensAtOnce tokens.
template <class Maker>
inline void tile_gemm_int8_tokens(const TileGemmParams& p, const uint8_t* group, int num_tokens, float* outputs) {
  alignas(64) Int8Tiles tiles[2];
  alignas(64) float row_steps[2][2][kPanelRows];  // tiles' steps, for as long as the last job of them needs them
  alignas(64) Making<Maker> making;
  Int8Pipeline pipeline;
  pipeline.stride = p.output_stride;
  pipeline.group_tokens = p.group_tokens;
  const int pair = 2 * p.group_tokens;
  configure_tiles(num_tokens, p.group_tokens);
  const size_t ahead_of_step = activations_ahead_of_step(p, kTileBytes / kInt8TileK, kInt8Steps);
  const uint8_t* next_a = group + int8_tile(p.k_end);
  const int making_token = num_tokens < pair ? 0 : (num_tokens / pair - 1) * pair;  // the last whole pair
  Chunks<Maker> chunks(p);
  making.make_first(chunks.now(), chunks.next(), tiles[0]);
  for (int number = 0; chunks.now().exists(); chunks.advance(), number ^= 1, next_a += kInt8Steps * ahead_of_step) {
    const Chunk& chunk = chunks.now();
    const int num_steps = (chunk.num_k + kInt8TileK - 1) / kInt8TileK;
    const uint8_t* token_steps = group + int8_token_steps(p.k, chunk.k);
    const Int8Tiles& made = tiles[number];
    std::memcpy(row_steps[number], made.steps, sizeof row_steps[number]);
    making.start(chunks.next(), chunks.after(), tiles[number ^ 1]);
    const bool makes = chunk.is_whole() && chunks.next().is_whole();
    for (int token = 0; token < num_tokens; token += pair) {
      const size_t of_group = static_cast<size_t>(token / p.group_tokens) * p.group_bytes;
      Int8Job& job = pipeline.next();
      job.row_steps = row_steps[number];
      for (int g = 0; g < 2; ++g)
        job.token_steps[g] = reinterpret_cast<const float*>(token_steps + of_group + g * p.group_bytes);
      job.output = outputs + token * p.output_stride + chunk.row;
      job.num_tokens = num_tokens - token < pair ? num_tokens - token : pair;
      job.num_rows = chunk.num_rows;
      job.starts = chunk.k == p.k_begin && !p.accumulate;
      with_flags(job.num_tokens > p.group_tokens, chunk.num_panels() == 2, token == making_token && makes,
                 [&](auto two_groups, auto two_panels, auto makes) {
                   const uint8_t* a = group + of_group + int8_tile(chunk.k);
                   const uint8_t* later = next_a + of_group;
                   pipeline.run<two_groups(), two_panels(), makes()>(
                       made, a, a + p.group_bytes, num_steps, making, token == making_token,
                       {{later, two_groups() ? later + p.group_bytes : nullptr}, ahead_of_step});
                 });
    }
    if (!makes && chunks.next().exists()) making.make_all();
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
