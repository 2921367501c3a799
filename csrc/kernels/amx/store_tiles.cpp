// Activations to the tiles described in activations.h.
#include <immintrin.h>

#include <cstring>

#include "kernels/activation_blocks.h"
#include "kernels/amx/activations.h"
#include "kernels/amx/kernels.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

void store_bf16(const float* x, int k_begin, int n, int token, uint8_t* group) {
  const __m512i order = _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18, 16, 15, 13, 14, 12,
                                         11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  uint8_t* row = group + static_cast<size_t>(k_begin / 32) * kTileBytes + token * kTileRowBytes;
  for (int i = 0; i < n; i += 32, row += kTileBytes) {
    const __m512bh values = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(row, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(values)));
  }
}

// The activations [0, n) of a chunk, n a multiple of 32, to tiles from `row` on. Returns their step.
float store_int8_chunk(const float* x, int n, uint8_t* row) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xffff;
  for (int i = 0; i < n; i += 16) {
    const __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(x + i));
    finite &= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, magnitude);
  }
  const float max = _mm512_reduce_max_ps(largest);
  const bool none = finite != 0xffff || max < kSmallestMax;
  const __mmask16 keep = none ? 0 : 0xffff;
  const __m512 inverse = _mm512_set1_ps(127.0f / max);
  for (int i = 0; i < n; i += kInt8TileK, row += kTileBytes)
    for (int j = 0; j < kInt8TileK; j += 16) {
      const __m512 values = _mm512_maskz_loadu_ps(i + j < n ? keep : 0, x + i + j);
      const __m512i rounded = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(values, inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + j), _mm512_cvtepi32_epi8(rounded));
    }
  return finite != 0xffff ? __builtin_nanf("") : none ? 0.0f : max / 127.0f;
}

void store_int8(const float* x, int k_begin, int n, int k, int token, uint8_t* group) {
  for (int i = 0; i < n; i += kInt8ChunkK) {
    const float step = store_int8_chunk(x + i, n - i < kInt8ChunkK ? n - i : kInt8ChunkK,
                                        group + int8_tile(k_begin + i) + token * kTileRowBytes);
    std::memcpy(group + int8_token_steps(k, k_begin + i) + token * sizeof step, &step, sizeof step);
  }
}

}  // namespace

size_t tile_group_bytes(TileFormat format, int k) {
  return format == TileFormat::BF16 ? static_cast<size_t>(k / 32) * kTileBytes : int8_token_steps(k, k);
}

void store_tile_row(TileFormat format, const float* x, int k_begin, int n, int k, int token, uint8_t* group) {
  if (format == TileFormat::BF16)
    store_bf16(x, k_begin, n, token, group);
  else
    store_int8(x, k_begin, n, k, token, group);
}

}  // namespace kt::KT_ISA_NAMESPACE
