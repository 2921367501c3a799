// How the activations of 16 tokens stand in memory for the tile kernels.
//
// BF16: [k / 32][16 tokens][32] bfloat16, each [16][32] a tile.
// INT8: four regions, one after another
//   chunks: [k / 256] of { high[4][16 tokens][64] int8, low[4][16 tokens][64] int8 }, each [16][64] a tile
//   steps: [k / 256][16 tokens] float32
//   sums: [k / 1024] of { upper[16][32] bfloat16, lower[16][32] }, of every 32 activations: sum = upper + lower, 16
//   bits half sums: [k / 512], the same of every 16
// x = step * (high + low / 128): one plane alone has 8 bits, both have 15. All of k is rounded up; the rest is zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kChunkK = kTileGranule;  // 256: what shares one step of activations, and one of weights
constexpr size_t kTileRowBytes = 64;   // one token's part of a tile
constexpr size_t kTileBytes = 16 * kTileRowBytes;
constexpr int kChunkTiles = kChunkK / 64;
constexpr size_t kPlaneBytes = kChunkTiles * kTileBytes;  // of a chunk
constexpr size_t kChunkBytes = 2 * kPlaneBytes;
constexpr size_t kStepBytes = kTileTokens * sizeof(float);  // of a chunk
constexpr int kSumsK = 1024;                                // activations whose sums of 32 fill a row of a tile
constexpr int kHalfSumsK = 512;                             // the same of 16

constexpr size_t kSumsBytes = 2 * kTileBytes;  // upper and lower

inline int round_up(int k, int multiple) { return (k + multiple - 1) / multiple; }

// Offsets within the memory of 16 tokens, INT8.
struct Int8Activations {
  size_t steps, sums, half_sums, bytes;

  explicit inline Int8Activations(int k) {
    steps = round_up(k, kChunkK) * kChunkBytes;
    sums = steps + round_up(k, kChunkK) * kStepBytes;
    half_sums = sums + round_up(k, kSumsK) * kSumsBytes;
    bytes = half_sums + round_up(k, kHalfSumsK) * kSumsBytes;
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
