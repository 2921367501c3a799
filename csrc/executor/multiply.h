// A work item's GEMM, as the kernels want it called.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "executor/expert_weights.h"
#include "executor/work_queue.h"

namespace kt {

// Tokens of one call of a vector kernel: the weights of an item (256 KiB at most) and the activations of the tokens of
// DeepSeek-R1 (64 x 14 KiB) stay together in an L2 of 1 to 2 MiB.
inline constexpr int kVectorTokens = 64;

struct VectorInput {
  const uint8_t* rows;          // activation rows of the type's format
  const int32_t* token_rows;    // [num_tokens] as in GemmParams
  int num_tokens;               // at most kVectorTokens
  const uint8_t* next_weights;  // as in GemmParams
  Prefetch prefetch;
};

// The item's rows of one expert. output: [num_tokens, stride]
void multiply_vectors(const ExpertWeights& weights, const WorkItem& item, int expert, const VectorInput& input,
                      float* output, int stride);

// Activations on the tile path: groups of up to 16 tokens each, from the item's first token on.
struct TileInput {
  TileFormat format;
  const uint8_t* groups;
  size_t group_bytes;
  int group_tokens;
  const uint8_t* next_weights;  // what is read after the item; nullptr: unknown
};

struct TileProduct {
  const ExpertWeights* weights;
  float* output;  // [num_tokens, stride]
};

// The item's rows and tokens of one expert, for matrices of the same K that read the same activations.
void multiply_tiles(std::initializer_list<TileProduct> products, const WorkItem& item, int expert,
                    const TileInput& input, int stride);

}  // namespace kt
