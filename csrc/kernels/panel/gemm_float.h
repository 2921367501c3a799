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

constexpr int kChains = 2;  // independent sums of a token, over even and odd k: they help to hide the latency of fma
constexpr int kFloatTokenTile = kLanes == 16 ? 6 : 3;
constexpr size_t kFloatPrefetchBytes = 4096;

inline void write_rows(Floats sums, float* output, int num_rows) {
  if (num_rows >= kLanes) {
    store_floats(output, sums);
  } else if (num_rows > 0) {
    float lanes[kLanes];
    store_floats(lanes, sums);
    std::memcpy(output, lanes, static_cast<size_t>(num_rows) * sizeof(float));
  }
}

// T tokens times kVectors vectors of rows, each read once: vector v holds the lanes v % kHalves of panel v / kHalves.
// num_rows: of all panels together.
template <class Weights, int T, int kVectors>
inline void float_tile(const uint8_t* panel, size_t panel_bytes, int k, const float* const* x, float* const* output,
                       int num_rows) {
  constexpr size_t kStep = size_t{kPanelRows} * Weights::kBytes;
  const uint8_t* rows[kVectors];
  Floats totals[T][kVectors][kChains];
  for (int v = 0; v < kVectors; ++v) {
    rows[v] = panel + v / kHalves * panel_bytes + v % kHalves * kLanes * Weights::kBytes;
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < kChains; ++c) totals[t][v][c] = zero_floats();
  }
  int i = 0;
  for (; i + kChains <= k; i += kChains) {
    for (int v = 0; v < kVectors; v += kHalves) {  // may lie past the end of the tensor
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(rows[v]) + i * kStep + kFloatPrefetchBytes;
      for (size_t line = 0; line < kChains * kStep; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
    }
    for (int c = 0; c < kChains; ++c) {
      Floats weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = Weights::load_rows(rows[v] + static_cast<size_t>(i + c) * kStep);
      for (int t = 0; t < T; ++t) {
        const Floats value = splat_float(x[t][i + c]);
        for (int v = 0; v < kVectors; ++v) totals[t][v][c] = multiply_add(weights[v], value, totals[t][v][c]);
      }
    }
  }
  for (; i < k; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const Floats weights = Weights::load_rows(rows[v] + static_cast<size_t>(i) * kStep);
      for (int t = 0; t < T; ++t) totals[t][v][0] = multiply_add(weights, splat_float(x[t][i]), totals[t][v][0]);
    }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v)
      write_rows(add(totals[t][v][0], totals[t][v][1]), output[t] + v * kLanes, num_rows - v * kLanes);
}

template <class Weights, int T, int kVectors>
inline void last_float_tokens(const uint8_t* panel, size_t panel_bytes, int k, const float* const* x,
                              float* const* output, int num_rows, int rest) {
  if constexpr (T > 0) {
    if (rest == T) return float_tile<Weights, T, kVectors>(panel, panel_bytes, k, x, output, num_rows);
    last_float_tokens<Weights, T - 1, kVectors>(panel, panel_bytes, k, x, output, num_rows, rest);
  }
}

// kPanels panels from row `row` on.
template <class Weights, int kPanels>
inline void multiply_float_panels(const GemmParams& p, int row) {
  const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
  const int num_rows = p.num_rows - row < kPanels * kPanelRows ? p.num_rows - row : kPanels * kPanelRows;
  for (int token = 0; token < p.num_tokens; token += kFloatTokenTile) {
    const float* x[kFloatTokenTile];
    float* output[kFloatTokenTile];
    const int rest = p.num_tokens - token < kFloatTokenTile ? p.num_tokens - token : kFloatTokenTile;
    for (int t = 0; t < rest; ++t) {
      const size_t activation_row = p.token_rows ? p.token_rows[token + t] : token + t;
      x[t] = reinterpret_cast<const float*>(p.activations + activation_row * p.activation_row_bytes);
      output[t] = p.output + static_cast<size_t>(token + t) * p.output_stride + row;
    }
    last_float_tokens<Weights, kFloatTokenTile, kPanels * kHalves>(panel, p.panel_bytes, p.k, x, output, num_rows,
                                                                   rest);
  }
}

template <class Weights>
inline void gemm_float(const GemmParams& p) {
  int row = 0;
  if constexpr (kHalves == 1)  // two vectors of rows at a time, as above
    for (; row + kPanelRows < p.num_rows; row += 2 * kPanelRows) multiply_float_panels<Weights, 2>(p, row);
  for (; row < p.num_rows; row += kPanelRows) multiply_float_panels<Weights, 1>(p, row);
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
