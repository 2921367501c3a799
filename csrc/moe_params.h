// Plain data that crosses from the bindings into the executor.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/ggml_type.h"
#include "kernels/kernel_table.h"

namespace kt {

// A run of bytes in a file.
struct FileSpan {
  std::string path;
  uint64_t offset;
  uint64_t bytes;
};

// One projection of all experts of a layer: [num_experts, num_rows, num_cols] of `type`, the experts one after another.
// The spans in order make up exactly those bytes: one span for a stacked tensor, num_experts for per-expert tensors.
struct ExpertTensor {
  GgmlType type;
  int num_experts;
  int num_rows;
  int num_cols;
  std::vector<FileSpan> spans;
};

// The routed experts of one MoE layer.
struct MoELayerSpec {
  ExpertTensor gate;  // [num_experts, intermediate_size, hidden_size]
  ExpertTensor up;    // [num_experts, intermediate_size, hidden_size]
  ExpertTensor down;  // [num_experts, hidden_size, intermediate_size]
};

// One call. All pointers stay valid and unchanged from submit() to the end of wait().
struct MoEForwardParams {
  const void* hidden_states;  // [num_tokens, hidden_size] of float_type
  const int32_t* topk_ids;    // [num_tokens, top_k]; an id outside [0, num_experts) contributes nothing (-1: padding)
  const float* topk_weights;  // [num_tokens, top_k]
  void* output;               // [num_tokens, hidden_size] of float_type, overwritten; rows with no expert become 0
  FloatType float_type;
  int num_tokens;  // may be 0
  int top_k;
};

}  // namespace kt
