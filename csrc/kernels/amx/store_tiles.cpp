// Activations to the memory of 16 tokens described in activations.h.
#include <immintrin.h>

#include <cstring>

#include "kernels/activation_blocks.h"
#include "kernels/amx/activations.h"
#include "kernels/amx/kernels.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

void store_bf16(const float* x, int k_begin, int n, int token, uint8_t* group) {
  uint8_t* row = group + static_cast<size_t>(k_begin / 32) * kTileBytes + token * kTileRowBytes;
  for (int i = 0; i < n; i += 32, row += kTileBytes) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(row, reinterpret_cast<__m512i>(pairs));
  }
}

// chunk: its [high][low] planes, at the token's row. n up to kChunkK, the rest is 0. Returns the
// step.
template <int kChunkK>
float store_chunk(const float* x, int n, uint8_t* chunk) {
  __m512 values[kChunkK / 16];
  __m512 largest = _mm512_setzero_ps();
  bool finite = true;
  for (int i = 0; i < kChunkK / 16; ++i) {
    values[i] = 16 * i < n ? _mm512_loadu_ps(x + 16 * i) : _mm512_setzero_ps();
    const __m512 magnitude = _mm512_abs_ps(values[i]);
    finite &= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ) == 0xffff;
    largest = _mm512_max_ps(largest, magnitude);
  }
  const float max = _mm512_reduce_max_ps(largest);
  float step = max / 127.0f, inverse = 127.0f / max;
  if (!finite) step = __builtin_nanf(""), inverse = 0;
  if (max < kSmallestMax) step = 0, inverse = 0;
  for (int i = 0; i < kChunkK / 16; ++i) {
    const __m512 scaled = inverse == 0 ? _mm512_setzero_ps() : _mm512_mul_ps(values[i], _mm512_set1_ps(inverse));
    const __m512i high = _mm512_cvtps_epi32(scaled);
    const __m512 rest = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(high));  // exact, up to a half
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(128)));
    uint8_t* at = chunk + i / 4 * kTileBytes + i % 4 * 16;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + plane_bytes(kChunkK)), _mm512_cvtepi32_epi8(low));
  }
  return step;
}

inline float sum_16(const float* x) { return _mm512_reduce_add_ps(_mm512_loadu_ps(x)); }

// To nearest even; a NaN stays one.
inline uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Element i of the token's row of sums. tiles: [i / 32][upper, lower].
inline void store_sum(uint8_t* tiles, int i, int token, float value) {
  const uint16_t upper = round_to_bf16(value), lower = round_to_bf16(value - from_bf16(upper));
  uint8_t* at = tiles + static_cast<size_t>(i / 32) * kSumsBytes + token * kTileRowBytes + i % 32 * 2;
  std::memcpy(at, &upper, 2);
  std::memcpy(at + kTileBytes, &lower, 2);
}

template <int kChunkK>
void store_int8(const float* x, int k_begin, int n, int k, int token, uint8_t* group) {
  const Int8Activations layout(k, kChunkK);
  for (int i = 0; i < n; i += kChunkK) {
    const size_t chunk = static_cast<size_t>((k_begin + i) / kChunkK);
    const float step = store_chunk<kChunkK>(x + i, n - i < kChunkK ? n - i : kChunkK,
                                            group + chunk * chunk_bytes(kChunkK) + token * kTileRowBytes);
    std::memcpy(group + layout.steps + chunk * kStepBytes + token * sizeof step, &step, sizeof step);
  }
  for (int i = 0; i < n; i += 32) {
    const float first = sum_16(x + i), second = sum_16(x + i + 16);
    store_sum(group + layout.half_sums, (k_begin + i) / 16, token, first);
    store_sum(group + layout.half_sums, (k_begin + i) / 16 + 1, token, second);
    store_sum(group + layout.sums, (k_begin + i) / 32, token, first + second);
  }
  if (k_begin + n < k) return;
  // Tiles of sums are multiplied whole, by offsets of 0 past the end: nothing there may be a NaN.
  for (int i = k / 16; i < round_up(k, kHalfSumsK) * 32; ++i) store_sum(group + layout.half_sums, i, token, 0);
  for (int i = k / 32; i < round_up(k, kSumsK) * 32; ++i) store_sum(group + layout.sums, i, token, 0);
}

}  // namespace

size_t tile_group_bytes(TileFormat format, int k) {
  switch (format) {
    case TileFormat::BF16:
      return static_cast<size_t>(k / 32) * kTileBytes;
    case TileFormat::INT8_256:
      return Int8Activations(k, 256).bytes;
    case TileFormat::INT8_128:
      return Int8Activations(k, 128).bytes;
  }
  return 0;
}

void store_tile_row(TileFormat format, const float* x, int k_begin, int n, int k, int token, uint8_t* group) {
  switch (format) {
    case TileFormat::BF16:
      return store_bf16(x, k_begin, n, token, group);
    case TileFormat::INT8_256:
      return store_int8<256>(x, k_begin, n, k, token, group);
    case TileFormat::INT8_128:
      return store_int8<128>(x, k_begin, n, k, token, group);
  }
}

}  // namespace kt::KT_ISA_NAMESPACE
