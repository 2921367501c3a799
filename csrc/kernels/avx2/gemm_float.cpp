// F32, F16 and BF16 weights with float32 activations. k may be any number.
#include "kernels/avx2/common.h"
#include "kernels/avx2/kernels.h"

namespace kt::avx2 {
namespace {

// load: 8 weights at any address -> 8 floats
struct WeightsF32 {
  static constexpr int kBytes = 4;
  static __m256 load(const uint8_t* bytes) { return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes)); }
};

struct WeightsF16 {
  static constexpr int kBytes = 2;
  static __m256 load(const uint8_t* bytes) { return _mm256_cvtph_ps(load_128(bytes)); }
};

struct WeightsBF16 {
  static constexpr int kBytes = 2;
  static __m256 load(const uint8_t* bytes) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(bytes)), 16));
  }
};

inline __m256 load_x(const uint8_t* bytes) { return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes)); }

template <class Weights>
struct FloatKernel {
  static constexpr int kTile = 3;          // 3 tokens x 4 accumulators leave 4 registers
  static constexpr int kAccumulators = 4;  // hide the latency of the fused multiply-add

  template <int T>
  static inline void run(const uint8_t* row, const uint8_t* const* activations, int k, float* output) {
    __m256 totals[T][kAccumulators];
    for (int t = 0; t < T; ++t)
      for (int a = 0; a < kAccumulators; ++a) totals[t][a] = _mm256_setzero_ps();

    int i = 0;
    for (; i + 8 * kAccumulators <= k; i += 8 * kAccumulators) {
      prefetch_ahead<8 * kAccumulators * Weights::kBytes>(row + static_cast<size_t>(i) * Weights::kBytes);
      for (int a = 0; a < kAccumulators; ++a) {
        const int at = i + 8 * a;
        const __m256 weights = Weights::load(row + static_cast<size_t>(at) * Weights::kBytes);
        for (int t = 0; t < T; ++t)
          totals[t][a] = _mm256_fmadd_ps(weights, load_x(activations[t] + static_cast<size_t>(at) * 4), totals[t][a]);
      }
    }
    for (; i < k; i += 8) {
      const int n = k - i < 8 ? k - i : 8;
      alignas(32) uint8_t weight_bytes[32] = {}, x_bytes[32] = {};  // zero beyond n
      std::memcpy(weight_bytes, row + static_cast<size_t>(i) * Weights::kBytes,
                  static_cast<size_t>(n) * Weights::kBytes);
      const __m256 weights = Weights::load(weight_bytes);
      for (int t = 0; t < T; ++t) {
        std::memcpy(x_bytes, activations[t] + static_cast<size_t>(i) * 4, static_cast<size_t>(n) * 4);
        totals[t][0] = _mm256_fmadd_ps(weights, load_x(x_bytes), totals[t][0]);
      }
    }
    for (int t = 0; t < T; ++t)
      output[t] = horizontal_sum(
          _mm256_add_ps(_mm256_add_ps(totals[t][0], totals[t][1]), _mm256_add_ps(totals[t][2], totals[t][3])));
  }
};

}  // namespace

void gemm_f32(const GemmParams& params) { tiled_gemm<FloatKernel<WeightsF32>>(params); }
void gemm_f16(const GemmParams& params) { tiled_gemm<FloatKernel<WeightsF16>>(params); }
void gemm_bf16(const GemmParams& params) { tiled_gemm<FloatKernel<WeightsBF16>>(params); }

}  // namespace kt::avx2
