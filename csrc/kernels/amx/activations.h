// How the activations of 16 tokens stand in memory for the tile kernels.
//
// [k / 32][16 tokens][32] bfloat16, each [16][32] a tile. The 32 of a token are in the order 0 2 1 3, 4 6 5 7, ...: the
// tile unit multiplies pairs, and from four codes in a word those pairs are the easiest to make.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr size_t kTileRowBytes = 64;  // one token's part of a tile
constexpr size_t kTileBytes = 16 * kTileRowBytes;

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
