// Codes of a panel as int8 tiles for the tile unit.
#pragma once

#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/panel/gemm_int.h"
#include "kernels/panel/unpack_k.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Two ways to make 128 weights of a row into int8 with one step.
//
// kRounded, any type: a 16-bit multiplication a code, weight = step * (int8 + 1/2 +- 1/2). The half is added later,
// through the sum of the activations. kExact, types whose scales are small integers: scale = 8 * high + low makes two
// planes, code * low and code * high, and each is a multiplication of two codes at once, for no product reaches 256.
// Cheaper to make and exact, but the tile unit has twice the work: for experts with few tokens.
enum class Planes { kRounded, kExact };

template <class Unpack>
constexpr bool kHasIntegerScales = false;
template <>
constexpr bool kHasIntegerScales<UnpackQ4_K> = true;
template <>
constexpr bool kHasIntegerScales<UnpackQ5_K> = true;

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

// 128 k: of two panels when rounded, of the two planes (low, high) of one panel when exact.
struct alignas(64) WeightChunk {
  uint8_t tiles[2][2][kTileBytes];  // [64 k][panel or plane]: [k / 4][16 rows][4]
  float steps[2][kPanelRows];       // [panel][row]
};

// For each 32 groups of a panel: the negative of min - center * scale, in bfloat16 [group / 2][16 rows][2]. 1024 k.
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
// center: what the codes are taken relative to.
inline void make_offsets(const Codes& codes, int center, int num_groups, int group, int panel, OffsetTiles& offsets) {
  const Floats center_code = splat_float(static_cast<float>(center));
  const auto offset = [&](int g) {
    return _mm512_fmsub_ps(load_floats(codes.scales[g]), center_code, load_floats(codes.mins[g]));
  };
  for (int g = 0; g < num_groups; g += 2, group += 2) {
    const Ints even = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(offset(g))));
    const Ints odd = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(offset(g + 1))));
    store(offsets.tiles[group / 32][panel] + group % 32 / 2 * kTileRowBytes, bit_or(even, shift_left<16>(odd)));
  }
}

// The integer scales of a Q4_K or Q5_K panel block, each in both halves of its row's lane, and what they are times.
struct IntegerScales {
  Ints scales[8];
  Floats d;
};

inline void load_integer_scales(const uint8_t* block, IntegerScales& out) {
  const ScaleBytesK4 bytes = scale_bytes_k4(block, 4, 0);
  const Ints places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
  for (int g = 0; g < 8; ++g)
    out.scales[g] = _mm512_shuffle_epi8(
        g % 4 == 0 ? bytes.scales[g / 4] : _mm512_srli_epi32(bytes.scales[g / 4], g % 4 * 8), places);
  out.d = load_f16(unit<2>(block, 0, 0, 0));
}

// Chunk `chunk` (0 or 1) of the codes of one panel as two planes.
inline void make_planes(const Codes& codes, const IntegerScales& scales, int chunk, WeightChunk& weights) {
  store_floats(weights.steps[0], scales.d);
  for (int g = 0; g < 4; ++g) {
    const Ints scale = scales.scales[4 * chunk + g];
    const Ints low = bit_and(scale, splat(0x00070007)), high = _mm512_srli_epi16(scale, 3);
    for (int q = 0; q < 8; ++q) {
      const Ints quads = load(codes.quads[32 * chunk + 8 * g + q]);
      uint8_t (&tiles)[2][kTileBytes] = weights.tiles[g / 2];
      store(tiles[0] + (g % 2 * 8 + q) * kTileRowBytes, _mm512_mullo_epi16(quads, low));
      store(tiles[1] + (g % 2 * 8 + q) * kTileRowBytes, _mm512_mullo_epi16(quads, high));
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
