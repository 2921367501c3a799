// What the files of this folder share. Everything is in an unnamed namespace: code built for AVX2 must not be picked
// by the linker for anyone else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/kernel_table.h"

namespace kt::avx2 {
namespace {

inline __m256i load_256(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
inline __m128i load_128(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }

// A float16 of a block, in every lane.
inline __m256 broadcast_f16(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, sizeof half);
  return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

inline float horizontal_sum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// How far ahead of the weights in use memory is asked for. Without it the window of a core holds too few loads to keep
// memory busy. One thread, one token, rows of 7168 from DRAM, in one run: against this, none ran at 0.6 (Q4_K) and 0.7
// (Q6_K), 512 at 0.9 and 0.95, 8192 at 0.85 and 0.7; from 16 tokens on all were alike.
constexpr int kPrefetchBytes = 2048;

// Asks for the lines of kBytes weights that will be used kPrefetchBytes later. May point past the end of the tensor.
template <int kBytes>
inline void prefetch_ahead(const uint8_t* weights) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(weights) + kPrefetchBytes;
  for (int offset = 0; offset < kBytes; offset += 64)
    _mm_prefetch(reinterpret_cast<const char*>(ahead + offset), _MM_HINT_T0);
}

// Rows of weights taken together over all tokens: they stay in the second level cache while each tile of activations is
// used kRowGroup times from the first. For 512 tokens a call 4 ran at 0.8 of this speed, 8 at 0.9, 32 alike; for the 1
// to 64 the executor asks for, 4 to 32 were all within 2 % (rows of 7168, one thread).
constexpr int kRowGroup = 16;

// One tile: Kernel::template run<T>(weight_row, activations[T], k, sums[T]).
// The result of a token does not depend on T, so it does not depend on what else is in the batch.
template <class Kernel, int T>
inline void run_tile(const GemmParams& p, int row_begin, int row_end, int token) {
  const uint8_t* activations[T];
  for (int t = 0; t < T; ++t) {
    const size_t activation_row = p.token_rows ? p.token_rows[token + t] : token + t;
    activations[t] = p.activations + activation_row * p.activation_row_bytes;
  }
  float* output = p.output + static_cast<size_t>(token) * p.output_stride;  // [T, output_stride]
  for (int row = row_begin; row < row_end; ++row) {
    float sums[T];
    Kernel::template run<T>(p.weights + static_cast<size_t>(row) * p.panel_bytes, activations, p.k, sums);
    for (int t = 0; t < T; ++t) output[t * p.output_stride + row] = sums[t];
  }
}

// Full tiles of Kernel::kTile tokens, then one smaller tile.
template <class Kernel>
inline void tiled_gemm(const GemmParams& p) {
  constexpr int kTile = Kernel::kTile;
  static_assert(kTile >= 2 && kTile <= 4);
  for (int row = 0; row < p.num_rows; row += kRowGroup) {
    const int row_end = row + kRowGroup < p.num_rows ? row + kRowGroup : p.num_rows;
    int token = 0;
    for (; token + kTile <= p.num_tokens; token += kTile) run_tile<Kernel, kTile>(p, row, row_end, token);
    const int rest = p.num_tokens - token;
    if (rest == 1) run_tile<Kernel, 1>(p, row, row_end, token);
    if constexpr (kTile > 2)
      if (rest == 2) run_tile<Kernel, 2>(p, row, row_end, token);
    if constexpr (kTile > 3)
      if (rest == 3) run_tile<Kernel, 3>(p, row, row_end, token);
  }
}

}  // namespace
}  // namespace kt::avx2
