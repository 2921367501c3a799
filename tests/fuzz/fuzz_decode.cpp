// Any bytes as blocks of any type: nothing may be read or written outside of its buffer (the sanitizers see to that),
// blocks are decoded independently of each other, and every kernel table that runs here takes them.
// Input: a byte that picks the type, then blocks; what is left of the last one is ignored.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "kernels/panel.h"

namespace kt {
namespace {

[[noreturn]] void broken(const char* what, const GgmlTypeInfo& info) {
  std::fprintf(stderr, "%s: %s\n", info.name, what);
  std::abort();
}

// Bit for bit, but any NaN equals any NaN: which operand's payload a sum keeps is up to the compiler.
bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (a != a && b != b); }

void expect_refused(const GgmlTypeInfo& info, int64_t num_weights) {
  try {
    dequantize(info.type, nullptr, num_weights, nullptr);
  } catch (const Error&) {
    return;
  }
  broken("part of a block was not refused", info);
}

// bytes: num_blocks blocks.
void check_decoding(const GgmlTypeInfo& info, const uint8_t* bytes, size_t num_blocks) {
  const size_t block_size = static_cast<size_t>(info.block_size);
  std::vector<float> whole(num_blocks * block_size), single(block_size);
  dequantize(info.type, bytes, static_cast<int64_t>(whole.size()), whole.data());
  for (size_t b = 0; b < num_blocks; ++b) {
    dequantize(info.type, bytes + b * info.block_bytes, info.block_size, single.data());
    if (std::memcmp(single.data(), &whole[b * block_size], block_size * sizeof(float)) != 0)
      broken("a block alone decodes to something else than among others", info);
  }
  if (block_size > 1) expect_refused(info, static_cast<int64_t>(whole.size()) + 1);
  expect_refused(info, -static_cast<int64_t>(block_size));
}

struct AlignedDelete {
  void operator()(uint8_t* bytes) const { operator delete(bytes, std::align_val_t{64}); }
};

// All tokens have the same activations. output: [num_tokens, num_rows]
void check_same_tokens(const GgmlTypeInfo& info, const std::vector<float>& output, int num_rows) {
  for (size_t i = static_cast<size_t>(num_rows); i < output.size(); ++i)
    if (!same(output[i], output[i % static_cast<size_t>(num_rows)]))
      broken("tokens with the same activations got different results", info);
}

// vector: the call of the vector kernel on the same panel; x: [k].
void run_tiles(const GgmlTypeInfo& info, const KernelTable& table, const TypeKernels& kernels, TileFormat format,
               const GemmParams& vector, const std::vector<float>& x) {
  const size_t group_bytes = table.tile_group_bytes(format, vector.k);
  const std::unique_ptr<uint8_t, AlignedDelete> group(
      static_cast<uint8_t*>(operator new(group_bytes, std::align_val_t{64})));
  for (int token = 0; token < vector.num_tokens; ++token)
    table.store_tile_row(format, x.data(), 0, vector.k, vector.k, token, group.get());
  std::vector<float> output(static_cast<size_t>(vector.num_tokens) * vector.num_rows);
  TileGemmParams params;
  params.weights = vector.weights;
  params.panel_bytes = vector.panel_bytes;
  params.activations = group.get();
  params.group_bytes = group_bytes;
  params.output = output.data();
  params.output_stride = vector.output_stride;
  params.accumulate = false;
  params.num_rows = vector.num_rows;
  params.num_tokens = vector.num_tokens;
  params.k = vector.k;
  params.k_begin = 0;
  params.k_end = vector.k;
  kernels.tile_gemm[static_cast<int>(format)](params);
  check_same_tokens(info, output, vector.num_rows);
}

// bytes: num_rows rows of blocks_per_row blocks. Every buffer is exactly as long as the kernel's contract says.
void run_kernels(const GgmlTypeInfo& info, const uint8_t* bytes, int num_rows, size_t blocks_per_row) {
  const int num_tokens = 3, k = static_cast<int>(blocks_per_row) * info.block_size;
  std::vector<float> x(static_cast<size_t>(k));
  for (int i = 0; i < k; ++i) x[i] = static_cast<float>(i % 7 - 3);
  for (const KernelTable* table : kernel_tables()) {
    if (table->required_features & ~detect_cpu_features()) continue;
    const TypeKernels* kernels = find_type_kernels(*table, info.type);
    if (!kernels || k % kernels->activation_block != 0) continue;
    const size_t row_bytes = static_cast<size_t>(k / kernels->activation_block) * kernels->activation_block_bytes;
    const std::unique_ptr<uint8_t, AlignedDelete> activations(
        static_cast<uint8_t*>(operator new(row_bytes, std::align_val_t{64})));
    kernels->quantize_activations(x.data(), activations.get(), k);
    const int32_t token_rows[num_tokens] = {0, 0, 0};
    std::vector<float> output(static_cast<size_t>(num_tokens) * num_rows);
    const size_t weight_row_bytes = blocks_per_row * info.block_bytes;
    std::vector<uint8_t> panel;  // of at most 16 rows, from the heap and exactly as long as needed
    if (kernels->panel_rows > 1) {
      panel.resize(kPanelRows * weight_row_bytes);
      pack_panel(info.type, bytes, weight_row_bytes, num_rows, k, panel.data());
    }
    GemmParams params;
    params.weights = kernels->panel_rows > 1 ? panel.data() : bytes;
    params.panel_bytes = kernels->panel_rows > 1 ? panel.size() : weight_row_bytes;
    params.activations = activations.get();
    params.activation_row_bytes = row_bytes;
    params.token_rows = token_rows;
    params.output = output.data();
    params.output_stride = static_cast<size_t>(num_rows);
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.k = k;
    kernels->gemm(params);
    check_same_tokens(info, output, num_rows);
    for (TileFormat format : {TileFormat::BF16, TileFormat::INT8_256})
      if (has_tile_gemm(*kernels, format) && k % kTileK == 0) run_tiles(info, *table, *kernels, format, params, x);
  }
}

}  // namespace
}  // namespace kt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  int num_types = 0;
  const kt::GgmlTypeInfo* types = kt::ggml_types(&num_types);
  const kt::GgmlTypeInfo& info = types[data[0] % num_types];
  const size_t num_blocks = (size - 1) / info.block_bytes;
  // A copy that ends where the blocks end, at an odd address.
  std::vector<uint8_t> storage(1 + num_blocks * info.block_bytes);
  if (num_blocks > 0) std::memcpy(storage.data() + 1, data + 1, num_blocks * info.block_bytes);
  kt::check_decoding(info, storage.data() + 1, num_blocks);
  for (int num_rows : {1, 2, 5})
    if (const size_t blocks_per_row = num_blocks / static_cast<size_t>(num_rows)) {
      // The last rows, so that reading past one of them is reading past the end.
      const size_t skipped = (num_blocks - blocks_per_row * static_cast<size_t>(num_rows)) * info.block_bytes;
      kt::run_kernels(info, storage.data() + 1 + skipped, num_rows, blocks_per_row);
    }
  return 0;
}
