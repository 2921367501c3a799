// The tile GEMM: weights of all types become bfloat16 tiles in the first level cache, used by all tokens of the expert.
//
// tokens x weight rows = [16 tokens][32 k] times [32 k][16 rows], accumulated in float32 by TDPBF16PS. A step is 32 k.
// Two panels and two groups of tokens are computed together, so each tile loaded is used twice.
#pragma once

#include <immintrin.h>

#include "kernels/amx/ahead.h"
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
  static inline void load(const float* sums, size_t stride, int group_tokens) {
    const float* below = sums + group_tokens * stride;
    stride *= sizeof(float);
    _tile_loadd(0, sums, stride);
    if constexpr (kTwoPanels) _tile_loadd(1, sums + kPanelRows, stride);
    if constexpr (kTwoGroups) _tile_loadd(2, below, stride);
    if constexpr (kTwoGroups && kTwoPanels) _tile_loadd(3, below + kPanelRows, stride);
  }

  static inline void store(float* sums, size_t stride, int group_tokens) {
    float* below = sums + group_tokens * stride;
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
  alignas(64) Bf16Tiles tiles[2];
  alignas(64) Making<Maker> making;
  SumsBeside beside;
  const int pair = 2 * p.group_tokens, num_pairs = (num_tokens + pair - 1) / pair;
  configure_tiles(num_tokens, p.group_tokens);
  const int whole_tokens =
      num_tokens <= pair || num_tokens % p.group_tokens == 0 ? num_tokens : num_tokens / pair * pair;
  const size_t ahead_of_step = activations_ahead_of_step(p, kTileBytes / kStepK, kSteps);
  const uint8_t* next_a = activations + static_cast<size_t>(p.k_end / kStepK) * kTileBytes;
  const int making_token = num_tokens < pair ? 0 : (num_tokens / pair - 1) * pair;  // the last whole pair
  Chunks<Maker> chunks(p);
  making.make_first(chunks.now(), chunks.next(), tiles[0]);
  for (int number = 0; chunks.now().exists(); chunks.advance(), number ^= 1, next_a += kSteps * ahead_of_step) {
    const Chunk& chunk = chunks.now();
    const int num_steps = chunk.num_k / kStepK;
    const bool starts = chunk.k == p.k_begin, ends = chunk.k + chunk.num_k == p.k_end;
    float* output = outputs + chunk.row;
    making.start(chunks.next(), chunks.after(), tiles[number ^ 1]);
    const bool makes = chunk.is_whole() && chunks.next().is_whole();
    if (starts) {
      beside.first_token = chunk.num_rows % kPanelRows == 0 ? whole_tokens : 0;
      beside.num_tokens = num_tokens;
      beside.num_rows = chunk.num_rows;
      if (p.accumulate) beside.load(output, p.output_stride);
    }
    // Each chunk begins with the pair that the one before it ended with, whose sums stay in their tiles.
    const bool back = (chunk.k - p.k_begin) / kMaxCodesK % 2 != 0;
    for (int turn = 0; turn < num_pairs; ++turn) {
      const bool loads = turn > 0 || starts, stores = turn + 1 < num_pairs || ends;
      const int place = back ? num_pairs - 1 - turn : turn, token = place * pair;
      const size_t of_pair = static_cast<size_t>(place) * 2 * p.group_bytes;
      float* to = token < beside.first_token ? output + token * p.output_stride : beside.sums[token];
      const size_t stride = token < beside.first_token ? p.output_stride : kRows;
      with_flags(num_tokens - token > p.group_tokens, chunk.num_panels() == 2, token == making_token && makes,
                 [&](auto two_groups, auto two_panels, auto makes) {
                   using Sums = TileSums<two_groups(), two_panels()>;
                   if (starts && !p.accumulate)
                     Sums::zero();
                   else if (loads)
                     Sums::load(to, stride, p.group_tokens);
                   const uint8_t* a = activations + of_pair + static_cast<size_t>(chunk.k / kStepK) * kTileBytes;
                   const uint8_t* later = next_a + of_pair;
                   const ActivationsAhead ahead{{later, two_groups() ? later + p.group_bytes : nullptr}, ahead_of_step};
                   add_products<TileFormat::BF16, two_groups(), two_panels()>(
                       tiles[number].tiles, a, a + p.group_bytes, num_steps, [](auto) {},
                       [&](int s, auto i, auto n) {
                         if constexpr (makes()) making.template after_product<i(), n()>(s);
                       },
                       [&](int s) {
                         if (token == making_token) making.prefetch(s);
                         ahead.prefetch(s);
                       });
                   if (stores) Sums::store(to, stride, p.group_tokens);
                 });
    }
    if (!makes && chunks.next().exists()) making.make_all();
    if (ends) beside.store(output, p.output_stride);
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
