// Weights of a panel as int8 tiles for the tile unit: [16 quads of k][16 rows][4], with one step for a row's 256 k.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/amx/making.h"
#include "kernels/amx/products.h"
#include "kernels/panel/gemm_int.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

static_assert(kMaxCodesK == kInt8ChunkK);
constexpr int kInt8Steps = kInt8ChunkK / kInt8TileK;  // tiles of a chunk

struct alignas(64) Int8Tiles {
  WeightTile tiles[kInt8Steps][2];  // [step][panel]
  float steps[2][kPanelRows];       // [panel]
};

// weight = step * int8, the step such that the largest that the row's scales and mins allow in 256 k fits: rounding to
// it is the error, once for a weight. A code times its scale, less its min, is computed in 16 bits of which 8 are a
// fraction, two codes of each of 16 rows in an instruction.
template <class Unpack>
struct Int8Maker {
  using Tiles = Int8Tiles;
  static constexpr int kSteps = kInt8Steps;
  static constexpr size_t kChunkBytes = size_t{kPanelRows} * Unpack::kBlockBytes * kMaxCodesK / Unpack::kBlock;
  // Of the largest weight in 256ths of a step: what rounding scale and min adds still fits 16 bits.
  static constexpr float kReach = 126.5f * 256;

  // Unsigned code that stands for 0, and how far codes go from it; without mins.
  static constexpr int kZero = Unpack::kSigned ? 128 : Unpack::kCenter;
  static constexpr int kReachOfCode = Unpack::kSigned                          ? 128
                                      : 2 * Unpack::kCenter > Unpack::kMaxCode ? Unpack::kCenter
                                                                               : Unpack::kMaxCode - Unpack::kCenter;

  Codes codes;
  Floats inverse;  // of the rows' steps, in 256ths
  int num_k;

  static inline Ints in_both_halves(Ints v) {
    return _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)));
  }
  static inline Ints to_256ths(Floats v, Floats inverse) { return _mm512_cvtps_epi32(multiply(v, inverse)); }

  // Of num_k weights, whole blocks: unpacks them, and finds the steps.
  KT_FORCE_INLINE void begin(const uint8_t* blocks, int num_k, Tiles& to, int panel) {
    this->num_k = num_k;
    unpack_chunk<Unpack>(blocks, num_k, codes);
    Floats largest = splat_float(0x1p-100f);
    __mmask16 finite = 0xffff;
    for (int g = 0; g < num_k / Unpack::kGroup; ++g) {
      const Floats scale = load_floats(codes.scales[g]);
      Floats magnitude = _mm512_abs_ps(multiply(scale, splat_float(kReachOfCode)));
      if constexpr (Unpack::kHasMin) {
        const Floats min = load_floats(codes.mins[g]);
        magnitude = _mm512_max_ps(_mm512_abs_ps(min),
                                  _mm512_abs_ps(_mm512_fmsub_ps(scale, splat_float(Unpack::kMaxCode), min)));
      }
      finite &= _mm512_cmp_ps_mask(magnitude, splat_float(0x1p120f), _CMP_LT_OQ);
      largest = _mm512_max_ps(largest, magnitude);
    }
    inverse = _mm512_div_ps(splat_float(kReach), largest);
    store_floats(to.steps[panel], _mm512_mask_mov_ps(splat_float(__builtin_nanf("")), finite,
                                                     multiply(largest, splat_float(1 / (kReach / 256)))));
  }

  // The weights of a part, to its half of a tile.
  KT_FORCE_INLINE void make(int part, Tiles& to, int panel) {
    constexpr int kQuads = Unpack::kGroup / 4, kGroups = kPartK / Unpack::kGroup;
    uint8_t* row = to.tiles[part / 2][panel] + part % 2 * (kTileBytes / 2);
    for (int g = part * kGroups; g < (part + 1) * kGroups; ++g) {
      const Ints scale = in_both_halves(to_256ths(load_floats(codes.scales[g]), inverse));
      const Ints min = Unpack::kHasMin ? in_both_halves(to_256ths(load_floats(codes.mins[g]), inverse))
                                       : _mm512_mullo_epi16(scale, splat(0x00010001 * kZero));
      const Ints offset = _mm512_sub_epi16(min, splat(0x00800080));  // half a step, to round
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q, row += kTileRowBytes) {
        Ints quads = load(codes.quads[g * kQuads + q]);
        if constexpr (Unpack::kSigned) quads = bit_xor(quads, splat(0x80808080));
        const Ints even = _mm512_mullo_epi16(bit_and(quads, splat(0x00ff00ff)), scale);
        const Ints odd = _mm512_mullo_epi16(_mm512_srli_epi16(quads, 8), scale);
        store(row, _mm512_ternarylogic_epi32(_mm512_srli_epi16(_mm512_sub_epi16(even, offset), 8),
                                             _mm512_sub_epi16(odd, offset), splat(0xff00ff00), 0xf8));
      }
    }
  }

  // 0 where the chunk ends in the middle of a tile.
  inline void fill_last_tile(Tiles& to, int panel) {
    if (num_k % kInt8TileK != 0) std::memset(to.tiles[num_k / kInt8TileK][panel] + kTileBytes / 2, 0, kTileBytes / 2);
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
