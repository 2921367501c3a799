// How the activations of 16 tokens stand in memory for the tile kernels.
//
// BF16: [k / 32][16 tokens][32] bfloat16, each [16][32] a tile.
// INT8_<step>: four regions, one after another; a chunk is `step` k
//   chunks: [k / step] of { high[step / 64][16 tokens][64] int8, low[step / 64][16 tokens][64] int8 }, [16][64] a tile
//   steps: [k / step][16 tokens] float32
//   sums: [k / 1024] of { upper[16][32] bfloat16, lower[16][32] }, of every 32 activations: sum = upper + lower, 16
//   bits half sums: [k / 512], the same of every 16
// x = step * (high + low / 128): one plane alone has 8 bits, both have 15. All of k is rounded up; the rest is zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr size_t kTileRowBytes = 64;  // one token's part of a tile
constexpr size_t kTileBytes = 16 * kTileRowBytes;
constexpr size_t kStepBytes = kTileTokens * sizeof(float);  // of a chunk
constexpr int kSumsK = 1024;                                // activations whose sums of 32 fill a row of a tile
constexpr int kHalfSumsK = 512;                             // the same of 16

constexpr size_t kSumsBytes = 2 * kTileBytes;  // upper and lower

inline int round_up(int k, int multiple) { return (k + multiple - 1) / multiple; }

inline size_t plane_bytes(int chunk_k) { return static_cast<size_t>(chunk_k / 64) * kTileBytes; }
inline size_t chunk_bytes(int chunk_k) { return 2 * plane_bytes(chunk_k); }

// Offsets within the memory of 16 tokens, int8.
struct Int8Activations {
  size_t steps, sums, half_sums, bytes;

  inline Int8Activations(int k, int chunk_k) {
    steps = round_up(k, chunk_k) * chunk_bytes(chunk_k);
    sums = steps + round_up(k, chunk_k) * kStepBytes;
    half_sums = sums + round_up(k, kSumsK) * kSumsBytes;
    bytes = half_sums + round_up(k, kHalfSumsK) * kSumsBytes;
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
