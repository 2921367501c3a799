#include "gguf/ggml_type.h"

#include <string>

#include "check.h"
#include "gguf/block_layouts.h"

namespace kt {
namespace {

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::F32, "F32", 1, 4},
    {GgmlType::F16, "F16", 1, 2},
    {GgmlType::Q8_0, "Q8_0", kBlockQ8_0, sizeof(BlockQ8_0)},
    {GgmlType::Q4_K, "Q4_K", kBlockK, sizeof(BlockQ4_K)},
    {GgmlType::Q5_K, "Q5_K", kBlockK, sizeof(BlockQ5_K)},
    {GgmlType::Q6_K, "Q6_K", kBlockK, sizeof(BlockQ6_K)},
    {GgmlType::BF16, "BF16", 1, 2},
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
