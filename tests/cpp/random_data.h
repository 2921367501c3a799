// Random weights and activations, and their meaning in plain floats.
#pragma once

#include <cmath>
#include <cstring>

#include "gguf/block_layouts.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "kernels/activation_blocks.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "kernels/panel.h"
#include "test_harness.h"

namespace kt::test {

// The tables this CPU can run.
inline std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* table : kernel_tables()) {
    const uint32_t missing = table->required_features & ~detect_cpu_features();
    if (missing == 0)
      tables.push_back(table);
    else
      std::cout << "not run: " << table->isa << " (this CPU lacks " << cpu_feature_names(missing) << ")\n";
  }
  return tables;
}

// Where a quantised type keeps its float16 factors and its quants, in bytes from the start of a block. Quants are given
// where a quant of 0 decodes to an offset that a kernel may treat apart.
struct BlockShape {
  std::vector<int> factors;
  int quants_begin, quants_end;
};

inline BlockShape block_shape(GgmlType type) {
  switch (type) {
    case GgmlType::Q4_0:
      return {{0}, 2, 18};
    case GgmlType::Q4_1:
      return {{0, 2}, 4, 20};
    case GgmlType::Q5_0:
      return {{0}, 2, 22};
    case GgmlType::Q5_1:
      return {{0, 2}, 4, 24};
    case GgmlType::Q8_0:
      return {{0}, 2, 34};
    case GgmlType::Q2_K:
      return {{80, 82}, 16, 80};
    case GgmlType::Q3_K:
      return {{108}, 0, 96};
    case GgmlType::Q4_K:
      return {{0, 2}, 16, 144};
    case GgmlType::Q5_K:
      return {{0, 2}, 16, 176};
    case GgmlType::Q6_K:
      return {{208}, 0, 192};
    case GgmlType::IQ1_S:
    case GgmlType::IQ2_XXS:
    case GgmlType::IQ2_XS:
    case GgmlType::IQ2_S:
    case GgmlType::IQ3_XXS:
    case GgmlType::IQ3_S:
    case GgmlType::IQ4_NL:
    case GgmlType::IQ4_XS:
      return {{0}, 0, 0};
    default:
      return {{}, 0, 0};
  }
}

// Gives a block of random bytes factors of about 0.01. block: [block_bytes].
inline void write_factors(GgmlType type, uint8_t* block) {
  for (int at : block_shape(type).factors) {
    const uint16_t factor = f32_to_f16(random_normal() * 0.01f);
    std::memcpy(block + at, &factor, 2);
  }
  if (type == GgmlType::IQ1_M) {  // a nibble at the top of each of the 4 words of scales
    const uint16_t factor = f32_to_f16(random_normal() * 0.01f);
    uint8_t* scales = reinterpret_cast<BlockIQ1_M*>(block)->scales;
    for (int i = 0; i < 4; ++i)
      scales[2 * i + 1] = static_cast<uint8_t>((scales[2 * i + 1] & 15) | (factor >> (4 * i) & 15) << 4);
  }
  if (type == GgmlType::MXFP4) *block = static_cast<uint8_t>(random_int(120, 122));  // as a model's: close
}

// What quants of 0 decode to. block: [block_bytes]; offsets: [block_size].
inline void decode_offsets(GgmlType type, const uint8_t* block, float* offsets) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  const BlockShape shape = block_shape(type);
  std::vector<uint8_t> changed(block, block + info.block_bytes);
  if (type == GgmlType::IQ1_S || type == GgmlType::IQ1_M) {
    // scale * (grid + delta), less the same with the other sign of delta, is twice the offset.
    if (type == GgmlType::IQ1_S)
      for (int i = 0; i < 8; ++i) reinterpret_cast<BlockIQ1_S*>(changed.data())->qh[2 * i + 1] ^= 0x80;
    else
      for (uint8_t& byte : reinterpret_cast<BlockIQ1_M*>(changed.data())->qh) byte ^= 0x88;
    std::vector<float> mirrored(static_cast<size_t>(info.block_size));
    dequantize(type, changed.data(), info.block_size, mirrored.data());
    dequantize(type, block, info.block_size, offsets);
    for (int i = 0; i < info.block_size; ++i) offsets[i] = 0.5f * (offsets[i] - mirrored[i]);
  } else if (shape.quants_end > 0) {
    std::fill(changed.begin() + shape.quants_begin, changed.begin() + shape.quants_end, uint8_t{0});
    dequantize(type, changed.data(), info.block_size, offsets);
  }
}

struct Weights {
  GgmlType type;
  int num_rows, k;
  size_t row_bytes;              // a few more than needed
  std::vector<uint8_t> storage;  // rows start at an odd address
  std::vector<float> values;     // [num_rows, k]
  std::vector<float> offsets;    // [num_rows, k]: what a quant of 0 decodes to; 0 for float types

  const uint8_t* data() const { return storage.data() + 1; }
};

inline Weights random_weights(GgmlType type, int num_rows, int k) {
  Weights w{type, num_rows, k, ggml_row_bytes(type, k) + static_cast<size_t>(random_int(0, 3)), {}, {}, {}};
  w.storage.resize(1 + w.row_bytes * static_cast<size_t>(num_rows));
  for (uint8_t& byte : w.storage) byte = static_cast<uint8_t>(rng()());
  w.values.resize(static_cast<size_t>(num_rows) * k);
  w.offsets.assign(w.values.size(), 0.0f);

  const GgmlTypeInfo& info = ggml_type_info(type);
  for (int row = 0; row < num_rows; ++row) {
    uint8_t* bytes = w.storage.data() + 1 + w.row_bytes * static_cast<size_t>(row);
    float* values = w.values.data() + static_cast<size_t>(row) * k;
    float* offsets = w.offsets.data() + static_cast<size_t>(row) * k;
    for (int b = 0; b < k / info.block_size; ++b) {
      uint8_t* block = bytes + static_cast<size_t>(b) * info.block_bytes;
      if (type == GgmlType::F32) {
        const float value = random_normal();
        std::memcpy(block, &value, 4);
      } else if (info.block_size == 1) {
        const uint16_t value = type == GgmlType::F16 ? f32_to_f16(random_normal()) : f32_to_bf16(random_normal());
        std::memcpy(block, &value, 2);
      }
      write_factors(type, block);
      decode_offsets(type, block, offsets + static_cast<size_t>(b) * info.block_size);
    }
    dequantize(type, bytes, k, values);
  }
  return w;
}

// Activation rows as a table stores them.
struct Activations {
  int k;
  size_t row_bytes;
  std::vector<uint8_t> storage;
  uint8_t* rows;               // 64-byte aligned, in storage
  std::vector<float> x;        // [num_rows, k]: as given
  std::vector<float> decoded;  // [num_rows, k]: what the stored rows mean
  std::vector<float> scales;   // [num_rows, k]: the step of each; 0 for float32 rows
};

inline const ActivationBlock32& block_at(const uint8_t* blocks, int i) {
  return reinterpret_cast<const ActivationBlock32*>(blocks)[i / 32];
}

// blocks: k activations. decoded, scales: [k].
inline void decode_activations(ActivationFormat format, const uint8_t* blocks, int k, float* decoded, float* scales) {
  for (int i = 0; i < k; ++i) {
    if (format == ActivationFormat::F32) {
      std::memcpy(decoded + i, blocks + 4 * static_cast<size_t>(i), 4);
      scales[i] = 0;
    } else {
      scales[i] = block_at(blocks, i).scale;
      decoded[i] = scales[i] * static_cast<float>(block_at(blocks, i).q[i % 32]);
    }
  }
}

inline Activations store_activations(const TypeKernels& kernels, std::vector<float> x, int k) {
  Activations a;
  a.k = k;
  const size_t num_rows = x.size() / static_cast<size_t>(k);
  a.row_bytes = (static_cast<size_t>(k) / kernels.activation_block * kernels.activation_block_bytes + 63) / 64 * 64;
  a.storage.resize(a.row_bytes * num_rows + 63);
  a.rows = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(a.storage.data()) + 63) / 64 * 64);
  a.x = std::move(x);
  a.decoded.resize(a.x.size());
  a.scales.resize(a.x.size());
  for (size_t row = 0; row < num_rows; ++row) {
    kernels.quantize_activations(a.x.data() + row * k, a.rows + row * a.row_bytes, k);
    decode_activations(kernels.activation_format, a.rows + row * a.row_bytes, k, a.decoded.data() + row * k,
                       a.scales.data() + row * k);
  }
  return a;
}

inline std::vector<float> random_floats(size_t n, float scale = 1.0f) {
  std::vector<float> x(n);
  for (float& value : x) value = scale * random_normal();
  return x;
}

// [num_tokens] rows in [0, num_activation_rows), repeats allowed.
inline std::vector<int32_t> random_rows(int num_tokens, int num_activation_rows) {
  std::vector<int32_t> rows(static_cast<size_t>(num_tokens));
  for (int32_t& row : rows) row = random_int(0, num_activation_rows - 1);
  return rows;
}

inline constexpr float kUntouched = -12345.0f;  // fills what a kernel must not write

// Weights as the kernels of a table want them.
struct StoredWeights {
  std::vector<uint8_t> storage;
  const uint8_t* panels;  // 64-byte aligned when packed
  size_t panel_bytes;
};

inline StoredWeights store_weights(const TypeKernels& kernels, const Weights& w) {
  StoredWeights stored;
  if (kernels.panel_rows == 1) {
    stored.storage.assign(w.data(), w.data() + w.row_bytes * static_cast<size_t>(w.num_rows));
    stored.panels = stored.storage.data();
    stored.panel_bytes = w.row_bytes;
    return stored;
  }
  const int num_panels = (w.num_rows + kPanelRows - 1) / kPanelRows;
  stored.panel_bytes = kPanelRows * ggml_row_bytes(w.type, w.k);
  stored.storage.assign(stored.panel_bytes * num_panels + 63, 0xee);
  auto* panels = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(stored.storage.data()) + 63) / 64 * 64);
  for (int i = 0; i < num_panels; ++i)
    pack_panel(w.type, w.data() + w.row_bytes * i * kPanelRows, w.row_bytes,
               std::min(kPanelRows, w.num_rows - i * kPanelRows), w.k, panels + stored.panel_bytes * i);
  stored.panels = panels;
  return stored;
}

// [num_tokens, stride]. row_begin: a multiple of panel_rows.
inline std::vector<float> run_gemm(const TypeKernels& kernels, const Weights& w, const Activations& a,
                                   const int32_t* token_rows, int num_tokens, int stride, int row_begin, int row_end) {
  const StoredWeights stored = store_weights(kernels, w);
  std::vector<float> output(static_cast<size_t>(num_tokens) * stride, kUntouched);
  GemmParams params;
  params.weights = stored.panels + stored.panel_bytes * static_cast<size_t>(row_begin / kernels.panel_rows);
  params.panel_bytes = stored.panel_bytes;
  params.activations = a.rows;
  params.activation_row_bytes = a.row_bytes;
  params.token_rows = token_rows;
  params.prefetch = random_int(0, 1) == 0 ? Prefetch::kFar : Prefetch::kNear;
  params.output = output.data();
  params.output_stride = static_cast<size_t>(stride);
  params.num_rows = row_end - row_begin;
  params.num_tokens = num_tokens;
  params.k = w.k;
  kernels.gemm(params);
  return output;
}

// "avx512 VNNI"
inline std::string table_name(const KernelTable& table) {
  return *table.variant == 0 ? table.isa : std::string(table.isa) + " " + table.variant;
}

}  // namespace kt::test
