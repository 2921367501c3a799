// Codes of a panel as int8 tiles for the tile unit.
#pragma once

#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/panel/gemm_int.h"
#include "kernels/panel/unpack_k.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Two ways to make the weights of a chunk (128 or 256 of a row) into int8 with one step.
//
// kRounded, any type: a 16-bit multiplication a code, rounded to 8 bits. kExact, types whose scales are small integers:
// scale = 8 * high + low makes two planes, code * low and code * high, and each is a multiplication of two codes at once,
// for no product reaches 256. Cheaper to make and exact, but the tile unit has twice the work: for few tokens.
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
  // Unsigned codes are moved before the centre is taken away.
  static_assert(Unpack::kSigned || Unpack::kMaxCode <= 2 * Unpack::kCenter);
  return shift;
}

// k that share a step. Types with mins have their offsets apart, so their rounded part is small beside the weights and
// may share one step in 256; others get as good with 128.
template <class Unpack>
constexpr int kChunkOf = Unpack::kHasMin ? 256 : 128;

// [64 k][panel when rounded; plane (low, high) when exact]: [k / 4][16 rows][4]. Up to 256 k.
using WeightTiles = uint8_t[4][2][kTileBytes];
using WeightSteps = float[2][kPanelRows];  // [panel][row]; exact: [0] only

// For each 32 groups of a panel: the negative of min - center * scale as the sum of two bfloat16, 16 bits in all, each
// [group / 2][16 rows][2]. For 1024 k.
struct alignas(64) OffsetTiles {
  uint8_t upper[2][2][kTileBytes];  // [32 groups][panel]
  uint8_t lower[2][2][kTileBytes];
};

template <class Unpack>
inline Ints centred(Ints quads) {  // int8, kCenter at 0, times 2^code_shift
  constexpr int kShift = code_shift<Unpack>();
  if constexpr (Unpack::kSigned) return quads;
  return sub_bytes(shift_left<kShift>(quads), splat(0x01010101u * ((Unpack::kCenter << kShift) & 0xff)));
}

// Products of 16 bits have the weight in the upper byte. Codes that reach less than 3/4 of int8 are doubled there.
template <class Unpack>
constexpr bool doubles() {
  return (reach<Unpack>() << code_shift<Unpack>()) <= 96;
}

// A 16-bit factor for each group, in both halves of the row's lane: its scale relative to the largest.
// steps: what the weights made with them are in.
template <class Unpack, int kMaxGroups>
inline void make_factors(const Codes& codes, int first_group, int num_groups, Ints (&factors)[kMaxGroups],
                         float* steps) {
  // int8 = code * 2^shift * factor / 2^15, twice that if doubled; 127 at most.
  constexpr float kUnit = static_cast<float>(1 << code_shift<Unpack>());
  constexpr float kLargestFactor = doubles<Unpack>() ? 32767 * 127 / (2 * kUnit * reach<Unpack>()) : 32767;
  Floats largest = splat_float(0x1p-120f);  // so that its inverse is finite
  for (int g = 0; g < num_groups; ++g)
    largest = _mm512_max_ps(_mm512_abs_ps(load_floats(codes.scales[first_group + g])), largest);
  const Floats to_factor = _mm512_div_ps(splat_float(kLargestFactor), largest);
  store_floats(steps, multiply(largest, splat_float(32768 / (kLargestFactor * kUnit * (doubles<Unpack>() ? 2 : 1)))));
  const Ints twice = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
  for (int g = 0; g < num_groups; ++g)
    factors[g] =
        _mm512_shuffle_epi8(_mm512_cvtps_epi32(multiply(load_floats(codes.scales[first_group + g]), to_factor)), twice);
}

// even, odd: codes * 256 of bytes 0 and 2, and 1 and 3, of each lane -> the four rounded weights.
template <class Unpack>
inline Ints round_weights(Ints even, Ints odd, Ints factor) {
  const auto product = [&](Ints code) {
    Ints p = _mm512_mulhrs_epi16(code, factor);
    if (doubles<Unpack>()) p = _mm512_adds_epi16(p, p);
    return _mm512_adds_epi16(p, _mm512_set1_epi16(128));  // to nearest; saturating: -128 times a negative factor
  };
  // A shuffle, where a shift would do: the port of shifts is busy with multiplications.
  const Ints high_to_low =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15, -1));
  const Ints low_bytes = _mm512_shuffle_epi8(product(even), high_to_low);
  return _mm512_ternarylogic_epi32(product(odd), splat(0xff00ff00), low_bytes, 0xea);  // a & b | c
}

inline void store_weights(WeightTiles& tiles, unsigned quad, int which, Ints quads) {  // quad: of the chunk's 64
  store(tiles[quad / 16][which] + quad % 16 * kTileRowBytes, quads);
}

// Makes the weights of one panel, a chunk at a time. Leaves the scales and mins in codes.
template <class Unpack, Planes planes>
struct Maker {
  Codes codes;

  // panel_row: where the panel begins. The chunk of num_k <= kChunkOf<Unpack> weights from k on; the chunks of a block
  // in ascending order. panel: 0 or 1 of those in tiles and steps.
  inline void make(const uint8_t* panel_row, int k, int num_k, int panel, WeightTiles& tiles, WeightSteps& steps) {
    constexpr int kQuads = Unpack::kGroup / 4;
    const int in_block = k % Unpack::kBlock;  // a chunk may be half a block
    const size_t block = static_cast<size_t>(k / Unpack::kBlock) * kPanelRows * Unpack::kBlockBytes;
    if (in_block == 0) unpack_chunk<Unpack>(panel_row + block, num_k < Unpack::kBlock ? Unpack::kBlock : num_k, codes);
    const int first_group = in_block / Unpack::kGroup, num_groups = num_k / Unpack::kGroup;
    Ints factors[kChunkOf<Unpack> / Unpack::kGroup];
    make_factors<Unpack>(codes, first_group, num_groups, factors, steps[panel]);
    const Ints low_to_high =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14));
    for (int g = 0; g < num_groups; ++g)
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) {
        const Ints quads = centred<Unpack>(load(codes.quads[(first_group + g) * kQuads + q]));
        const Ints even = _mm512_shuffle_epi8(quads, low_to_high), odd = bit_and(quads, splat(0xff00ff00));
        store_weights(tiles, g * kQuads + q, panel, round_weights<Unpack>(even, odd, factors[g]));
      }
    for (int quad = num_groups * kQuads; quad < kChunkOf<Unpack> / 4; ++quad)  // past the end of a row
      store_weights(tiles, quad, panel, zero_ints());
  }
};

// Offsets of num_groups (even) groups of the codes, the first being group `group` of the two tiles.
// center: what the codes are taken relative to.
inline void make_offsets(const Codes& codes, int center, int num_groups, int group, int panel, OffsetTiles& offsets) {
  const Floats center_code = splat_float(static_cast<float>(center));
  const auto offset = [&](int g) {
    return _mm512_fmsub_ps(load_floats(codes.scales[g]), center_code, load_floats(codes.mins[g]));
  };
  const auto to_bf16 = [](Floats v) { return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))); };
  for (int g = 0; g < num_groups; g += 2, group += 2) {
    const Floats even = offset(g), odd = offset(g + 1);
    const Ints even_upper = to_bf16(even), odd_upper = shift_left<16>(to_bf16(odd));
    const Floats even_rest = _mm512_sub_ps(even, as_floats(shift_left<16>(even_upper)));
    const Floats odd_rest = _mm512_sub_ps(odd, as_floats(odd_upper));
    const size_t at = static_cast<size_t>(group % 32 / 2) * kTileRowBytes;
    store(offsets.upper[group / 32][panel] + at, bit_or(even_upper, odd_upper));
    store(offsets.lower[group / 32][panel] + at, bit_or(to_bf16(even_rest), shift_left<16>(to_bf16(odd_rest))));
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

inline void store_planes(WeightTiles& tiles, int quad, Ints codes, Ints low, Ints high) {
  store_weights(tiles, quad, 0, _mm512_mullo_epi16(codes, low));
  store_weights(tiles, quad, 1, _mm512_mullo_epi16(codes, high));
}

inline Ints low_scale(Ints scale) { return bit_and(scale, splat(0x00070007)); }
inline Ints high_scale(Ints scale) { return _mm512_srli_epi16(scale, 3); }

// One line, spread over the work: many at once fill the buffers that wait for memory, and everything stalls. May lie
// past the end of the tensor.
inline void prefetch_line(const uint8_t* used_now) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(used_now) + kPrefetchBytes), _MM_HINT_T0);
}

inline void prefetch_k4_scales(const uint8_t* block) {
  for (int offset = 0; offset < 16 * kPanelRows; offset += 64) prefetch_line(block + offset);
}

template <>
struct Maker<UnpackQ5_K, Planes::kExact> {
  Codes codes;

  inline void make(const uint8_t* panel_row, int k, int num_k, int, WeightTiles& tiles, WeightSteps& steps) {
    const uint8_t* block = panel_row + static_cast<size_t>(k / 256) * kPanelRows * UnpackQ5_K::kBlockBytes;
    unpack_chunk<UnpackQ5_K>(block, num_k, codes);
    IntegerScales scales;
    load_integer_scales(block, scales);
    store_floats(steps[0], scales.d);
    for (int g = 0; g < 8; ++g) {
      const Ints low = low_scale(scales.scales[g]), high = high_scale(scales.scales[g]);
      for (int q = 0; q < 8; ++q) store_planes(tiles, 8 * g + q, load(codes.quads[8 * g + q]), low, high);
    }
  }
};

// Q4_K, the type most files are made of, straight from its nibbles.
template <>
struct Maker<UnpackQ4_K, Planes::kExact> {
  Codes codes;  // scales and mins only

  inline void make(const uint8_t* panel_row, int k, int, int, WeightTiles& tiles, WeightSteps& steps) {
    const uint8_t* block = panel_row + static_cast<size_t>(k / 256) * kPanelRows * UnpackQ4_K::kBlockBytes;
    prefetch_k4_scales(block);
    store_scales_k4(codes, block, 0);
    IntegerScales scales;
    load_integer_scales(block, scales);
    store_floats(steps[0], scales.d);
    for (int i = 0; i < 4; ++i) {  // 64 k: a group of low nibbles, a group of high ones
      const Ints low_1 = low_scale(scales.scales[2 * i]), high_1 = high_scale(scales.scales[2 * i]);
      const Ints low_2 = low_scale(scales.scales[2 * i + 1]), high_2 = high_scale(scales.scales[2 * i + 1]);
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) {
        const uint8_t* at = unit(block, 16, 8 * i + m, 0);
        prefetch_line(at);
        const Ints nibbles = load(at);
        store_planes(tiles, 16 * i + m, low_nibbles(nibbles), low_1, high_1);
        store_planes(tiles, 16 * i + 8 + m, high_nibbles(nibbles), low_2, high_2);
      }
    }
  }
};

template <>
struct Maker<UnpackQ4_K, Planes::kRounded> {
  Codes codes;  // scales and mins only

  inline void make(const uint8_t* panel_row, int k, int, int panel, WeightTiles& tiles, WeightSteps& steps) {
    const uint8_t* block = panel_row + static_cast<size_t>(k / 256) * kPanelRows * UnpackQ4_K::kBlockBytes;
    prefetch_k4_scales(block);
    store_scales_k4(codes, block, 0);
    Ints factors[8];
    make_factors<UnpackQ4_K>(codes, 0, 8, factors, steps[panel]);
    const Ints top = splat(0xf000f000), middle = splat(0x80008000);
    // Each of the four nibbles of 16 bits to the top; less 8, as flipping the sign does.
    const auto centred_at_top = [&](Ints shifted) { return _mm512_ternarylogic_epi32(shifted, top, middle, 0x6a); };
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) {
        const uint8_t* at = unit(block, 16, 8 * i + m, 0);
        prefetch_line(at);
        const Ints n = load(at);
        store_weights(tiles, 16 * i + m, panel,
                      round_weights<UnpackQ4_K>(bit_xor(_mm512_slli_epi16(n, 12), middle),
                                                centred_at_top(_mm512_slli_epi16(n, 4)), factors[2 * i]));
        store_weights(
            tiles, 16 * i + 8 + m, panel,
            round_weights<UnpackQ4_K>(centred_at_top(_mm512_slli_epi16(n, 8)), centred_at_top(n), factors[2 * i + 1]));
      }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
