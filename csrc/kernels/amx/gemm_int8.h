// The tile GEMM of quantised types.
//
// TDPBSSD and TDPBSUD add up 64 k of 16 tokens times 16 rows; after a chunk of 128 or 256 k the integers are scaled and
// added to float32 sums in the first level cache. Where a type has mins, what they differ from the centre of the codes
// is multiplied by the sums of activations, as bfloat16 tiles: one more multiplication for every 16 or 8.
//
// Work is laid out for the tile unit and the vector units to be busy at once: the tiles of one job are multiplied while
// the integers of the job before are scaled and the weights of the next chunk are made.
#pragma once

#include "kernels/amx/tiles.h"
#include "kernels/amx/weights_int8.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kRows = 2 * kPanelRows;  // weight rows computed together
constexpr int kMaxTileTokens = 256;    // tokens whose sums stay in the first level cache
constexpr int kMaxExactTokens = 16;    // up to here exact planes are faster than rounding; measured

// Integers of one job: [which][other][16 tokens][16 rows]. `which` is a group of tokens, or a plane of activations
// (high, low) when precise; `other` is a panel, or a plane of weights (low, high) when exact.
struct alignas(64) Products {
  int32_t tiles[2][2][kTileTokens][kPanelRows];
};

// a0, a1: tiles [kTiles][16 tokens][64] of two groups of tokens, or of the two planes of one.
template <Planes planes, int kTiles, bool kTwo>
inline void multiply_chunk(const WeightTiles& weights, const uint8_t* a0, const uint8_t* a1) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < kTiles; ++i) {
    _tile_loadd(6, weights[i][0], kTileRowBytes);
    _tile_loadd(4, a0 + i * kTileBytes, kTileRowBytes);
    if constexpr (planes == Planes::kExact)
      _tile_dpbsud(0, 4, 6);
    else
      _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, weights[i][1], kTileRowBytes);
    if constexpr (planes == Planes::kExact)
      _tile_dpbsud(1, 4, 7);
    else
      _tile_dpbssd(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a1 + i * kTileBytes, kTileRowBytes);
      if constexpr (planes == Planes::kExact) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      } else {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
  }
}

inline void store_products(Products& products, bool two) {
  _tile_stored(0, products.tiles[0][0], kTileRowBytes);
  _tile_stored(1, products.tiles[0][1], kTileRowBytes);
  if (!two) return;
  _tile_stored(2, products.tiles[1][0], kTileRowBytes);
  _tile_stored(3, products.tiles[1][1], kTileRowBytes);
}

using TileSums = float[kMaxTileTokens][kRows];

// A multiplication whose integers are still to be scaled.
struct PendingJob {
  int num_tokens;                    // 0: none
  float (*sums)[kRows];              // of its first token, at its first row
  const float* activation_steps[2];  // of its groups of tokens: [16]
  const WeightSteps* weight_steps;
};

// sums += step of the weights * step of the activations * products, for one group of tokens; rounded weights.
template <bool kPrecise>
inline void add_rounded(const PendingJob& job, const Products& products, int group, int num_tokens) {
  const float* activation_steps = job.activation_steps[group];
  float (*sums)[kRows] = job.sums + group * kTileTokens;
  for (int panel = 0; panel < 2; ++panel) {
    const Floats step = load_floats((*job.weight_steps)[panel]);
    for (int t = 0; t < num_tokens; ++t) {
      Floats p = to_floats(load(products.tiles[group][panel][t]));
      if constexpr (kPrecise) p = multiply_add(to_floats(load(products.tiles[1][panel][t])), splat_float(0x1p-7f), p);
      float* sum = sums[t] + panel * kPanelRows;
      store_floats(sum, multiply_add(p, multiply(step, splat_float(activation_steps[t])), load_floats(sum)));
    }
  }
}

// sums += d * step of the activations * (products of the low plane + 8 * of the high plane).
inline void add_exact(const PendingJob& job, const Products& products, int group, int num_tokens) {
  const float* activation_steps = job.activation_steps[group];
  float (*sums)[kRows] = job.sums + group * kTileTokens;
  const Floats d = load_floats((*job.weight_steps)[0]);
  for (int t = 0; t < num_tokens; ++t) {
    const Ints p = add_ints(shift_left<3>(load(products.tiles[group][1][t])), load(products.tiles[group][0][t]));
    store_floats(sums[t],
                 multiply_add(to_floats(p), multiply(d, splat_float(activation_steps[t])), load_floats(sums[t])));
  }
}

// Multiplies chunks with all tokens. Storing a tile waits for its multiplications, and holds up everything behind it in
// the reorder buffer: so a job's tiles are stored when the next begins, and the vector work of scaling the job before,
// and of making weights, stands between.
template <Planes planes, int kChunkK, bool kPrecise>
struct Multiplier {
  static_assert(planes == Planes::kRounded || !kPrecise);
  static constexpr int kJobTokens = kPrecise ? kTileTokens : 2 * kTileTokens;

  size_t group_bytes;
  int num_tokens;
  Products products;
  PendingJob in_tiles = {}, in_products = {};

  // a, steps: of the chunk, in the first group of tokens. sums: of the first token, at the first row.
  inline void multiply(const WeightTiles& weights, const WeightSteps& weight_steps, const uint8_t* a,
                       const uint8_t* steps, float (*sums)[kRows]) {
    for (int token = 0; token < num_tokens; token += kJobTokens) {
      const int tokens = num_tokens - token < kJobTokens ? num_tokens - token : kJobTokens;
      drain();
      if constexpr (kPrecise)
        multiply_chunk<planes, kChunkK / 64, true>(weights, a, a + plane_bytes(kChunkK));
      else if (tokens > kTileTokens)
        multiply_chunk<planes, kChunkK / 64, true>(weights, a, a + group_bytes);
      else
        multiply_chunk<planes, kChunkK / 64, false>(weights, a, a);
      scale();
      in_tiles = {tokens,
                  sums + token,
                  {reinterpret_cast<const float*>(steps), reinterpret_cast<const float*>(steps + group_bytes)},
                  &weight_steps};
      a += kJobTokens / kTileTokens * group_bytes;
      steps += kJobTokens / kTileTokens * group_bytes;
    }
  }

  inline void finish() {
    drain();
    scale();
  }

  inline void drain() {
    if (in_tiles.num_tokens == 0) return;
    store_products(products, kPrecise || in_tiles.num_tokens > kTileTokens);
    in_products = in_tiles;
    in_tiles.num_tokens = 0;
  }

  inline void scale() {
    for (int group = 0; group * kTileTokens < in_products.num_tokens; ++group) {
      const int rest = in_products.num_tokens - group * kTileTokens, tokens = rest < kTileTokens ? rest : kTileTokens;
      if constexpr (planes == Planes::kExact)
        add_exact(in_products, products, group, tokens);
      else
        add_rounded<kPrecise>(in_products, products, group, tokens);
    }
    in_products.num_tokens = 0;
  }
};

// sums += offsets times the sums of activations, over 32 groups; of the products of their halves all but the smallest.
// a: the tiles of sums of the first 16 tokens.
inline void multiply_offsets(const uint8_t (&upper)[2][kTileBytes], const uint8_t (&lower)[2][kTileBytes],
                             const uint8_t* a, size_t group_bytes, int num_tokens, TileSums& sums) {
  constexpr size_t kStride = sizeof(sums[0]);
  for (int token = 0; token < num_tokens; token += kTileTokens, a += group_bytes) {
    _tile_loadd(4, a, kTileRowBytes);
    _tile_loadd(5, a + kTileBytes, kTileRowBytes);
    _tile_loadd(0, sums[token], kStride);
    _tile_loadd(1, sums[token] + kPanelRows, kStride);
    _tile_loadd(6, upper[0], kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, upper[1], kTileRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, lower[0], kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, lower[1], kTileRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(0, sums[token], kStride);
    _tile_stored(1, sums[token] + kPanelRows, kStride);
  }
}

// k from k_begin to k_end, within one multiple of 1024, for two panels and up to kMaxTileTokens tokens.
template <class Unpack, Planes planes, bool kPrecise>
inline void multiply_part(const TileGemmParams& p, const uint8_t* const (&panels)[2], const uint8_t* activations,
                          int num_tokens, int k_begin, int k_end, TileSums& sums) {
  constexpr int kPanels = planes == Planes::kExact ? 1 : 2;  // multiplied together
  constexpr int kCenter = planes == Planes::kExact ? 0 : Unpack::kCenter;
  constexpr int kChunkK = kChunkOf<Unpack>;
  const Int8Activations layout(p.k, kChunkK);
  alignas(64) Maker<Unpack, planes> makers[kPanels];
  alignas(64) WeightTiles tiles[2];  // being made, and being multiplied
  alignas(64) WeightSteps steps[3];  // and of those whose products are still to be scaled
  alignas(64) OffsetTiles offsets;
  alignas(64) Multiplier<planes, kChunkK, kPrecise> multiplier;
  multiplier.group_bytes = p.group_bytes;
  multiplier.num_tokens = num_tokens;
  // Groups of the 1024 k that this call has no part in.
  if (Unpack::kHasMin && k_end - k_begin < kSumsK) std::memset(&offsets, 0, sizeof offsets);

  // One behind: what was just stored is not read at once, and the tile unit works while the next weights are made.
  int number = 0;  // of the weights being made
  int made_k = 0, made_panel = 0;
  const auto multiply_made = [&] {
    if (number == 0) return;
    const size_t chunk = static_cast<size_t>(made_k / kChunkK);
    multiplier.multiply(tiles[(number - 1) % 2], steps[(number - 1) % 3], activations + chunk * chunk_bytes(kChunkK),
                        activations + layout.steps + chunk * kStepBytes,
                        reinterpret_cast<float (*)[kRows]>(sums[0] + made_panel * kPanelRows));
  };

  for (int k = k_begin; k < k_end; k += kChunkK) {
    const int chunk_k = k_end - k < kChunkK ? k_end - k : kChunkK;
    for (int panel = 0; panel < 2; panel += kPanels) {
      for (int i = 0; i < kPanels; ++i) {
        makers[i].make(panels[panel + i], k, chunk_k, i, tiles[number % 2], steps[number % 3]);
        if constexpr (Unpack::kHasMin)
          make_offsets(makers[i].codes, kCenter, chunk_k / Unpack::kGroup, k % kSumsK / Unpack::kGroup, panel + i,
                       offsets);
      }
      multiply_made();
      ++number, made_k = k, made_panel = panel;
    }
  }
  multiply_made();
  multiplier.finish();
  if constexpr (Unpack::kHasMin) {
    constexpr int kTileOffsetK = 32 * Unpack::kGroup;
    const uint8_t* a = activations + (Unpack::kGroup == 32 ? layout.sums : layout.half_sums);
    for (int i = 0; i < kSumsK / kTileOffsetK; ++i) {
      const int tile_k = k_begin / kSumsK * kSumsK + i * kTileOffsetK;
      if (tile_k >= k_end) break;
      multiply_offsets(offsets.upper[i], offsets.lower[i], a + static_cast<size_t>(tile_k / kTileOffsetK) * kSumsBytes,
                       p.group_bytes, num_tokens, sums);
    }
  }
}

template <class Unpack, Planes planes, bool kPrecise>
inline void tile_gemm_tokens(const TileGemmParams& p, int first_token, int num_tokens) {
  alignas(64) TileSums sums;
  const uint8_t* activations = p.activations + static_cast<size_t>(first_token / kTileTokens) * p.group_bytes;
  // Rows of a tile beyond the tokens are computed and not used; with few tokens leaving them out saves time.
  const int tile_rows = num_tokens < kTileTokens ? num_tokens : kTileTokens;
  configure_tiles(tile_rows, 0);
  for (int row = 0; row < p.num_rows; row += kRows) {
    const int num_rows = p.num_rows - row < kRows ? p.num_rows - row : kRows;
    const uint8_t* first = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    const uint8_t* const panels[2] = {first, num_rows > kPanelRows ? first + p.panel_bytes : first};
    std::memset(sums, 0, static_cast<size_t>(round_up(num_tokens, kTileTokens)) * kTileTokens * sizeof sums[0]);
    for (int k = p.k_begin; k < p.k_end;) {
      const int window_end = (k / kSumsK + 1) * kSumsK;
      const int k_end = window_end < p.k_end ? window_end : p.k_end;
      multiply_part<Unpack, planes, kPrecise>(p, panels, activations, num_tokens, k, k_end, sums);
      k = k_end;
    }
    for (int t = 0; t < num_tokens; ++t) {
      float* output = p.output + static_cast<size_t>(first_token + t) * p.output_stride + row;
      if (num_rows < kRows) {
        for (int r = 0; r < num_rows; ++r) output[r] = sums[t][r] + (p.accumulate ? output[r] : 0.0f);
        continue;
      }
      for (int i = 0; i < kRows; i += kLanes) {
        const Floats sum = load_floats(sums[t] + i);
        store_floats(output + i, p.accumulate ? add(load_floats(output + i), sum) : sum);
      }
    }
  }
}

template <class Unpack>
inline void tile_gemm_int8(const TileGemmParams& p) {
  for (int token = 0; token < p.num_tokens; token += kMaxTileTokens) {
    const int num_tokens = p.num_tokens - token < kMaxTileTokens ? p.num_tokens - token : kMaxTileTokens;
    if constexpr (kHasIntegerScales<Unpack>) {
      if (num_tokens <= kMaxExactTokens && !p.precise) {
        tile_gemm_tokens<Unpack, Planes::kExact, false>(p, token, num_tokens);
        continue;
      }
    }
    if (p.precise)
      tile_gemm_tokens<Unpack, Planes::kRounded, true>(p, token, num_tokens);
    else
      tile_gemm_tokens<Unpack, Planes::kRounded, false>(p, token, num_tokens);
  }
  _tile_release();
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
