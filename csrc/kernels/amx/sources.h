// Weights of a panel as bfloat16 tiles: [k / 2][16 rows][2], what TDPBF16PS takes as its second operand.
#pragma once

#include "kernels/amx/tile_gemm.h"
#include "kernels/panel/gemm_float.h"
#include "kernels/panel/gemm_int.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Cutting a float32 to its upper 16 bits loses 2^-8 of its power of two on average, a relative 2^-8 / (2 ln 2) for
// mantissas as numbers have them. Weights are made larger by that first: the mean error is then 0 and its spread that
// of rounding to nearest, for two instructions less a vector.
constexpr float kBeforeCut = 1 + 0x1p-8f * 0.72135f;

// Two vectors of float32 to 16 pairs of bfloat16, cut.
inline Ints cut_to_pairs(Floats even, Floats odd) {
  return _mm512_ternarylogic_epi32(as_ints(odd), shift_right<16>(as_ints(even)), splat(0xffff0000), 0xe4);  // c ? a : b
}

// The same, rounded to nearest even.
inline Ints round_to_pairs(Floats even, Floats odd) {
  const Ints low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
  const Ints high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
  return bit_or(low, shift_left<16>(high));
}

// weight = scale * code - min for four codes a lane. A code becomes a float by standing in the mantissa of a larger
// power of two: codes up to 127 in its top 7 bits, of 2^23 (so it weighs 2^16), larger ones from bit 8 on, which is
// less exact: the power of two is taken away again by the min, in float32.
template <class Unpack>
struct CodesToFloats {
  static constexpr bool kWide = Unpack::kMaxCode > 127;
  static constexpr int kAt = kWide ? 8 : 16;  // bit of the mantissa where a code stands
  Floats scale, offset;                       // weight = scale * (2^23 + code * 2^kAt) + offset

  inline CodesToFloats(const Codes& codes, int group) {
    const Floats s = load_floats(codes.scales[group]);
    scale = multiply(s, splat_float(kBeforeCut / (1 << kAt)));
    // 2^23 in units of the code, and 128 more for signed codes, which are made unsigned by it.
    const float base = static_cast<float>(1 << (23 - kAt)) + (Unpack::kSigned ? 128 : 0);
    offset = multiply(s, splat_float(-base * kBeforeCut));
    if constexpr (!Unpack::kSigned)
      offset = negative_multiply_add(load_floats(codes.mins[group]), splat_float(kBeforeCut), offset);
  }

  template <int shift>  // of the code's byte to kAt; negative: to the right
  inline Floats convert(Ints quads) const {
    Ints moved = quads;
    if constexpr (shift > 0) moved = shift_left<shift>(quads);
    if constexpr (shift < 0) moved = shift_right<-shift>(quads);
    const Ints mantissa = _mm512_ternarylogic_epi32(moved, splat(kWide ? 0xff00 : 0x7f0000), splat(0x4b000000), 0xea);
    return multiply_add(as_floats(mantissa), scale, offset);  // 0xea: (a and b) or c
  }

  inline void store_quad(Ints quads, uint8_t* tile_rows) const {
    if constexpr (Unpack::kSigned) quads = bit_xor(quads, splat(0x80808080));
    store(tile_rows, cut_to_pairs(convert<kAt>(quads), convert<kAt - 8>(quads)));
    store(tile_rows + kRowBytes, cut_to_pairs(convert<kAt - 16>(quads), convert<kAt - 24>(quads)));
  }
};

template <class Unpack>
struct IntSource {
  static inline void make(const uint8_t* panel, int k, int num_k, WeightTiles& tiles, int which) {
    alignas(64) Codes codes;
    unpack_chunk<Unpack>(panel + static_cast<size_t>(k / Unpack::kBlock) * kPanelRows * Unpack::kBlockBytes, num_k,
                         codes);
    constexpr int kQuads = Unpack::kGroup / 4;  // of a group
    for (int i = 0; i < num_k / Unpack::kGroup; ++i) {
      const CodesToFloats<Unpack> to_floats(codes, i);
      uint8_t* tile = tiles[0][which] + static_cast<size_t>(i * kQuads / 8) * sizeof(tiles[0]);
      for (int q = 0; q < kQuads; ++q)
        to_floats.store_quad(load(codes.quads[i * kQuads + q]), tile + (i * kQuads + q) % 8 * 2 * kRowBytes);
    }
  }
};

template <class Weights>
struct FloatSource {
  static inline void make(const uint8_t* panel, int k, int num_k, WeightTiles& tiles, int which) {
    constexpr size_t kStep = size_t{kPanelRows} * Weights::kBytes;
    const uint8_t* rows = panel + static_cast<size_t>(k) * kStep;
    for (int i = 0; i < num_k / 2; ++i, rows += 2 * kStep) {
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(rows) + kPrefetchBytes), _MM_HINT_T0);
      uint8_t* tile = tiles[i / 16][which];
      store(tile + i % 16 * kRowBytes, round_to_pairs(Weights::load_rows(rows), Weights::load_rows(rows + kStep)));
    }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
