// SiLU, the weighted sum, and conversions at the border of the model.
#include <immintrin.h>

#include <cstring>

#include "kernels/panel/kernels.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

inline __m128i load_128(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }

// exp(x) to about 1e-7 relative, subnormal and infinite results included; NaN stays NaN.
inline __m256 exp_8(__m256 x) {
  // Past these every result is 0 or infinity. The order of operands lets NaN through.
  x = _mm256_max_ps(_mm256_set1_ps(-105.0f), x);
  x = _mm256_min_ps(_mm256_set1_ps(90.0f), x);
  // x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts, the first short enough for n * part to be exact.
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.63p-1f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-0x1.bd0106p-13f), r);
  // Minimax polynomial of Cephes expf: e^r = 1 + r + r^2 p(r).
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
  p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
  // 2^n in two factors, for n reaches -151 and 130 but the exponent of a float only -126 and 127.
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}

inline __m256 silu_mul_8(__m256 gate, __m256 up) {
  const __m256 minus_gate = _mm256_xor_ps(gate, _mm256_set1_ps(-0.0f));
  const __m256 denominator = _mm256_add_ps(_mm256_set1_ps(1.0f), exp_8(minus_gate));
  return _mm256_mul_ps(_mm256_div_ps(gate, denominator), up);
}

// The last n < 8 floats, zeros after them: a tail takes the same instructions as the rest, so no result depends on how
// a row was cut.
inline __m256 load_tail(const float* src, int n) {
  float buffer[8] = {};
  std::memcpy(buffer, src, static_cast<size_t>(n) * sizeof(float));
  return _mm256_loadu_ps(buffer);
}

inline void store_tail(float* dst, __m256 v, int n) {
  float buffer[8];
  _mm256_storeu_ps(buffer, v);
  std::memcpy(dst, buffer, static_cast<size_t>(n) * sizeof(float));
}

inline __m256 f16_to_f32_8(__m128i v) { return _mm256_cvtph_ps(v); }
inline __m128i f32_to_f16_8(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline __m256 bf16_to_f32_8(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }

inline __m128i f32_to_bf16_8(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet_nan = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_castsi256_si128(packed);
}

// src: [n] of 16 bits
template <__m256 (*convert)(__m128i)>
inline void load_16_bit(const void* src, float* dst, int n) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, convert(load_128(bytes + 2 * static_cast<size_t>(i))));
  if (i == n) return;
  uint8_t buffer[16] = {};
  std::memcpy(buffer, bytes + 2 * static_cast<size_t>(i), 2 * static_cast<size_t>(n - i));
  store_tail(dst + i, convert(load_128(buffer)), n - i);
}

// dst: [n] of 16 bits
template <__m128i (*convert)(__m256)>
inline void store_16_bit(const float* src, void* dst, int n) {
  auto* bytes = static_cast<uint8_t*>(dst);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * static_cast<size_t>(i)), convert(_mm256_loadu_ps(src + i)));
  if (i == n) return;
  uint8_t buffer[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), convert(load_tail(src + i, n - i)));
  std::memcpy(bytes + 2 * static_cast<size_t>(i), buffer, 2 * static_cast<size_t>(n - i));
}

}  // namespace

void silu_mul(const float* gate, const float* up, float* out, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, silu_mul_8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  if (i < n) store_tail(out + i, silu_mul_8(load_tail(gate + i, n - i), load_tail(up + i, n - i)), n - i);
}

void add_scaled(float a, const float* x, float* y, int n) {
  const __m256 factor = _mm256_set1_ps(a);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(factor, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
  if (i < n) store_tail(y + i, _mm256_fmadd_ps(factor, load_tail(x + i, n - i), load_tail(y + i, n - i)), n - i);
}

void load_floats(const void* src, FloatType type, float* dst, int n) {
  switch (type) {
    case FloatType::F32:
      if (n > 0) std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      break;
    case FloatType::F16:
      load_16_bit<f16_to_f32_8>(src, dst, n);
      break;
    case FloatType::BF16:
      load_16_bit<bf16_to_f32_8>(src, dst, n);
      break;
  }
}

void store_floats(const float* src, FloatType type, void* dst, int n) {
  switch (type) {
    case FloatType::F32:
      if (n > 0) std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      break;
    case FloatType::F16:
      store_16_bit<f32_to_f16_8>(src, dst, n);
      break;
    case FloatType::BF16:
      store_16_bit<f32_to_bf16_8>(src, dst, n);
      break;
  }
}

}  // namespace kt::KT_ISA_NAMESPACE
