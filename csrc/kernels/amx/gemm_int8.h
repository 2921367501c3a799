// The tile GEMM of quantised types: int8 tiles, one step of weights a row and one of activations a token for each 128
// k.
//
// 128 codes of a row, with the scales of their groups, become 128 int8 with one step: a 16-bit multiplication a code.
//   weight = step * (int8 + 1/2 +- 1/2): cut, not rounded; the half is added through the sum of the activations
// TDPBSSD adds up 64 k at a time; after 128 k the integers are scaled and added to float32 sums in the first level
// cache. Where a type has mins, what they differ from the centre of the codes is multiplied by the sums of activations,
// as bfloat16 tiles: one more multiplication for every 16 or 8.
//
// Work is laid out for the tile unit and the vector units to be busy at once: the tiles of one job are multiplied while
// the integers of the job before are scaled and the weights of the next chunk are made.
#pragma once

#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/amx/tiles.h"
#include "kernels/panel/gemm_int.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kRows = 2 * kPanelRows;    // weight rows computed together
constexpr int kMaxTileTokens = 256;      // tokens whose sums stay in the first level cache
constexpr int kPrecisePlanesTokens = 0;  // up to here a second plane of activations costs no time

template <class Unpack>
constexpr int reach() {  // of a code from its centre
  if (Unpack::kSigned) return 128;
  return Unpack::kCenter > Unpack::kMaxCode - Unpack::kCenter ? Unpack::kCenter : Unpack::kMaxCode - Unpack::kCenter;
}

// Codes less their centre are moved up by this, so that they fill int8.
template <class Unpack>
constexpr int code_shift() {
  int shift = 0;
  while (reach<Unpack>() << (shift + 1) <= 128) ++shift;
  return shift;
}

// 128 k of two panels.
struct alignas(64) WeightChunk {
  uint8_t tiles[2][2][kTileBytes];  // [64 k][panel]: [k / 4][16 rows][4]
  float steps[2][kPanelRows];       // [panel][row]
};

// For each 32 groups of a panel: the negative of min - kCenter * scale, in bfloat16 [group / 2][16 rows][2]. 1024 k.
struct alignas(64) OffsetTiles {
  uint8_t tiles[2][2][kTileBytes];  // [32 groups][panel]
};

template <class Unpack>
inline Ints centred(Ints quads) {  // int8, kCenter at 0, times 2^code_shift
  constexpr int kShift = code_shift<Unpack>();
  if constexpr (Unpack::kSigned) return quads;
  return sub_bytes(shift_left<kShift>(quads), splat(0x01010101u * ((Unpack::kCenter << kShift) & 0xff)));
}

// Chunk `chunk` (0 or 1) of the codes to weights.
template <class Unpack>
inline void make_weights(const Codes& codes, int chunk, int num_groups, int panel, WeightChunk& weights) {
  constexpr int kGroups = kChunkK / Unpack::kGroup, kQuads = Unpack::kGroup / 4;
  const int first = chunk * kGroups;
  Floats largest = splat_float(0x1p-120f);  // so that its inverse is finite
  for (int g = 0; g < num_groups; ++g)
    largest = _mm512_max_ps(_mm512_abs_ps(load_floats(codes.scales[first + g])), largest);
  // The factor of a group is 32767 * scale / largest; multiplied by a code * 256 and divided by 2^15 it gives the int8
  // in the upper byte of 16 bits.
  const Floats to_factor = _mm512_div_ps(splat_float(32767), largest);
  store_floats(weights.steps[panel], multiply(largest, splat_float(32768.0f / 32767 / (1 << code_shift<Unpack>()))));
  const Ints twice = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
  const Ints upper = splat(0xff00ff00);
  // Moving bytes by shuffles: the ports of shifts are busy with multiplications.
  const Ints low_to_high =
      _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14));
  const Ints high_to_low =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15, -1));
  for (int g = 0; g < num_groups; ++g) {
    const Ints factor =
        _mm512_shuffle_epi8(_mm512_cvtps_epi32(multiply(load_floats(codes.scales[first + g]), to_factor)), twice);
    for (int q = 0; q < kQuads; ++q) {
      const Ints quads = centred<Unpack>(load(codes.quads[(first + g) * kQuads + q]));
      const Ints even = _mm512_mulhrs_epi16(_mm512_shuffle_epi8(quads, low_to_high), factor);
      const Ints odd = _mm512_mulhrs_epi16(bit_and(quads, upper), factor);
      const int quad = g * kQuads + q;  // of the chunk
      store(weights.tiles[quad / 16][panel] + quad % 16 * kTileRowBytes,
            _mm512_ternarylogic_epi32(odd, upper, _mm512_shuffle_epi8(even, high_to_low), 0xea));  // (a and b) or c
    }
  }
  for (int quad = num_groups * kQuads; quad < kChunkK / 4; ++quad)  // past the end of a row
    store(weights.tiles[quad / 16][panel] + quad % 16 * kTileRowBytes, zero_ints());
}

// Offsets of num_groups (even) groups of the codes, the first being group `group` of the two tiles.
template <class Unpack>
inline void make_offsets(const Codes& codes, int num_groups, int group, int panel, OffsetTiles& offsets) {
  const auto offset = [&](int g) {
    return _mm512_fmsub_ps(load_floats(codes.scales[g]), splat_float(Unpack::kCenter), load_floats(codes.mins[g]));
  };
  for (int g = 0; g < num_groups; g += 2, group += 2) {
    const Ints even = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(offset(g))));
    const Ints odd = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(offset(g + 1))));
    store(offsets.tiles[group / 32][panel] + group % 32 / 2 * kTileRowBytes, bit_or(even, shift_left<16>(odd)));
  }
}

// Integers of one multiplication: [which][panel][16 tokens][16 rows]; which is a group of tokens or a plane.
struct alignas(64) Products {
  int32_t tiles[2][2][kTileTokens][kPanelRows];
};

// a0, a1: tiles [2][16 tokens][64] of two groups of tokens, or of the two planes of one.
template <bool kTwo>
inline void multiply_chunk(const WeightChunk& weights, const uint8_t* a0, const uint8_t* a1, Products& products) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < 2; ++i) {
    _tile_loadd(6, weights.tiles[i][0], kTileRowBytes);
    _tile_loadd(4, a0 + i * kTileBytes, kTileRowBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, weights.tiles[i][1], kTileRowBytes);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a1 + i * kTileBytes, kTileRowBytes);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, products.tiles[0][0], kTileRowBytes);
  _tile_stored(1, products.tiles[0][1], kTileRowBytes);
  if constexpr (kTwo) {
    _tile_stored(2, products.tiles[1][0], kTileRowBytes);
    _tile_stored(3, products.tiles[1][1], kTileRowBytes);
  }
}

using TileSums = float[kMaxTileTokens][kRows];

// sums += steps * (step of the token * products + half of it * sum of its activations), for one group of tokens.
// kPlanes 2: products are high and low planes. factors: of the chunk, [3][16 tokens].
template <int kPlanes>
inline void add_scaled_products(const Products& products, int which, const float (&steps)[2][kPanelRows],
                                const float* factors, int num_tokens, float (*sums)[kRows]) {
  for (int panel = 0; panel < 2; ++panel) {
    const Floats step = load_floats(steps[panel]);
    for (int t = 0; t < num_tokens; ++t) {
      Ints p = load(products.tiles[which][panel][t]);
      Floats scaled;
      if constexpr (kPlanes == 2) {
        p = add_ints(shift_left<7>(p), load(products.tiles[1][panel][t]));
        scaled =
            multiply_add(to_floats(p), splat_float(factors[t] * 0x1p-7f), splat_float(factors[2 * kTileTokens + t]));
      } else {
        scaled = multiply_add(to_floats(p), splat_float(factors[t]), splat_float(factors[kTileTokens + t]));
      }
      float* sum = sums[t] + panel * kPanelRows;
      store_floats(sum, multiply_add(scaled, step, load_floats(sum)));
    }
  }
}

// A multiplication whose integers are still to be scaled.
struct PendingJob {
  int first_token, num_tokens;  // num_tokens 0: none
  const float* factors[2];      // of the groups of tokens
};

template <bool kPrecise>
inline void finish_job(const PendingJob& job, const Products& products, const WeightChunk& weights, TileSums& sums) {
  if (job.num_tokens == 0) return;
  constexpr int kPlanes = kPrecise ? 2 : 1;
  const int first = job.num_tokens < kTileTokens ? job.num_tokens : kTileTokens;
  add_scaled_products<kPlanes>(products, 0, weights.steps, job.factors[0], first, sums + job.first_token);
  if (!kPrecise && job.num_tokens > kTileTokens)
    add_scaled_products<1>(products, 1, weights.steps, job.factors[1], job.num_tokens - kTileTokens,
                           sums + job.first_token + kTileTokens);
}

// sums += offsets times the sums of activations, over 32 groups. a: the tile of sums of the first 16 tokens.
inline void multiply_offsets(const uint8_t (&offsets)[2][kTileBytes], const uint8_t* a, size_t group_bytes,
                             int num_tokens, TileSums& sums) {
  constexpr size_t kStride = sizeof(sums[0]);
  _tile_loadd(6, offsets[0], kTileRowBytes);
  _tile_loadd(7, offsets[1], kTileRowBytes);
  for (int token = 0; token < num_tokens; token += kTileTokens, a += group_bytes) {
    _tile_loadd(4, a, kTileRowBytes);
    _tile_loadd(0, sums[token], kStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(0, sums[token], kStride);
    _tile_loadd(1, sums[token] + kPanelRows, kStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(1, sums[token] + kPanelRows, kStride);
  }
}

// Multiplies one chunk with all tokens, each job followed by the scaling of the one before.
template <bool kPrecise>
struct Multiplier {
  static constexpr int kJobTokens = kPrecise ? kTileTokens : 2 * kTileTokens;

  size_t group_bytes;
  int num_tokens;
  TileSums& sums;
  Products products[2] = {};  // of this job and the one before
  int job_number = 0;
  PendingJob pending = {};
  const WeightChunk* pending_weights = nullptr;

  // a, factors: of the chunk, in the first group of tokens.
  inline void multiply(const WeightChunk& weights, const uint8_t* a, const uint8_t* factors) {
    for (int token = 0; token < num_tokens; token += kJobTokens) {
      Products& current = products[job_number % 2];
      const int tokens = num_tokens - token < kJobTokens ? num_tokens - token : kJobTokens;
      if constexpr (kPrecise)
        multiply_chunk<true>(weights, a, a + kPlaneBytes, current);
      else if (tokens > kTileTokens)
        multiply_chunk<true>(weights, a, a + group_bytes, current);
      else
        multiply_chunk<false>(weights, a, a, current);
      finish();
      pending = {token,
                 tokens,
                 {reinterpret_cast<const float*>(factors), reinterpret_cast<const float*>(factors + group_bytes)}};
      pending_weights = &weights;
      ++job_number;
      a += kJobTokens / kTileTokens * group_bytes;
      factors += kJobTokens / kTileTokens * group_bytes;
    }
  }

  inline void finish() {
    if (pending.num_tokens == 0) return;
    finish_job<kPrecise>(pending, products[1 - job_number % 2], *pending_weights, sums);
    pending.num_tokens = 0;
  }
};

// k from k_begin to k_end, within one multiple of 1024, for two panels and up to kMaxTileTokens tokens.
template <class Unpack, bool kPrecise>
inline void multiply_part(const TileGemmParams& p, const uint8_t* const (&panels)[2], const uint8_t* activations,
                          int num_tokens, int k_begin, int k_end, TileSums& sums) {
  const Int8Activations layout(p.k);
  alignas(64) Codes codes[2];          // of each panel
  alignas(64) WeightChunk weights[3];  // being made, being multiplied, and whose steps are still needed
  alignas(64) OffsetTiles offsets;
  alignas(64) Multiplier<kPrecise> multiplier{p.group_bytes, num_tokens, sums};
  if constexpr (Unpack::kHasMin) std::memset(&offsets, 0, sizeof offsets);

  const int num_chunks = round_up(k_end - k_begin, kChunkK);
  for (int c = 0; c <= num_chunks; ++c) {
    if (c < num_chunks) {
      const int k = k_begin + c * kChunkK, in_codes = c % (kMaxCodesK / kChunkK);
      const int codes_k = k_end - k < kMaxCodesK ? k_end - k : kMaxCodesK;
      const int chunk_k = k_end - k < kChunkK ? k_end - k : kChunkK;
      for (int i = 0; i < 2; ++i) {
        if (in_codes == 0) {
          const size_t block = static_cast<size_t>(k / Unpack::kBlock);
          unpack_chunk<Unpack>(panels[i] + block * kPanelRows * Unpack::kBlockBytes, codes_k, codes[i]);
          if constexpr (Unpack::kHasMin)
            make_offsets<Unpack>(codes[i], codes_k / Unpack::kGroup, k % kSumsK / Unpack::kGroup, i, offsets);
        }
        make_weights<Unpack>(codes[i], in_codes, chunk_k / Unpack::kGroup, i, weights[c % 3]);
      }
    }
    // One behind: what was just stored is not read at once, and the tile unit works while the next chunk is made.
    if (c > 0) {
      const size_t chunk = static_cast<size_t>(k_begin / kChunkK + c - 1);
      multiplier.multiply(weights[(c - 1) % 3], activations + chunk * kChunkBytes,
                          activations + layout.factors + chunk * kFactorBytes);
    }
  }
  multiplier.finish();
  if constexpr (Unpack::kHasMin) {
    constexpr int kTileOffsetK = 32 * Unpack::kGroup;
    const uint8_t* a = activations + (Unpack::kGroup == 32 ? layout.sums : layout.half_sums);
    for (int i = 0; i < kSumsK / kTileOffsetK; ++i) {
      const int tile_k = k_begin / kSumsK * kSumsK + i * kTileOffsetK;
      if (tile_k >= k_end) break;
      multiply_offsets(offsets.tiles[i], a + static_cast<size_t>(tile_k / kTileOffsetK) * kTileBytes, p.group_bytes,
                       num_tokens, sums);
    }
  }
}

template <class Unpack, bool kPrecise>
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
      multiply_part<Unpack, kPrecise>(p, panels, activations, num_tokens, k, k_end, sums);
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
    if (p.precise || num_tokens <= kPrecisePlanesTokens)
      tile_gemm_tokens<Unpack, true>(p, token, num_tokens);
    else
      tile_gemm_tokens<Unpack, false>(p, token, num_tokens);
  }
  _tile_release();
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
