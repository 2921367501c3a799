// F32, F16 and BF16 weights with float32 activations: a panel is [k][16 rows].
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// load: one k of kLanes rows
struct WeightsF32 {
  static constexpr int kBytes = 4;
  static inline Floats load_rows(const uint8_t* p) { return as_floats(load(p)); }
};
struct WeightsF16 {
  static constexpr int kBytes = 2;
  static inline Floats load_rows(const uint8_t* p) { return load_f16(p); }
};
struct WeightsBF16 {
  static constexpr int kBytes = 2;
  static inline Floats load_rows(const uint8_t* p) { return as_floats(shift_left<16>(zero_extend_halves(p))); }
};

constexpr int kChains = 4;  // independent sums of a token, each over every fourth k: they hide the latency of fma

template <class Weights, int T>
inline void float_tile(const uint8_t* panel, int k, const float* const* x, float* const* output, int num_rows) {
  for (int h = 0; h < kHalves; ++h) {
    Floats totals[T][kChains];
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < kChains; ++c) totals[t][c] = zero_floats();
    const uint8_t* rows = panel + h * kLanes * Weights::kBytes;
    constexpr size_t kStep = size_t{kPanelRows} * Weights::kBytes;
    int i = 0;
    for (; i + kChains <= k; i += kChains)
      for (int c = 0; c < kChains; ++c) {
        const uint8_t* at = rows + static_cast<size_t>(i + c) * kStep;
        _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + 4096), _MM_HINT_T0);
        const Floats weights = Weights::load_rows(at);
        for (int t = 0; t < T; ++t) totals[t][c] = multiply_add(weights, splat_float(x[t][i + c]), totals[t][c]);
      }
    for (; i < k; ++i) {
      const Floats weights = Weights::load_rows(rows + static_cast<size_t>(i) * kStep);
      for (int t = 0; t < T; ++t) totals[t][0] = multiply_add(weights, splat_float(x[t][i]), totals[t][0]);
    }
    for (int t = 0; t < T; ++t) {
      const Floats sum = add(add(totals[t][0], totals[t][1]), add(totals[t][2], totals[t][3]));
      if (num_rows == kPanelRows) {
        store_floats(output[t] + h * kLanes, sum);
      } else {
        float lanes[kLanes];
        store_floats(lanes, sum);
        for (int lane = 0; lane < kLanes && h * kLanes + lane < num_rows; ++lane)
          output[t][h * kLanes + lane] = lanes[lane];
      }
    }
  }
}

template <class Weights>
inline void gemm_float(const GemmParams& p) {
  constexpr int kTile = kLanes == 16 ? 4 : 2;
  for (int row = 0; row < p.num_rows; row += kPanelRows) {
    const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
    const int num_rows = p.num_rows - row < kPanelRows ? p.num_rows - row : kPanelRows;
    for (int token = 0; token < p.num_tokens;) {
      const float* x[kTile];
      float* output[kTile];
      const int rest = p.num_tokens - token;
      for (int t = 0; t < kTile && t < rest; ++t) {
        const size_t activation_row = p.token_rows ? p.token_rows[token + t] : token + t;
        x[t] = reinterpret_cast<const float*>(p.activations + activation_row * p.activation_row_bytes);
        output[t] = p.output + static_cast<size_t>(token + t) * p.output_stride + row;
      }
      if (rest >= kTile) {
        float_tile<Weights, kTile>(panel, p.k, x, output, num_rows);
        token += kTile;
      } else {
        float_tile<Weights, 1>(panel, p.k, x, output, num_rows);
        token += 1;
      }
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
