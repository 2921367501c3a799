// The activations a tile kernel reads later, asked for while the tile unit works.
#pragma once

#include "kernels/amx/chunks.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// Of up to two groups, in equal parts, into the second level cache.
struct ActivationsAhead {
  const uint8_t* from[2] = {nullptr, nullptr};  // nullptr: nothing
  size_t bytes_of_step = 0;                     // of each

  inline void prefetch(int step) const {
    for (const uint8_t* begin : from)
      for (size_t i = 0; begin != nullptr && i < bytes_of_step; i += 64) prefetch_l2(begin + step * bytes_of_step + i);
  }
};

// Bytes of a group's activations that are to be asked for in each of the num_steps parts of a chunk: all up to k_ahead
// by the last chunk.
inline size_t activations_ahead_of_step(const TileGemmParams& p, size_t bytes_of_k, int num_steps) {
  if (p.k_ahead <= p.k_end) return 0;
  const int chunks_of_row = (p.k_end - p.k_begin + kMaxCodesK - 1) / kMaxCodesK;
  const size_t chunks = static_cast<size_t>((p.num_rows + kRows - 1) / kRows) * chunks_of_row;
  return (static_cast<size_t>(p.k_ahead - p.k_end) * bytes_of_k / (chunks * num_steps) + 63) / 64 * 64;
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
