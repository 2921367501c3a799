// 8 rows of a panel, a row a lane. The same names as in vec_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/panel/eight_words.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = 8;
#ifdef __AVXVNNI__
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Ints splat(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
inline Ints splat_at(const void* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm256_set1_epi32(v);
}
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
template <int n>
inline Ints shift_right(Ints v) {
  return _mm256_srli_epi32(v, n);
}
template <int n>
inline Ints shift_right_signed(Ints v) {
  return _mm256_srai_epi32(v, n);
}
template <int n>
inline Ints shift_left(Ints v) {
  return _mm256_slli_epi32(v, n);
}
inline Ints add_bytes(Ints a, Ints b) { return _mm256_add_epi8(a, b); }
inline Ints sub_bytes(Ints a, Ints b) { return _mm256_sub_epi8(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply_ints(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints look_up(const void* table, Ints indices) {
  const __m128i t = _mm_loadu_si128(static_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), indices);
}
inline Ints zero_extend_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Ints zero_extend_halves(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints gather_32(const uint32_t* words, Ints index) {
  alignas(32) uint64_t indices[4];
  store(indices, index);
  return eight_words(words, indices);
}

struct IntPair {
  Ints low, high;
};

// As in vec_avx512.h.
inline IntPair gather_64(const uint64_t* words, Ints index) {
  alignas(32) uint64_t indices[4];
  store(indices, index);
  const Floats a = four_words(words, indices[0], indices[2]), b = four_words(words, indices[1], indices[3]);
  return {_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd))};
}
inline Ints spread_byte_0(Ints v) {
  const __m128i from = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(from));
}
inline Ints add_or_sub_bytes(Ints a, Ints b, Ints bits, Ints mask) {  // mask: a single bit in each byte
  const Ints sub = _mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask);
  return _mm256_add_epi8(_mm256_xor_si256(b, sub), _mm256_sub_epi8(a, sub));  // -b is ~b + 1
}

inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Floats splat_float(float v) { return _mm256_set1_ps(v); }
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats as_floats(Ints v) { return _mm256_castsi256_ps(v); }
inline Ints as_ints(Floats v) { return _mm256_castps_si256(v); }
inline Floats load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats f16_to_floats(Ints v) {
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }  // a b - c
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

#ifdef __AVXVNNI__
inline Ints dot(Ints sums, Ints codes, Ints x) { return _mm256_dpbusd_avx_epi32(sums, codes, x); }
#endif
inline Ints dot_pairs(Ints codes, Ints x) { return _mm256_maddubs_epi16(codes, x); }
// A sum that is taken here and now: given free hand, GCC makes trees of such sums, and spills all their leaves.
inline Ints add_halves(Ints a, Ints b) {
  Ints sum = _mm256_add_epi16(a, b);
  asm("" : "+x"(sum));
  return sum;
}
inline Ints sum_pairs(Ints halves) { return _mm256_madd_epi16(halves, _mm256_set1_epi16(1)); }
inline Ints magnitudes(Ints v) { return _mm256_abs_epi8(v); }
inline Ints with_sign_of(Ints x, Ints v) { return _mm256_sign_epi8(x, v); }

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
