// What a tile kernel reads later, asked for while the tile unit works.
#pragma once

#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kRows = 2 * kPanelRows;  // weight rows computed together

// Two runs of bytes, in equal parts, into the first level cache or the second.
template <_mm_hint kLevel>
struct Ahead {
  const uint8_t* from[2] = {nullptr, nullptr};  // nullptr: nothing
  size_t bytes_of_step = 0;                     // of each

  inline void prefetch(int step) const {
    for (const uint8_t* begin : from)
      for (size_t i = 0; begin != nullptr && i < bytes_of_step; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(begin + step * bytes_of_step + i), kLevel);
  }
};

inline int num_chunks(const TileGemmParams& p) { return (p.k_end - p.k_begin + kMaxCodesK - 1) / kMaxCodesK; }

using ActivationsAhead = Ahead<_MM_HINT_T1>;
using WeightsAhead = Ahead<_MM_HINT_T0>;

// The chunk after that at k of the panels from row on, in num_steps parts. A chunk takes 1 to 10 microseconds, memory
// less than one; two chunks ahead, or into the second level, everything takes 3 to 8 % longer.
template <class Maker>
inline WeightsAhead weights_ahead(const TileGemmParams& p, int row, int k, int num_steps) {
  k += kMaxCodesK;
  if (k >= p.k_end) k = p.k_begin, row += kRows;
  const size_t bytes_of_step = Maker::kChunkBytes / num_steps;
  if (row >= p.num_rows) {
    if (p.next_weights == nullptr) return {};
    return {{p.next_weights, p.num_rows > kPanelRows ? p.next_weights + p.panel_bytes : nullptr}, bytes_of_step};
  }
  const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes +
                         static_cast<size_t>(k / kMaxCodesK) * Maker::kChunkBytes;
  return {{panel, row + kPanelRows < p.num_rows ? panel + p.panel_bytes : nullptr}, bytes_of_step};
}

// Bytes of a group's activations that are to be asked for in each of the num_steps parts of a chunk: all up to k_ahead
// by the last chunk.
inline size_t activations_ahead_of_step(const TileGemmParams& p, size_t bytes_of_k, int num_steps) {
  if (p.k_ahead <= p.k_end) return 0;
  const size_t chunks = static_cast<size_t>((p.num_rows + kRows - 1) / kRows) * num_chunks(p);
  return (static_cast<size_t>(p.k_ahead - p.k_end) * bytes_of_k / (chunks * num_steps) + 63) / 64 * 64;
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
