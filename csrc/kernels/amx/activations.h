// How the activations of 16 tokens stand in memory for the tile kernels.
//
// BF16: [k / 32][16 tokens][32] bfloat16, each [16][32] a tile. The 32 of a token are in the order 0 2 1 3, 4 6 5 7,
// ...: the tile unit multiplies pairs, and from four codes in a word those pairs are the easiest to make.
// INT8_256: [k / 64][16 tokens][64] int8, each [16][64] a tile, then [k / 256][16 tokens] float32, the steps; both
// rounded up, the rest of the last tile is 0. Activation = step * int8; where one of the 256 is no number, the step is
// NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

// Of functions that a dozen places call, more than GCC inlines by itself. With sanitizers that takes minutes to
// compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KT_FORCE_INLINE __attribute__((noinline))
#else
#define KT_FORCE_INLINE __attribute__((always_inline)) inline
#endif

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr size_t kTileRowBytes = 64;  // one token's part of a tile
constexpr size_t kTileBytes = 16 * kTileRowBytes;

constexpr int kInt8TileK = 64;
constexpr int kInt8ChunkK = tile_granule(TileFormat::INT8_256);  // with one step

inline size_t int8_tile(int k) { return static_cast<size_t>((k + kInt8TileK - 1) / kInt8TileK) * kTileBytes; }

// Where the steps of the chunk at k begin, in the memory of 16 tokens with row_k activations.
inline size_t int8_token_steps(int row_k, int k) {
  return int8_tile(row_k) + static_cast<size_t>((k + kInt8ChunkK - 1) / kInt8ChunkK) * kTileTokens * sizeof(float);
}

// Asks for a line, into the first level cache or the second. By asm: GCC leaves out calls of what only prefetches.
inline void prefetch_l1(const uint8_t* line) { __asm__ volatile("prefetcht0 %0" : : "m"(*line)); }
inline void prefetch_l2(const uint8_t* line) { __asm__ volatile("prefetcht1 %0" : : "m"(*line)); }

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
