// Q8_0: blocks of 32 signed weights. The 8-bit multiply takes one unsigned operand, so the sign of each weight moves to
// its activation: |w| * (x * sign(w)). |w| <= 128 and |x| <= 127, so a pair of products fits int16.
#include "gguf/block_layouts.h"
#include "kernels/activation_blocks.h"
#include "kernels/avx2/common.h"
#include "kernels/avx2/kernels.h"

namespace kt::avx2 {
namespace {

struct Q80Kernel {
  static constexpr int kTile = 4;

  template <int T>
  static inline void run(const uint8_t* row, const uint8_t* const* activations, int k, float* output) {
    __m256 totals[T];
    for (int t = 0; t < T; ++t) totals[t] = _mm256_setzero_ps();
    const auto* block = reinterpret_cast<const BlockQ8_0*>(row);
    const int num_blocks = k / kBlockQ8_0;
    for (int b = 0; b < num_blocks; ++b, ++block) {
      prefetch_ahead<sizeof(BlockQ8_0)>(block->d);
      const __m256i weights = load_256(block->qs);
      const __m256i magnitudes = _mm256_abs_epi8(weights);
      const __m256 d = broadcast_f16(block->d);
      for (int t = 0; t < T; ++t) {
        const auto* x = reinterpret_cast<const ActivationBlock32*>(activations[t]) + b;
        const __m256i signed_x = _mm256_sign_epi8(load_256(x->q), weights);
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, signed_x);
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m256 scale = _mm256_mul_ps(d, _mm256_broadcast_ss(&x->scale));
        totals[t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sums), totals[t]);
      }
    }
    for (int t = 0; t < T; ++t) output[t] = horizontal_sum(totals[t]);
  }
};

}  // namespace

void gemm_q8_0(const GemmParams& params) { tiled_gemm<Q80Kernel>(params); }

}  // namespace kt::avx2
