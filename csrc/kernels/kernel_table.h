// What an instruction set offers the executor: one table of plain functions, chosen once at start.
//
// A table never allocates, never throws, keeps no state, and knows neither layers nor threads.
// GEMM here is: output[token][row] = sum over k of weights[row][k] * activations[token][k].
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_type.h"
#include "gguf/ggml_type.h"

namespace kt {

// How a row of float32 activations is stored for a GEMM. Types with the same format share one quantised row,
// so a token is quantised once however many experts and matrices read it.
enum class ActivationFormat : int32_t {
  F32,     // as they are
  INT8_32  // blocks of 32 with one scale: kernels/activation_blocks.h
};
inline constexpr int kNumActivationFormats = 2;

// How a vector kernel asks for weights before it needs them. Which is faster depends on the processor, by up to a fifth
// both ways, so the executor measures it.
enum class Prefetch : uint8_t {
  kFar,  // 16 KiB ahead, into the second level cache
  kNear  // what is unpacked next, into the first level
};

// The vector kernels: any number of tokens, best for few.
struct GemmParams {
  const uint8_t* weights;      // panels of TypeKernels::panel_rows rows, see kernels/panel.h
  size_t panel_bytes;          // from one panel to the next
  const uint8_t* activations;  // [*, activation_row_bytes], written by the same table's quantize_activations
  size_t activation_row_bytes;
  const int32_t* token_rows;  // [num_tokens]: activations row of token t. May be nullptr: row t
  float* output;              // [num_tokens, output_stride]; output[t * output_stride + r] is overwritten
  size_t output_stride;       // >= num_rows
  int num_rows;
  int num_tokens;
  int k;                                  // multiple of the type's block size
  const uint8_t* next_weights = nullptr;  // what the caller will read next, for prefetching; nullptr: unknown
  Prefetch prefetch = Prefetch::kFar;
};

inline constexpr int kTileTokens = 16;  // tokens of a group, at most
inline constexpr int kTileK = 32;       // K of every tile kernel is a multiple of it

// How the tile kernels multiply, and what activations become for it.
enum class TileFormat : int32_t {
  BF16,     // bfloat16: nearly exact
  INT8_256  // 8 bits with one step for 256 activations, and for 256 weights of a row: half the work for the tile unit
};
inline constexpr int kNumTileFormats = 2;

// Activations are stored, and K is cut, at multiples of it.
constexpr int tile_granule(TileFormat format) { return format == TileFormat::BF16 ? 32 : 256; }

// How many tokens of an expert make a group: as few as give no more groups, since the tile unit takes a group's time by
// its tokens. All groups but the last have so many.
constexpr int tile_group_tokens(int num_tokens) {
  const int num_groups = (num_tokens + kTileTokens - 1) / kTileTokens;
  return (num_tokens + num_groups - 1) / num_groups;
}

// The tile kernels, best from TypeKernels::tile_min_tokens tokens on. They want activations of an expert's tokens in
// groups of up to 16, whatever the type of the weights, in memory only the table understands.
struct TileGemmParams {
  const uint8_t* weights;      // panels of 16 rows
  size_t panel_bytes;          // from one panel to the next
  const uint8_t* activations;  // groups of group_tokens, the last of fewer, written by store_tile_row for all of `k`
  size_t group_bytes;          // from one group to the next: KernelTable::tile_group_bytes of the format
  float* output;               // [num_tokens, output_stride]; exactly [num_tokens, num_rows] is written
  size_t output_stride;        // >= num_rows
  bool accumulate;             // adds to output instead of overwriting it: for a K computed in parts
  int num_rows;
  int num_tokens;                  // at least 1
  int group_tokens = kTileTokens;  // where there are more than 256 tokens: 16
  int k;                           // of a whole row; a multiple of kTileK and of the type's block size
  int k_begin;      // this call computes [k_begin, k_end): multiples of tile_granule() and of the type's block size,
  int k_end;        // or the end of the row
  int k_ahead = 0;  // and asks for the activations of [k_end, k_ahead), which are wanted soon, if that is anything
  const uint8_t* next_weights = nullptr;  // where the next call begins to read, in weights like these; nullptr: unknown
};

// The kernels for weights of one GGML type.
struct TypeKernels {
  GgmlType type;
  ActivationFormat activation_format;
  int activation_block;           // activations a block; k is a multiple of it
  size_t activation_block_bytes;  // a row is k / activation_block blocks, one after another
  // x: [k] -> blocks: [k / activation_block * activation_block_bytes], 64-byte aligned. Any whole number of blocks,
  // so a long row can be split between threads. A block that holds a NaN or infinity decodes to NaN.
  void (*quantize_activations)(const float* x, uint8_t* blocks, int k);
  void (*gemm)(const GemmParams& params);
  int panel_rows = 1;  // 1: weights as in the GGUF file; kPanelRows: repacked by kernels/panel.h
  void (*tile_gemm[kNumTileFormats])(const TileGemmParams& params) = {};  // by TileFormat; nullptr: none
  int tile_min_tokens = 0;  // an expert with at least so many tokens is faster by tile_gemm (measured)
};

struct KernelTable {
  const char* isa;             // what --kt-isa names: "amx", "avx512", "avx2", "reference"
  uint32_t required_features;  // CpuFeature bits; all must be present
  const TypeKernels* types;    // [num_types]
  int num_types;
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; out may be gate
  void (*silu_mul)(const float* gate, const float* up, float* out, int n);
  // y[i] += a * x[i]
  void (*add_scaled)(float a, const float* x, float* y, int n);
  // src: [n] of `type` <-> float32; round to nearest even, NaN stays NaN
  void (*load_floats)(const void* src, FloatType type, float* dst, int n);
  void (*store_floats)(const float* src, FloatType type, void* dst, int n);
  // What sets it apart from other tables of the same isa, for the log: "VNNI"; "" when nothing does.
  const char* variant = "";
  // Bytes of a group of 16 tokens with k activations each, a multiple of 64. nullptr in tables without tile_gemm.
  size_t (*tile_group_bytes)(TileFormat format, int k) = nullptr;
  // x: [n], the activations [k_begin, k_begin + n) of a token, 0 to 15 in its group, of k; multiples of tile_granule(),
  // or the end of the row. group: 64-byte aligned.
  void (*store_tile_row)(TileFormat format, const float* x, int k_begin, int n, int k, int token,
                         uint8_t* group) = nullptr;
};

inline bool has_tile_gemm(const TypeKernels& kernels, TileFormat format) {
  return kernels.tile_gemm[static_cast<int>(format)] != nullptr;
}

// The kernels of `table` for `type`; nullptr when the table has none.
inline const TypeKernels* find_type_kernels(const KernelTable& table, GgmlType type) {
  for (int i = 0; i < table.num_types; ++i)
    if (table.types[i].type == type) return &table.types[i];
  return nullptr;
}

}  // namespace kt
