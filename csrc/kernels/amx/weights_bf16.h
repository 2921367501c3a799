// Weights of a panel as bfloat16 tiles for the tile unit: [16 pairs of k][16 rows][2], see activations.h for the pairs.
#pragma once

#include <immintrin.h>

#include "kernels/amx/making.h"
#include "kernels/amx/products.h"
#include "kernels/panel/gemm_float.h"
#include "kernels/panel/gemm_int.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kStepK = 32;                   // of a tile
constexpr int kSteps = kMaxCodesK / kStepK;  // of a chunk
static_assert(kStepK == kPartK);

struct alignas(64) Bf16Tiles {
  WeightTile tiles[kSteps][2];  // [step][panel]
};

// Quantised types, by 16-bit arithmetic: two codes of each of 16 rows in an instruction.
//
// A code in the low bits of a float16 is code * 2^-24, a subnormal number, which AVX512-FP16 computes with at full
// speed: one FMA makes it a weight, with scale and min relative to the row's largest of 256 k. Halves become bfloat16
// by moving the bits and adding to the exponent that largest scale's. Mantissas are cut, not rounded, which kMeanCut
// makes up for on average; results that are subnormal come out wrong, by at most about 2^-12 of the row's largest
// weight of the 256 (2^-10 for types whose codes use less of a byte, such as Q2_K).
template <class Unpack>
struct Bf16Maker {
  using Tiles = Bf16Tiles;
  static constexpr int kSteps = kt::KT_ISA_NAMESPACE::kSteps;
  // Codes are moved up in their bytes as far as they go: that much more range for the exponents of the results.
  static constexpr int kSpareBits = Unpack::kSigned || Unpack::kMaxCode > 127 ? 0
                                    : Unpack::kMaxCode > 63                   ? 1
                                    : Unpack::kMaxCode > 31                   ? 2
                                    : Unpack::kMaxCode > 15                   ? 3
                                                                              : 4;
  // Weights are made relative to a power of two near the largest scale, times this: scales for codes of 2^-24 then stay
  // below 2^15, half of what float16 can hold.
  static constexpr float kUnit = 1.0f / (1 << (10 - kSpareBits));
  // 7 bits after the leading one are kept, of 10: half a unit of the last place is lost on average, relative to values
  // whose leading digits are evenly distributed by their logarithm.
  static constexpr float kMeanCut = 1 + 0x1p-8f * 0.70f;

  static constexpr size_t kChunkBytes = size_t{kPanelRows} * Unpack::kBlockBytes * kMaxCodesK / Unpack::kBlock;

  Codes codes;
  Floats to_scale, to_min;
  Ints rebias;  // of exponents: from those of float16, relative to the row's largest

  static inline __m512h to_pairs(Floats v) {  // as float16, twice in each lane
    const Ints half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return reinterpret_cast<__m512h>(bit_or(half, shift_left<16>(half)));
  }

  // Of num_k weights, whole blocks: unpacks them, and finds the largest scales.
  KT_FORCE_INLINE void begin(const uint8_t* blocks, int num_k, Tiles&, int) {
    unpack_chunk<Unpack>(blocks, num_k, codes);
    Floats largest = splat_float(0x1p-110f);
    __mmask16 finite = 0xffff;
    const auto take = [&](Floats magnitude) {
      finite &= _mm512_cmp_ps_mask(magnitude, splat_float(__builtin_inff()), _CMP_LT_OQ);
      largest = _mm512_max_ps(largest, magnitude);
    };
    for (int g = 0; g < num_k / Unpack::kGroup; ++g) {
      take(_mm512_abs_ps(load_floats(codes.scales[g])));
      if constexpr (Unpack::kHasMin) take(multiply(_mm512_abs_ps(load_floats(codes.mins[g])), splat_float(0x1p-7f)));
    }
    largest = _mm512_min_ps(largest, splat_float(0x1p110f));
    const Ints exponent = bit_and(as_ints(largest), splat(0x7f800000));
    const Floats inverse = as_floats(_mm512_sub_epi32(splat(0x7f000000), exponent));
    to_scale = multiply(inverse, splat_float(kMeanCut * kUnit * (1 << (24 - kSpareBits))));
    to_min = multiply(inverse, splat_float(-kMeanCut * kUnit));
    // Biases of exponents: 127 of the power and of the results, 15 of float16.
    const Ints low = _mm512_sub_epi32(shift_right<16>(exponent), splat((5 + kSpareBits) << 7));
    // Where a scale is none, what must come out as none does so with the largest exponent.
    rebias = _mm512_mask_mov_epi32(splat(0x70007000), finite, bit_or(low, shift_left<16>(low)));
  }

  // A part is a tile: nothing to fill.
  inline void fill_last_tile(Tiles&, int) {}

  // The weights of a part, to its tile.
  KT_FORCE_INLINE void make(int part, Tiles& to, int panel) {
    constexpr int kQuads = Unpack::kGroup / 4, kGroups = kPartK / Unpack::kGroup;
    const Ints bias = rebias;
    const auto to_bf16 = [&](__m512h v) {
      return _mm512_add_epi16(bit_and(_mm512_srai_epi16(reinterpret_cast<__m512i>(v), 3), splat(0x8fff8fff)), bias);
    };
    uint8_t* row = to.tiles[part][panel];
    for (int g = part * kGroups; g < (part + 1) * kGroups; ++g) {
      const Floats group_scale = load_floats(codes.scales[g]);
      const Floats group_min = Unpack::kHasMin
                                   ? load_floats(codes.mins[g])
                                   : multiply(group_scale, splat_float(Unpack::kSigned ? 128 : Unpack::kCenter));
      const __m512h scale = to_pairs(multiply(group_scale, to_scale)), min = to_pairs(multiply(group_min, to_min));
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q, row += 2 * kTileRowBytes) {
        Ints quads = load(codes.quads[g * kQuads + q]);
        if constexpr (Unpack::kSigned) quads = bit_xor(quads, splat(0x80808080));
        if constexpr (kSpareBits > 0) quads = shift_left<kSpareBits>(quads);
        const auto even = reinterpret_cast<__m512h>(bit_and(quads, splat(0x00ff00ff)));
        const auto odd = reinterpret_cast<__m512h>(_mm512_srli_epi16(quads, 8));
        store(row, to_bf16(_mm512_fmadd_ph(even, scale, min)));
        store(row + kTileRowBytes, to_bf16(_mm512_fmadd_ph(odd, scale, min)));
      }
    }
  }
};

// Float types.
template <class Weights>
struct FloatMaker {
  using Tiles = Bf16Tiles;
  static constexpr int kSteps = kt::KT_ISA_NAMESPACE::kSteps;
  static constexpr size_t kChunkBytes = size_t{kPanelRows} * Weights::kBytes * kMaxCodesK;

  static inline Ints pairs(Floats first, Floats second) {  // rounded to nearest even
    const Ints interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleave, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  }

  const uint8_t* blocks;

  KT_FORCE_INLINE void begin(const uint8_t* blocks, int, Tiles&, int) { this->blocks = blocks; }

  inline void fill_last_tile(Tiles&, int) {}

  KT_FORCE_INLINE void make(int part, Tiles& to, int panel) {
    constexpr size_t kStep = size_t{kPanelRows} * Weights::kBytes;
    const uint8_t* rows = blocks + static_cast<size_t>(part) * kPartK * kStep;
    uint8_t* row = to.tiles[part][panel];
    for (int quad = 0; quad < kPartK / 4; ++quad, rows += 4 * kStep, row += 2 * kTileRowBytes) {
      store(row, pairs(Weights::load_rows(rows), Weights::load_rows(rows + 2 * kStep)));
      store(row + kTileRowBytes, pairs(Weights::load_rows(rows + kStep), Weights::load_rows(rows + 3 * kStep)));
    }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
