// A scalar kernel table with weights in panels and with tile kernels, for tests of the executor.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "kernels/dispatch.h"
#include "kernels/panel.h"

namespace kt::test {

// Where each byte of a panel block comes from, as pack_panel() itself shows when it packs bytes that count up: the
// executor, and so this table, knows no more of a panel than that it is [k / block_size] permuted blocks of 16 rows.
inline std::vector<int> panel_sources(GgmlType type) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  const size_t bytes = kPanelRows * info.block_bytes;
  std::vector<uint8_t> low(bytes), high(bytes), packed_low(bytes), packed_high(bytes);
  for (size_t i = 0; i < bytes; ++i) low[i] = static_cast<uint8_t>(i), high[i] = static_cast<uint8_t>(i >> 8);
  pack_panel(type, low.data(), info.block_bytes, kPanelRows, info.block_size, packed_low.data());
  pack_panel(type, high.data(), info.block_bytes, kPanelRows, info.block_size, packed_high.data());
  std::vector<int> sources(bytes);
  for (size_t i = 0; i < bytes; ++i) sources[i] = packed_low[i] | packed_high[i] << 8;
  return sources;
}

// Row `row` of a panel, from its first block on: [k]
template <GgmlType type>
std::vector<float> panel_row(const uint8_t* panel, int row, int k) {
  static const std::vector<int> places = [] {  // in the panel block, of each byte of the rows' blocks
    const std::vector<int> sources = panel_sources(type);
    std::vector<int> inverse(sources.size());
    for (size_t i = 0; i < sources.size(); ++i) inverse[sources[i]] = static_cast<int>(i);
    return inverse;
  }();
  const GgmlTypeInfo& info = ggml_type_info(type);
  std::vector<uint8_t> bytes(k / info.block_size * info.block_bytes);
  for (size_t block = 0; block < bytes.size() / info.block_bytes; ++block)
    for (size_t i = 0; i < info.block_bytes; ++i)
      bytes[block * info.block_bytes + i] = panel[block * places.size() + places[row * info.block_bytes + i]];
  std::vector<float> weights(k);
  dequantize(type, bytes.data(), k, weights.data());
  return weights;
}

inline float plain_dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return float(sum);
}

template <GgmlType type>
void panel_gemm(const GemmParams& p) {
  for (int row = 0; row < p.num_rows; ++row) {
    const auto weights = panel_row<type>(p.weights + row / kPanelRows * p.panel_bytes, row % kPanelRows, p.k);
    for (int t = 0; t < p.num_tokens; ++t) {
      const size_t activation_row = p.token_rows ? p.token_rows[t] : t;
      const auto* x = reinterpret_cast<const float*>(p.activations + activation_row * p.activation_row_bytes);
      p.output[t * p.output_stride + row] = plain_dot(weights.data(), x, p.k);
    }
  }
}

// What activations become in a format: bfloat16, and for INT8_256 a rougher float, so that they cannot be mistaken for
// each other; float32 for the vector kernels.
inline float rounded_for_tiles(TileFormat format, float x) {
  const float rounded = bf16_to_f32(f32_to_bf16(x));
  return format == TileFormat::BF16 ? rounded : bf16_to_f32(f32_to_bf16(rounded * 8.0f) & 0xfffc) / 8.0f;
}

inline size_t tile_group_bytes(TileFormat, int k) { return size_t(kTileTokens) * k * sizeof(float); }

// float32, [k][16 tokens] or [16 tokens][k]: taken for the other format they give nonsense.
inline size_t group_place(TileFormat format, int i, int token, int k) {
  return format == TileFormat::BF16 ? size_t(i) * kTileTokens + token : size_t(token) * k + i;
}

inline void store_tile_row(TileFormat format, const float* x, int k_begin, int n, int k, int token, uint8_t* group) {
  KT_CHECK(k_begin % tile_granule(format) == 0, "activations are stored from ", k_begin, " on");
  KT_CHECK(n % tile_granule(format) == 0 || k_begin + n == k, n, " of ", k, " activations are stored");
  auto* values = reinterpret_cast<float*>(group);
  for (int i = 0; i < n; ++i) values[group_place(format, k_begin + i, token, k)] = rounded_for_tiles(format, x[i]);
}

template <GgmlType type, TileFormat format>
void panel_tile_gemm(const TileGemmParams& p) {
  KT_CHECK(p.k_begin % tile_granule(format) == 0, "a part of K from ", p.k_begin, " on");
  std::vector<float> x(p.k);
  for (int row = 0; row < p.num_rows; ++row) {
    const auto weights = panel_row<type>(p.weights + row / kPanelRows * p.panel_bytes, row % kPanelRows, p.k);
    for (int t = 0; t < p.num_tokens; ++t) {
      const auto* group = reinterpret_cast<const float*>(p.activations + t / p.group_tokens * p.group_bytes);
      for (int i = p.k_begin; i < p.k_end; ++i) x[i] = group[group_place(format, i, t % p.group_tokens, p.k)];
      float& output = p.output[t * p.output_stride + row];
      output = (p.accumulate ? output : 0.0f) + plain_dot(&weights[p.k_begin], &x[p.k_begin], p.k_end - p.k_begin);
    }
  }
}

// Tile kernels take experts of tile_min_tokens on; 0: there are none. Quantised types have those of both formats.
template <int tile_min_tokens>
const KernelTable& panel_table() {
  const auto entry = []<GgmlType type>() {
    TypeKernels kernels = *find_type_kernels(*kernel_tables().back(), type);
    kernels.gemm = panel_gemm<type>;
    kernels.panel_rows = kPanelRows;
    if (tile_min_tokens > 0) {
      kernels.tile_gemm[static_cast<int>(TileFormat::BF16)] = panel_tile_gemm<type, TileFormat::BF16>;
      if (type == GgmlType::Q8_0 || type == GgmlType::Q4_K)
        kernels.tile_gemm[static_cast<int>(TileFormat::INT8_256)] = panel_tile_gemm<type, TileFormat::INT8_256>;
      // The smallest threshold is one type's alone: a layer must wait for its last type.
      kernels.tile_min_tokens = type == GgmlType::Q8_0 ? tile_min_tokens : 1;
    }
    return kernels;
  };
  static const TypeKernels types[] = {
      entry.template operator()<GgmlType::F32>(), entry.template operator()<GgmlType::F16>(),
      entry.template operator()<GgmlType::Q8_0>(), entry.template operator()<GgmlType::Q4_K>()};
  static const KernelTable table = [] {
    KernelTable made = *kernel_tables().back();
    made.isa = "panels";
    made.types = types;
    made.num_types = 4;
    if (tile_min_tokens > 0) {
      made.store_tile_row = store_tile_row;
      made.tile_group_bytes = tile_group_bytes;
    }
    return made;
  }();
  return table;
}

}  // namespace kt::test
