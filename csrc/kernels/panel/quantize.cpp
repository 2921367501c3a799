// float32 activations to the formats of activation_blocks.h.
#include <immintrin.h>

#include <cstring>

#include "kernels/activation_blocks.h"
#include "kernels/panel/kernels.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

inline __m256i load_256(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

constexpr uint32_t kInfinityBits = 0x7f800000;

// Largest |x| of x: [n], n a multiple of 8, as bits. Magnitudes order like integers, and NaN comes out above infinity.
inline uint32_t max_magnitude_bits(const float* x, int n) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i max = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 8) max = _mm256_max_epi32(max, _mm256_and_si256(load_256(x + i), mask));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

struct Scale {
  float scale, inverse;  // inverse is 0 when the quants are all 0
};

inline Scale block_scale(const float* x, int n) {
  const uint32_t bits = max_magnitude_bits(x, n);
  float max;
  std::memcpy(&max, &bits, sizeof max);
  if (bits >= kInfinityBits) return {__builtin_nanf(""), 0.0f};
  if (max < kSmallestMax) return {0.0f, 0.0f};
  return {max / 127.0f, 127.0f / max};
}

// x: [32] -> 32 int8. The default rounding of the processor is to nearest even; 127.0001 still rounds to 127.
inline __m256i quantize_32(const float* x, float inverse) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), factor));
  const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16), factor));
  const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 24), factor));
  // Packing works within 128-bit lanes; the permutation puts the groups of four back in order.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline void store_256(void* bytes, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(bytes), v); }

}  // namespace

void copy_activations(const float* x, uint8_t* blocks, int k) {
  if (k > 0) std::memcpy(blocks, x, static_cast<size_t>(k) * sizeof(float));
}

void quantize_int8_32(const float* x, uint8_t* blocks, int k) {
  auto* block = reinterpret_cast<ActivationBlock32*>(blocks);
  for (int start = 0; start < k; start += 32, ++block) {
    const Scale s = block_scale(x + start, 32);
    const __m256i q = s.inverse == 0 ? _mm256_setzero_si256() : quantize_32(x + start, s.inverse);
    store_256(block->q, q);
    // 4 partial sums of the first 16 in the low lane, of the others in the high lane.
    __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
    const int first = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums));
    const int second = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
    block->scale = s.scale;
    block->sum = s.scale * static_cast<float>(first + second);
    block->half_sums[0] = s.scale * static_cast<float>(first);
    block->half_sums[1] = s.scale * static_cast<float>(second);
    block->neg128_sum = -128 * (first + second);
    std::memset(block->padding, 0, sizeof block->padding);
  }
}

}  // namespace kt::KT_ISA_NAMESPACE
