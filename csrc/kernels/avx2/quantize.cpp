// float32 activations to the formats of activation_blocks.h.
#include "kernels/activation_blocks.h"
#include "kernels/avx2/common.h"
#include "kernels/avx2/kernels.h"

namespace kt::avx2 {
namespace {

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
    block->scale = s.scale;
    store_256(block->q, s.inverse == 0 ? _mm256_setzero_si256() : quantize_32(x + start, s.inverse));
  }
}

void quantize_int8_256(const float* x, uint8_t* blocks, int k) {
  auto* block = reinterpret_cast<ActivationBlock256*>(blocks);
  for (int start = 0; start < k; start += 256, ++block) {
    const Scale s = block_scale(x + start, 256);
    __m256i sums[8];  // [32 weights]: 4 partial sums of each of two groups of 16, a group a lane
    for (int i = 0; i < 8; ++i) {
      const __m256i q = s.inverse == 0 ? _mm256_setzero_si256() : quantize_32(x + start + 32 * i, s.inverse);
      store_256(block->q + 32 * i, q);
      sums[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
    }
    const __m256i first = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    const __m256i second = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]), _mm256_hadd_epi32(sums[6], sums[7]));
    store_256(block->sums, _mm256_packs_epi32(first, second));
    block->scale = s.scale;
    std::memset(block->padding, 0, sizeof block->padding);  // rows are copied and compared as bytes
  }
}

}  // namespace kt::avx2
