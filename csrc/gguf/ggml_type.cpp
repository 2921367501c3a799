#include "gguf/ggml_type.h"

#include <string>

#include "check.h"
#include "gguf/block_layouts.h"

namespace kt {
namespace {

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::F32, "F32", 1, 4},
    {GgmlType::F16, "F16", 1, 2},
    {GgmlType::Q4_0, "Q4_0", kBlock32, sizeof(BlockQ4_0)},
    {GgmlType::Q4_1, "Q4_1", kBlock32, sizeof(BlockQ4_1)},
    {GgmlType::Q5_0, "Q5_0", kBlock32, sizeof(BlockQ5_0)},
    {GgmlType::Q5_1, "Q5_1", kBlock32, sizeof(BlockQ5_1)},
    {GgmlType::Q8_0, "Q8_0", kBlock32, sizeof(BlockQ8_0)},
    {GgmlType::Q2_K, "Q2_K", kBlockK, sizeof(BlockQ2_K)},
    {GgmlType::Q3_K, "Q3_K", kBlockK, sizeof(BlockQ3_K)},
    {GgmlType::Q4_K, "Q4_K", kBlockK, sizeof(BlockQ4_K)},
    {GgmlType::Q5_K, "Q5_K", kBlockK, sizeof(BlockQ5_K)},
    {GgmlType::Q6_K, "Q6_K", kBlockK, sizeof(BlockQ6_K)},
    {GgmlType::IQ2_XXS, "IQ2_XXS", kBlockK, sizeof(BlockIQ2_XXS)},
    {GgmlType::IQ2_XS, "IQ2_XS", kBlockK, sizeof(BlockIQ2_XS)},
    {GgmlType::IQ3_XXS, "IQ3_XXS", kBlockK, sizeof(BlockIQ3_XXS)},
    {GgmlType::IQ1_S, "IQ1_S", kBlockK, sizeof(BlockIQ1_S)},
    {GgmlType::IQ4_NL, "IQ4_NL", kBlock32, sizeof(BlockIQ4_NL)},
    {GgmlType::IQ3_S, "IQ3_S", kBlockK, sizeof(BlockIQ3_S)},
    {GgmlType::IQ2_S, "IQ2_S", kBlockK, sizeof(BlockIQ2_S)},
    {GgmlType::IQ4_XS, "IQ4_XS", kBlockK, sizeof(BlockIQ4_XS)},
    {GgmlType::IQ1_M, "IQ1_M", kBlockK, sizeof(BlockIQ1_M)},
    {GgmlType::BF16, "BF16", 1, 2},
    {GgmlType::MXFP4, "MXFP4", kBlock32, sizeof(BlockMXFP4)},
};
constexpr int kNumTypes = sizeof(kTypes) / sizeof(kTypes[0]);

std::string known_names() {
  std::string names;
  for (const GgmlTypeInfo& info : kTypes) names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

}  // namespace

const GgmlTypeInfo* ggml_types(int* count) {
  *count = kNumTypes;
  return kTypes;
}

const GgmlTypeInfo& ggml_type_info(GgmlType type) {
  for (const GgmlTypeInfo& info : kTypes)
    if (info.type == type) return info;
  fail("GGML type number ", static_cast<int32_t>(type), " is not supported, expected one of ", known_names(),
       "; use a GGUF file quantised to those types");
}

const GgmlTypeInfo& ggml_type_info(std::string_view name) {
  for (const GgmlTypeInfo& info : kTypes)
    if (info.name == name) return info;
  fail("GGML type '", name, "' is not supported, expected one of ", known_names(),
       "; use a GGUF file quantised to those types");
}

size_t ggml_row_bytes(GgmlType type, int64_t num_cols) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  KT_CHECK(num_cols >= 0 && num_cols % info.block_size == 0, "a row of ", num_cols, " ", info.name,
           " weights does not exist, expected a multiple of the block size ", info.block_size,
           "; check the tensor's shape in the GGUF file");
  return static_cast<size_t>(num_cols / info.block_size) * info.block_bytes;
}

}  // namespace kt
