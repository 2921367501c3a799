// Q4_K, Q5_K and Q6_K: blocks of 256 weights, computed on their integers.
//
// All three are w = d * scale_j * q - dmin * min_j with q in 0..63 and j one of 16 groups of 16 weights, so
//   sum of w * x = x.scale * (d * sum_j scale_j * sum(q * x.q) - dmin * sum_j min_j * x.sums[j])
// and everything inside the sums is exact in integers: |q * x.q| pairs fit int16, the rest int32.
// A type only says how to unpack its block.
#include "gguf/block_layouts.h"
#include "kernels/activation_blocks.h"
#include "kernels/avx2/common.h"
#include "kernels/avx2/kernels.h"

namespace kt::avx2 {
namespace {

// 16 int16, one a group, in the order of ActivationBlock256::sums. Picks those of the 32 weights 32 i .. 32 i + 31:
// groups 2 i and 2 i + 1 sit in the same place of the two 128-bit lanes.
template <int i>
inline __m256i spread_scale(__m256i scales) {
  return _mm256_shuffle_epi8(scales, _mm256_set1_epi16(static_cast<int16_t>((2 * i + 1) << 8 | 2 * i)));
}

// Scales and mins of Q4_K and Q5_K: one for each 32 weights, so both lanes are the same.
struct ScalesAndMins {
  __m256i scales, mins;  // 16 int16

  // packed: [12], laid out as unpack_scales_k4() says
  explicit ScalesAndMins(const uint8_t* packed) {
    uint32_t a, b, c;
    std::memcpy(&a, packed, 4);
    std::memcpy(&b, packed + 4, 4);
    std::memcpy(&c, packed + 8, 4);
    const uint32_t scales_high = (c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030);
    const uint32_t mins_high = ((c >> 4) & 0x0f0f0f0f) | ((b >> 2) & 0x30303030);
    const uint64_t scale_bytes = (a & 0x3f3f3f3f) | static_cast<uint64_t>(scales_high) << 32;
    const uint64_t min_bytes = (b & 0x3f3f3f3f) | static_cast<uint64_t>(mins_high) << 32;
    scales = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(scale_bytes))));
    mins = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(min_bytes))));
  }
};

struct UnpackQ4K {
  static constexpr int kBlockBytes = sizeof(BlockQ4_K);
  const BlockQ4_K* block;
  __m256 d, dmin;
  ScalesAndMins scale_min;

  explicit UnpackQ4K(const uint8_t* bytes)
      : block(reinterpret_cast<const BlockQ4_K*>(bytes)),
        d(broadcast_f16(block->d)),
        dmin(broadcast_f16(block->dmin)),
        scale_min(block->scales) {}

  __m256i scales() const { return scale_min.scales; }
  __m256i mins() const { return scale_min.mins; }

  // Weights 32 i .. 32 i + 31, unsigned 8-bit.
  template <int i>
  __m256i quants() const {
    const __m256i bytes = load_256(block->qs + i / 2 * 32);
    return _mm256_and_si256(i % 2 ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
  }
};

struct UnpackQ5K {
  static constexpr int kBlockBytes = sizeof(BlockQ5_K);
  const BlockQ5_K* block;
  __m256 d, dmin;
  ScalesAndMins scale_min;
  __m256i high;

  explicit UnpackQ5K(const uint8_t* bytes)
      : block(reinterpret_cast<const BlockQ5_K*>(bytes)),
        d(broadcast_f16(block->d)),
        dmin(broadcast_f16(block->dmin)),
        scale_min(block->scales),
        high(load_256(block->qh)) {}

  __m256i scales() const { return scale_min.scales; }
  __m256i mins() const { return scale_min.mins; }

  template <int i>
  __m256i quants() const {
    const __m256i bytes = load_256(block->qs + i / 2 * 32);
    const __m256i low4 = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
    const __m256i bit4 =
        i < 4 ? _mm256_slli_epi16(high, i < 4 ? 4 - i : 0) : _mm256_srli_epi16(high, i < 4 ? 0 : i - 4);
    return _mm256_or_si256(low4, _mm256_and_si256(bit4, _mm256_set1_epi8(16)));
  }
};

struct UnpackQ6K {
  static constexpr int kBlockBytes = sizeof(BlockQ6_K);
  const BlockQ6_K* block;
  __m256 d, dmin;
  __m256i group_scales;

  explicit UnpackQ6K(const uint8_t* bytes)
      : block(reinterpret_cast<const BlockQ6_K*>(bytes)), d(broadcast_f16(block->d)), dmin(d) {
    const __m128i even_then_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    group_scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(load_128(block->scales), even_then_odd));
  }

  __m256i scales() const { return group_scales; }
  __m256i mins() const { return _mm256_slli_epi16(group_scales, 5); }  // w = d * scale * (q - 32)

  template <int i>
  __m256i quants() const {
    constexpr int half = i / 4, pair = i % 4;
    const __m256i low_bytes = load_256(block->ql + half * 64 + pair % 2 * 32);
    const __m256i high_bytes = load_256(block->qh + half * 32);
    const __m256i low4 = _mm256_and_si256(pair < 2 ? low_bytes : _mm256_srli_epi16(low_bytes, 4), _mm256_set1_epi8(15));
    const __m256i bits45 = pair < 2    ? _mm256_slli_epi16(high_bytes, pair < 2 ? 4 - 2 * pair : 0)
                           : pair == 2 ? high_bytes
                                       : _mm256_srli_epi16(high_bytes, 2);
    return _mm256_or_si256(low4, _mm256_and_si256(bits45, _mm256_set1_epi8(0x30)));
  }
};

template <class Unpack>
struct KBlockKernel {
  static constexpr int kTile = 4;  // 4 integer and 4 float accumulators, the weights and constants fill 16 registers

  // x: [T] blocks; sums: [T]. Adds 32 weights' scaled integer products.
  template <int i, int T>
  static inline void accumulate(const Unpack& weights, __m256i scales, const ActivationBlock256* const* x,
                                __m256i* sums) {
    const __m256i quants = weights.template quants<i>();
    const __m256i scale = spread_scale<i>(scales);
    for (int t = 0; t < T; ++t) {
      const __m256i pairs = _mm256_maddubs_epi16(quants, load_256(x[t]->q + 32 * i));
      sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, scale));
    }
  }

  template <int T>
  static inline void run(const uint8_t* row, const uint8_t* const* activations, int k, float* output) {
    __m256 totals[T];
    const ActivationBlock256* x[T];
    for (int t = 0; t < T; ++t) {
      totals[t] = _mm256_setzero_ps();
      x[t] = reinterpret_cast<const ActivationBlock256*>(activations[t]);
    }
    for (int start = 0; start < k; start += kBlockK, row += Unpack::kBlockBytes) {
      prefetch_ahead<Unpack::kBlockBytes>(row);
      const Unpack weights(row);
      const __m256i scales = weights.scales();
      __m256i sums[T];
      for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
      accumulate<0, T>(weights, scales, x, sums);
      accumulate<1, T>(weights, scales, x, sums);
      accumulate<2, T>(weights, scales, x, sums);
      accumulate<3, T>(weights, scales, x, sums);
      accumulate<4, T>(weights, scales, x, sums);
      accumulate<5, T>(weights, scales, x, sums);
      accumulate<6, T>(weights, scales, x, sums);
      accumulate<7, T>(weights, scales, x, sums);
      const __m256i mins = weights.mins();
      for (int t = 0; t < T; ++t) {
        const __m256i min_sum = _mm256_madd_epi16(load_256(x[t]->sums), mins);
        const __m256 offset = _mm256_mul_ps(weights.dmin, _mm256_cvtepi32_ps(min_sum));
        const __m256 value = _mm256_fmsub_ps(weights.d, _mm256_cvtepi32_ps(sums[t]), offset);
        totals[t] = _mm256_fmadd_ps(_mm256_broadcast_ss(&x[t]->scale), value, totals[t]);
        ++x[t];
      }
    }
    for (int t = 0; t < T; ++t) output[t] = horizontal_sum(totals[t]);
  }
};

}  // namespace

void gemm_q4_k(const GemmParams& params) { tiled_gemm<KBlockKernel<UnpackQ4K>>(params); }
void gemm_q5_k(const GemmParams& params) { tiled_gemm<KBlockKernel<UnpackQ5K>>(params); }
void gemm_q6_k(const GemmParams& params) { tiled_gemm<KBlockKernel<UnpackQ6K>>(params); }

}  // namespace kt::avx2
