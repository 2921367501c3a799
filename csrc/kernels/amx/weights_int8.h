// Weights of a panel as int8 tiles for the tile unit: [16 quads of k][16 rows][4], with one step for a row's 256 k.
#pragma once

#include <immintrin.h>

#include "kernels/amx/products.h"
#include "kernels/panel/gemm_int.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

static_assert(kMaxCodesK == kInt8ChunkK);
constexpr int kInt8Steps = kInt8ChunkK / kInt8TileK;  // tiles of a chunk
using Int8Tiles = WeightTile[kInt8Steps][2];          // [step][panel]
using WeightSteps = float[2][kPanelRows];             // of a chunk, [panel]

// weight = step * int8, the step such that the largest that the row's scales and mins allow in 256 k fits: rounding to
// it is the error, once for a weight. A code times its scale, less its min, is computed in 16 bits of which 8 are a
// fraction, two codes of each of 16 rows in an instruction.
template <class Unpack>
struct Int8Maker {
  static constexpr size_t kChunkBytes = size_t{kPanelRows} * Unpack::kBlockBytes * kMaxCodesK / Unpack::kBlock;
  // Of the largest weight in 256ths of a step: what rounding scale and min adds still fits 16 bits.
  static constexpr float kReach = 126.5f * 256;

  // Unsigned code that stands for 0, and how far codes go from it; without mins.
  static constexpr int kZero = Unpack::kSigned ? 128 : Unpack::kCenter;
  static constexpr int kReachOfCode = Unpack::kSigned                          ? 128
                                      : 2 * Unpack::kCenter > Unpack::kMaxCode ? Unpack::kCenter
                                                                               : Unpack::kMaxCode - Unpack::kCenter;

  Codes codes;

  static inline Ints in_both_halves(Ints v) {
    return _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)));
  }
  static inline Ints to_256ths(Floats v, Floats inverse) { return _mm512_cvtps_epi32(multiply(v, inverse)); }

  // num_k weights from k on, whole blocks, to tiles[..][which]; the rest of the last tile is 0.
  inline void make(const uint8_t* panel, int k, int num_k, Int8Tiles& tiles, int which, WeightSteps& steps) {
    unpack_chunk<Unpack>(panel + static_cast<size_t>(k / Unpack::kBlock) * kPanelRows * Unpack::kBlockBytes, num_k,
                         codes);
    const int num_groups = num_k / Unpack::kGroup;
    Floats largest = splat_float(0x1p-100f);
    __mmask16 finite = 0xffff;
    for (int g = 0; g < num_groups; ++g) {
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
    const Floats inverse = _mm512_div_ps(splat_float(kReach), largest);
    store_floats(steps[which], _mm512_mask_mov_ps(splat_float(__builtin_nanf("")), finite,
                                                  multiply(largest, splat_float(1 / (kReach / 256)))));
    constexpr int kQuads = Unpack::kGroup / 4;
    for (int g = 0; g < num_groups; ++g) {
      const Ints scale = in_both_halves(to_256ths(load_floats(codes.scales[g]), inverse));
      const Ints min = Unpack::kHasMin ? in_both_halves(to_256ths(load_floats(codes.mins[g]), inverse))
                                       : _mm512_mullo_epi16(scale, splat(0x00010001 * kZero));
      const Ints offset = _mm512_sub_epi16(min, splat(0x00800080));  // half a step, to round
      uint8_t* to = tiles[g * kQuads / 16][which] + g * kQuads % 16 * kTileRowBytes;
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q, to += kTileRowBytes) {
        Ints quads = load(codes.quads[g * kQuads + q]);
        if constexpr (Unpack::kSigned) quads = bit_xor(quads, splat(0x80808080));
        const Ints even = _mm512_mullo_epi16(bit_and(quads, splat(0x00ff00ff)), scale);
        const Ints odd = _mm512_mullo_epi16(_mm512_srli_epi16(quads, 8), scale);
        store(to, _mm512_ternarylogic_epi32(_mm512_srli_epi16(_mm512_sub_epi16(even, offset), 8),
                                            _mm512_sub_epi16(odd, offset), splat(0xff00ff00), 0xf8));
      }
    }
    for (int quad = num_groups * kQuads; quad % 16 != 0; ++quad)
      store(tiles[quad / 16][which] + quad % 16 * kTileRowBytes, zero_ints());
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
