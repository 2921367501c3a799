// pack_panel against the rule of kernels/panel.h, with the fields as the structs of gguf/block_layouts.h have them.
#include <algorithm>
#include <cstddef>

#include "random_data.h"

namespace kt::test {
namespace {

struct Member {
  size_t offset, bytes;
};

#define KT_MEMBER(block, name) {offsetof(block, name), sizeof(block::name)}

std::vector<Member> members(GgmlType type) {
  switch (type) {
    case GgmlType::F32:
      return {{0, 4}};
    case GgmlType::F16:
    case GgmlType::BF16:
      return {{0, 2}};
    case GgmlType::Q4_0:
      return {KT_MEMBER(BlockQ4_0, d), KT_MEMBER(BlockQ4_0, qs)};
    case GgmlType::Q4_1:
      return {KT_MEMBER(BlockQ4_1, d), KT_MEMBER(BlockQ4_1, m), KT_MEMBER(BlockQ4_1, qs)};
    case GgmlType::Q5_0:
      return {KT_MEMBER(BlockQ5_0, d), KT_MEMBER(BlockQ5_0, qh), KT_MEMBER(BlockQ5_0, qs)};
    case GgmlType::Q5_1:
      return {KT_MEMBER(BlockQ5_1, d), KT_MEMBER(BlockQ5_1, m), KT_MEMBER(BlockQ5_1, qh), KT_MEMBER(BlockQ5_1, qs)};
    case GgmlType::Q8_0:
      return {KT_MEMBER(BlockQ8_0, d), KT_MEMBER(BlockQ8_0, qs)};
    case GgmlType::Q2_K:
      return {KT_MEMBER(BlockQ2_K, scales), KT_MEMBER(BlockQ2_K, qs), KT_MEMBER(BlockQ2_K, d),
              KT_MEMBER(BlockQ2_K, dmin)};
    case GgmlType::Q3_K:
      return {KT_MEMBER(BlockQ3_K, hmask), KT_MEMBER(BlockQ3_K, qs), KT_MEMBER(BlockQ3_K, scales),
              KT_MEMBER(BlockQ3_K, d)};
    case GgmlType::Q4_K:
      return {KT_MEMBER(BlockQ4_K, d), KT_MEMBER(BlockQ4_K, dmin), KT_MEMBER(BlockQ4_K, scales),
              KT_MEMBER(BlockQ4_K, qs)};
    case GgmlType::Q5_K:
      return {KT_MEMBER(BlockQ5_K, d), KT_MEMBER(BlockQ5_K, dmin), KT_MEMBER(BlockQ5_K, scales),
              KT_MEMBER(BlockQ5_K, qh), KT_MEMBER(BlockQ5_K, qs)};
    case GgmlType::Q6_K:
      return {KT_MEMBER(BlockQ6_K, ql), KT_MEMBER(BlockQ6_K, qh), KT_MEMBER(BlockQ6_K, scales),
              KT_MEMBER(BlockQ6_K, d)};
    case GgmlType::IQ4_NL:
      return {KT_MEMBER(BlockIQ4_NL, d), KT_MEMBER(BlockIQ4_NL, qs)};
    case GgmlType::IQ4_XS:
      return {KT_MEMBER(BlockIQ4_XS, d), KT_MEMBER(BlockIQ4_XS, scales_h), KT_MEMBER(BlockIQ4_XS, scales_l),
              KT_MEMBER(BlockIQ4_XS, qs)};
    case GgmlType::MXFP4:
      return {KT_MEMBER(BlockMXFP4, e), KT_MEMBER(BlockMXFP4, qs)};
    case GgmlType::IQ1_S:
      return {KT_MEMBER(BlockIQ1_S, d), KT_MEMBER(BlockIQ1_S, qs), KT_MEMBER(BlockIQ1_S, qh)};
    case GgmlType::IQ1_M:
      return {KT_MEMBER(BlockIQ1_M, qs), KT_MEMBER(BlockIQ1_M, qh), KT_MEMBER(BlockIQ1_M, scales)};
    case GgmlType::IQ2_XXS:
      return {KT_MEMBER(BlockIQ2_XXS, d), KT_MEMBER(BlockIQ2_XXS, qs)};
    case GgmlType::IQ2_XS:
      return {KT_MEMBER(BlockIQ2_XS, d), KT_MEMBER(BlockIQ2_XS, qs), KT_MEMBER(BlockIQ2_XS, scales)};
    case GgmlType::IQ2_S:
      return {KT_MEMBER(BlockIQ2_S, d), KT_MEMBER(BlockIQ2_S, qs), KT_MEMBER(BlockIQ2_S, signs),
              KT_MEMBER(BlockIQ2_S, qh), KT_MEMBER(BlockIQ2_S, scales)};
    case GgmlType::IQ3_XXS:
      return {KT_MEMBER(BlockIQ3_XXS, d), KT_MEMBER(BlockIQ3_XXS, qs), KT_MEMBER(BlockIQ3_XXS, signs)};
    case GgmlType::IQ3_S:
      return {KT_MEMBER(BlockIQ3_S, d), KT_MEMBER(BlockIQ3_S, qs), KT_MEMBER(BlockIQ3_S, qh),
              KT_MEMBER(BlockIQ3_S, signs), KT_MEMBER(BlockIQ3_S, scales)};
  }
  return {};
}

// Where byte `at` of row `row` belongs in the panel, in [0, 16 * row bytes).
size_t place(const GgmlTypeInfo& info, size_t at, size_t row) {
  const size_t block = at / info.block_bytes, in_block = at % info.block_bytes;
  for (const Member& member : members(info.type)) {
    if (in_block < member.offset || in_block >= member.offset + member.bytes) continue;
    const size_t unit = member.bytes % 4 == 0 ? 4 : member.bytes;
    const size_t in_member = in_block - member.offset;
    return kPanelRows * (block * info.block_bytes + member.offset) + (in_member / unit * kPanelRows + row) * unit +
           in_member % unit;
  }
  CHECK(false, info.name << " byte " << in_block << " of the block is in no field");
  return 0;
}

// One panel of num_rows rows at a stride, at odd addresses, between bytes that must not change.
void check_panel(const GgmlTypeInfo& info, int num_rows, int k) {
  const size_t bytes = ggml_row_bytes(info.type, k), stride = bytes + static_cast<size_t>(random_int(0, 9));
  const size_t panel_bytes = kPanelRows * bytes;
  std::vector<uint8_t> rows(1 + stride * static_cast<size_t>(num_rows));
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(rng()());
  constexpr size_t kAround = 80;
  constexpr uint8_t kFill = 0xee;
  std::vector<uint8_t> panel(panel_bytes + 2 * kAround, kFill), want = panel;
  std::fill(want.begin() + kAround, want.end() - kAround, uint8_t{0});
  for (int row = 0; row < num_rows; ++row)
    for (size_t at = 0; at < bytes; ++at)
      want[kAround + place(info, at, static_cast<size_t>(row))] = rows[1 + static_cast<size_t>(row) * stride + at];
  pack_panel(info.type, rows.data() + 1, stride, num_rows, k, panel.data() + kAround);
  const auto wrong = std::mismatch(panel.begin(), panel.end(), want.begin()).first;
  CHECK(wrong == panel.end(), info.name << " rows " << num_rows << " k " << k << " panel byte "
                                        << wrong - panel.begin() - static_cast<int64_t>(kAround));
}

template <class F>
void for_each_type(F f) {
  int num_types = 0;
  const GgmlTypeInfo* types = ggml_types(&num_types);
  for (int i = 0; i < num_types; ++i) f(types[i]);
}

TEST(every_byte_of_a_block_has_one_place) {
  for_each_type([](const GgmlTypeInfo& info) {
    std::vector<int> uses(kPanelRows * info.block_bytes, 0);
    for (size_t row = 0; row < kPanelRows; ++row)
      for (size_t at = 0; at < info.block_bytes; ++at) ++uses[place(info, at, row)];
    for (int count : uses) CHECK(count == 1, info.name << " has a byte of the panel block used " << count << " times");
  });
}

TEST(panels_are_as_the_rule_says) {
  for_each_type([](const GgmlTypeInfo& info) {
    for (int num_rows = 1; num_rows <= kPanelRows; ++num_rows)
      check_panel(info, num_rows, info.block_size * random_int(1, 3));
    for (int num_blocks = 1; num_blocks <= 40; ++num_blocks)
      check_panel(info, kPanelRows, info.block_size * num_blocks);
    check_panel(info, kPanelRows, 2048);
  });
}

}  // namespace
}  // namespace kt::test
