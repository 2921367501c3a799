#include "kernels/panel.h"

#include <algorithm>
#include <cstring>

#include "check.h"

namespace kt {
namespace {

// A run of equal units within a GGUF block.
struct Field {
  int offset, unit_bytes, num_units;
};

constexpr int kMaxFields = 5;

struct Layout {
  GgmlType type;
  Field fields[kMaxFields];  // until num_units 0
};

// As in gguf/block_layouts.h; together the fields of a type cover its block.
constexpr Layout kLayouts[] = {
    {GgmlType::F32, {{0, 4, 1}}},
    {GgmlType::F16, {{0, 2, 1}}},
    {GgmlType::BF16, {{0, 2, 1}}},
    {GgmlType::Q4_0, {{0, 2, 1}, {2, 4, 4}}},
    {GgmlType::Q4_1, {{0, 2, 2}, {4, 4, 4}}},
    {GgmlType::Q5_0, {{0, 2, 1}, {2, 4, 1}, {6, 4, 4}}},
    {GgmlType::Q5_1, {{0, 2, 2}, {4, 4, 1}, {8, 4, 4}}},
    {GgmlType::Q8_0, {{0, 2, 1}, {2, 4, 8}}},
    {GgmlType::Q2_K, {{0, 4, 4}, {16, 4, 16}, {80, 2, 2}}},
    {GgmlType::Q3_K, {{0, 4, 8}, {32, 4, 16}, {96, 4, 3}, {108, 2, 1}}},
    {GgmlType::Q4_K, {{0, 2, 2}, {4, 4, 3}, {16, 4, 32}}},
    {GgmlType::Q5_K, {{0, 2, 2}, {4, 4, 3}, {16, 4, 8}, {48, 4, 32}}},
    {GgmlType::Q6_K, {{0, 4, 32}, {128, 4, 16}, {192, 4, 4}, {208, 2, 1}}},
    {GgmlType::IQ4_NL, {{0, 2, 1}, {2, 4, 4}}},
    {GgmlType::IQ4_XS, {{0, 2, 1}, {2, 2, 1}, {4, 4, 1}, {8, 4, 32}}},
    {GgmlType::MXFP4, {{0, 1, 1}, {1, 4, 4}}},
    {GgmlType::IQ1_S, {{0, 2, 1}, {2, 4, 8}, {34, 4, 4}}},
    {GgmlType::IQ1_M, {{0, 4, 8}, {32, 4, 4}, {48, 4, 2}}},
    {GgmlType::IQ2_XXS, {{0, 2, 1}, {2, 4, 16}}},
    {GgmlType::IQ2_XS, {{0, 2, 1}, {2, 4, 16}, {66, 4, 2}}},
    {GgmlType::IQ2_S, {{0, 2, 1}, {2, 4, 16}, {66, 4, 2}, {74, 4, 2}}},
    {GgmlType::IQ3_XXS, {{0, 2, 1}, {2, 4, 24}}},
    {GgmlType::IQ3_S, {{0, 2, 1}, {2, 4, 16}, {66, 4, 2}, {74, 4, 8}, {106, 4, 1}}},
};

const Layout& layout_of(GgmlType type) {
  for (const Layout& layout : kLayouts)
    if (layout.type == type) return layout;
  fail("GGML type ", ggml_type_info(type).name, " has no panel layout");
}

// A row of plain numbers is one long field. Of such, so many units of all rows are done before the next: what is
// written in passes of a row stays in the first level cache.
constexpr int kUnitsAtOnce = 64;

// source: the field in the first row's block. panel: [num_units][16][kUnit]
template <int kUnit>
void pack_field(const uint8_t* source, size_t row_bytes, int num_rows, int num_units, uint8_t* panel) {
  for (int first = 0; first < num_units; first += kUnitsAtOnce) {
    const int end = std::min(num_units, first + kUnitsAtOnce);
    for (int row = 0; row < num_rows; ++row) {
      const uint8_t* from = source + row * row_bytes;
      uint8_t* to = panel + row * kUnit;
      for (int u = first; u < end; ++u) std::memcpy(to + u * kPanelRows * kUnit, from + u * kUnit, kUnit);
    }
  }
}

}  // namespace

void pack_panel(GgmlType type, const uint8_t* rows, size_t row_bytes, int num_rows, int k, uint8_t* panel) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  const Layout& layout = layout_of(type);
  if (num_rows < kPanelRows) std::memset(panel, 0, kPanelRows * ggml_row_bytes(type, k));
  // A row of plain numbers is one field.
  const int num_blocks = info.block_size == 1 ? 1 : k / info.block_size;
  const int units_factor = info.block_size == 1 ? k : 1;
  for (int block = 0; block < num_blocks; ++block)
    for (const Field& field : layout.fields) {
      if (field.num_units == 0) break;
      const size_t offset = block * info.block_bytes + field.offset;
      const int num_units = units_factor * field.num_units;
      if (field.unit_bytes == 4)
        pack_field<4>(rows + offset, row_bytes, num_rows, num_units, panel + kPanelRows * offset);
      else if (field.unit_bytes == 2)
        pack_field<2>(rows + offset, row_bytes, num_rows, num_units, panel + kPanelRows * offset);
      else
        pack_field<1>(rows + offset, row_bytes, num_rows, num_units, panel + kPanelRows * offset);
    }
}

}  // namespace kt
