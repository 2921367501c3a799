// Sizes and places of activations in the workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>

#include "kernels/kernel_table.h"

namespace kt {

inline constexpr size_t kCacheLine = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline size_t round_up(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Bytes of the first k activations of a row for the vector kernels; k is a whole number of blocks.
inline size_t activation_bytes(const TypeKernels& kernels, int k) {
  return static_cast<size_t>(k / kernels.activation_block) * kernels.activation_block_bytes;
}

// Rows begin on cache lines: kernels may load aligned, and two threads never write one line.
inline size_t activation_row_bytes(const TypeKernels& kernels, int k) { return round_up(activation_bytes(kernels, k)); }

// Fewest activations of which every whole number begins on a cache line of the row.
inline int aligned_activations(const TypeKernels& kernels) {
  return kernels.activation_block * static_cast<int>(kCacheLine / std::gcd(kCacheLine, kernels.activation_block_bytes));
}

}  // namespace kt
