// The GGML tensor types the executor computes on, with the numbers the GGUF format gives them.
// Adding one: an entry here, its block in block_layouts.h, its decoder, and a line in each kernel table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kt {

enum class GgmlType : int32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  IQ1_M = 29,
  BF16 = 30,
  MXFP4 = 39,
};

struct GgmlTypeInfo {
  GgmlType type;
  const char* name;    // as in GGMLQuantizationType, e.g. "Q4_K"
  int block_size;      // weights a block
  size_t block_bytes;  // bytes a block
};

// Every type above, in ascending order of its number. count receives the length.
const GgmlTypeInfo* ggml_types(int* count);

// Throws kt::Error for a type that is not in the table.
const GgmlTypeInfo& ggml_type_info(GgmlType type);
const GgmlTypeInfo& ggml_type_info(std::string_view name);

// Bytes of one row of num_cols weights. num_cols must be a multiple of the block size (throws kt::Error).
size_t ggml_row_bytes(GgmlType type, int64_t num_cols);

}  // namespace kt
