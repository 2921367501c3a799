// 16 rows of a panel, a row a lane.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/panel/eight_words.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = 16;
#ifdef __AVX512VNNI__
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints splat(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
inline Ints splat_at(const void* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
template <int n>
inline Ints shift_right(Ints v) {
  return _mm512_srli_epi32(v, n);
}
template <int n>
inline Ints shift_right_signed(Ints v) {
  return _mm512_srai_epi32(v, n);
}
template <int n>
inline Ints shift_left(Ints v) {
  return _mm512_slli_epi32(v, n);
}
inline Ints add_bytes(Ints a, Ints b) { return _mm512_add_epi8(a, b); }
inline Ints sub_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
// table: [16] bytes; each byte of indices is 0..15
inline Ints look_up(const void* table, Ints indices) {
  const __m128i t = _mm_loadu_si128(static_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), indices);
}
inline Ints zero_extend_bytes(const uint8_t* p) {  // [kLanes] bytes
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints zero_extend_halves(const uint8_t* p) {  // [kLanes] 16-bit
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// gather_32: words[index], index in each lane. gather_64: the low and the high half of each word.
struct IntPair {
  Ints low, high;
};
#if defined(__AMX_TILE__)
// On the CPUs that have AMX, gathers take half the time of loads. On others with AVX-512 they take longer: a quarter
// and more on AMD's, and on Intel's the microcode holds them back (advisory INTEL-SA-00828).
inline Ints gather_32(const uint32_t* words, Ints index) { return _mm512_i32gather_epi32(index, words, 4); }
inline IntPair gather_64(const uint64_t* words, Ints index) {
  const Ints a = _mm512_i32gather_epi64(_mm512_castsi512_si256(index), words, 8);
  const Ints b = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(index, 1), words, 8);
  const Ints even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Ints odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)};
}
#else
inline Ints gather_32(const uint32_t* words, Ints index) {
  alignas(64) uint64_t indices[8];
  store(indices, index);
  const __m256i low = eight_words(words, indices), high = eight_words(words, indices + 4);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// Four rows of each eight go together so that the last shuffles, which work within 128 bits, leave all in order.
inline IntPair gather_64(const uint64_t* words, Ints index) {
  alignas(64) uint64_t indices[8];
  store(indices, index);
  const auto half_of = [&](int i) {
    const __m256 low = four_words(words, indices[i], indices[i + 2]);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), four_words(words, indices[i + 4], indices[i + 6]), 1);
  };
  const Floats a = half_of(0), b = half_of(1);
  return {_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd))};
}
#endif
inline Ints spread_byte_0(Ints v) {  // the lowest byte of each lane to all four
  const __m128i from = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(from));
}
// a + b, in bytes where bits and mask have a bit in common a - b
inline Ints add_or_sub_bytes(Ints a, Ints b, Ints bits, Ints mask) {
  return _mm512_mask_sub_epi8(_mm512_add_epi8(a, b), _mm512_test_epi8_mask(bits, mask), a, b);
}

inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats splat_float(float v) { return _mm512_set1_ps(v); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
inline Floats load_f16(const uint8_t* p) {  // [kLanes] float16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats f16_to_floats(Ints v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }  // bits in each lane
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }            // a b + c
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }       // a b - c
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b

#ifdef __AVX512VNNI__
// sums + for each lane the products of 4 unsigned codes and 4 signed activations
inline Ints dot(Ints sums, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sums, codes, x); }
#endif
inline Ints dot_pairs(Ints codes, Ints x) { return _mm512_maddubs_epi16(codes, x); }  // saturates past int16
// A sum that is taken here and now: given free hand, GCC makes trees of such sums, and spills all their leaves.
inline Ints add_halves(Ints a, Ints b) {
  Ints sum = _mm512_add_epi16(a, b);
  asm("" : "+v"(sum));
  return sum;
}
inline Ints sum_pairs(Ints halves) { return _mm512_madd_epi16(halves, _mm512_set1_epi16(1)); }
inline Ints magnitudes(Ints v) { return _mm512_abs_epi8(v); }
// x with the sign of v, byte by byte (v is not 0 where it matters: a magnitude of 0 takes the product away)
inline Ints with_sign_of(Ints x, Ints v) {
  return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(v), _mm512_setzero_si512(), x);
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
