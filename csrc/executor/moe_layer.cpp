#include "executor/moe_layer.h"

#include <algorithm>
#include <numeric>

#include "executor/layer_check.h"

namespace kt {
namespace {

// Weight rows of one work item. Small enough that a decode step of one token has several items a thread (DeepSeek-R1:
// 512 of gate+up, 224 of down), large enough that taking an item (one contended atomic) and the output's cache lines
// (32 floats are two) cost nothing beside it. Fixed, as the scratch is cut for it; no result depends on it.
constexpr int kRowChunk = 32;

// Tokens of one GEMM call. Bounds scratch, and lets a chunk's weights (2 x 126 KiB for R1 in Q4_K) and the tile's
// activations (64 x 8.75 KiB) stay together in an L2 of 1 MiB.
constexpr int kTokenTile = 64;

// Activations that are worth a work item of their own: below this, taking the item costs as much as the quantising.
constexpr int kMinQuantizeRange = 1024;

constexpr size_t kCacheLine = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
size_t round_up(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

size_t activation_bytes(const TypeKernels& kernels, int k) {
  return static_cast<size_t>(k / kernels.activation_block) * kernels.activation_block_bytes;
}
// Rows begin on cache lines: kernels may load aligned, and two threads never write one line.
size_t activation_row_bytes(const TypeKernels& kernels, int k) { return round_up(activation_bytes(kernels, k)); }

// Fewest activations of which every whole number begins on a cache line of the quantised row.
int aligned_activations(const TypeKernels& kernels) {
  return kernels.activation_block * static_cast<int>(kCacheLine / std::gcd(kCacheLine, kernels.activation_block_bytes));
}

// How a row of k activations is cut when there are fewer rows than workers.
struct RowCut {
  int length;  // activations a range; the last may be shorter
  int ranges;
};
RowCut cut_row(int k, int64_t num_rows, int num_workers, int granule) {
  const int64_t wanted = num_rows >= num_workers ? 1 : ceil_div(num_workers, std::max<int64_t>(num_rows, 1));
  const int64_t length = std::max<int64_t>(ceil_div(k, wanted), kMinQuantizeRange);
  const int64_t aligned = std::min<int64_t>(ceil_div(length, granule) * granule, k);
  return {static_cast<int>(aligned), static_cast<int>(ceil_div(k, aligned))};
}

LoadedTensor describe(const ExpertTensor& spec, const KernelTable& table) {
  return {spec, find_type_kernels(table, spec.type), ggml_row_bytes(spec.type, spec.num_cols), NodeMemory()};
}

const MoELayerSpec& checked(const MoELayerSpec& spec, const KernelTable& table, int index) {
  check_layer(spec, table, index);
  return spec;
}

// A worker's own scratch, one buffer after another.
struct WorkerScratch {
  float* gate;         // [kTokenTile, kRowChunk]; also down's output
  float* up;           // [kTokenTile, kRowChunk]
  float* row;          // [hidden_size]
  float* accumulator;  // [max_num_tokens, kRowChunk]

  WorkerScratch(uint8_t* memory, int hidden_size) {
    gate = reinterpret_cast<float*>(memory);
    up = gate + kTokenTile * kRowChunk;
    row = up + kTokenTile * kRowChunk;
    accumulator = row + round_up(hidden_size * sizeof(float)) / sizeof(float);
  }
  static size_t bytes(int hidden_size, int max_num_tokens) {
    return round_up(hidden_size * sizeof(float)) +
           (2 * kTokenTile + static_cast<size_t>(max_num_tokens)) * kRowChunk * sizeof(float);
  }
};

}  // namespace

MoELayer::MoELayer(const MoELayerSpec& spec, const KernelTable& table, int index)
    : gate(describe(checked(spec, table, index).gate, table)),
      up(describe(spec.up, table)),
      down(describe(spec.down, table)),
      table_(table) {}

WorkspaceSize MoELayer::workspace_size(int max_num_tokens, int top_k) const {
  const size_t tokens = max_num_tokens, slots = tokens * top_k;
  WorkspaceSize size;
  size.input[0] = tokens * activation_row_bytes(*gate.kernels, hidden_size());
  size.input[1] = shares_input() ? 0 : tokens * activation_row_bytes(*up.kernels, hidden_size());
  size.intermediate = slots * intermediate_size() * sizeof(float);
  size.intermediate_quant = slots * activation_row_bytes(*down.kernels, intermediate_size());
  size.worker = WorkerScratch::bytes(hidden_size(), max_num_tokens);
  return size;
}

void MoELayer::run(MoEStage stage, const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const {
  switch (stage) {
    case MoEStage::kQuantizeInput:
      return quantize_input(piece, next_item, worker);
    case MoEStage::kGateUp:
      return gate_up(piece, next_item, worker);
    case MoEStage::kQuantizeIntermediate:
      return quantize_intermediate(piece, next_item);
    case MoEStage::kDown:
      return down_sum(piece, next_item, worker);
  }
}

// Item: a range of one routed token's row. Quantised once for each format, however many experts read it.
void MoELayer::quantize_input(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const {
  const int k = hidden_size();
  const int num_formats = shares_input() ? 1 : 2;
  const TypeKernels* formats[2] = {gate.kernels, up.kernels};
  const int granule = num_formats == 1 ? aligned_activations(*gate.kernels)
                                       : std::lcm(aligned_activations(*gate.kernels), aligned_activations(*up.kernels));
  const RowCut cut = cut_row(k, piece.groups->num_routed_tokens(), piece.num_workers, granule);
  const int64_t num_items = int64_t{piece.groups->num_routed_tokens()} * cut.ranges;
  float* x = WorkerScratch(piece.workspace->worker(worker), k).row;

  for (int64_t item; (item = next_item.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
    const int64_t token = piece.groups->routed_tokens()[item / cut.ranges];
    const int begin = static_cast<int>(item % cut.ranges) * cut.length;
    const int n = std::min(cut.length, k - begin);
    table_.load_floats(piece.hidden_states + (token * k + begin) * float_bytes(piece.float_type), piece.float_type, x,
                       n);
    for (int i = 0; i < num_formats; ++i) {
      uint8_t* row = piece.workspace->input(i) + token * activation_row_bytes(*formats[i], k);
      formats[i]->quantize_activations(x, row + activation_bytes(*formats[i], begin), n);
    }
  }
}

// Item: a chunk of one expert's intermediate rows, for all its tokens.
void MoELayer::gate_up(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const {
  const TokenGroups& groups = *piece.groups;
  const int64_t chunks = ceil_div(intermediate_size(), kRowChunk);
  const WorkerScratch scratch(piece.workspace->worker(worker), hidden_size());
  float* intermediate = reinterpret_cast<float*>(piece.workspace->intermediate());
  const uint8_t* inputs[2] = {piece.workspace->input(0), piece.workspace->input(shares_input() ? 0 : 1)};

  for (int64_t item; (item = next_item.fetch_add(1, std::memory_order_relaxed)) < groups.num_groups() * chunks;) {
    const TokenGroups::Group& group = groups.group(static_cast<int>(item / chunks));
    const int first_row = static_cast<int>(item % chunks) * kRowChunk;
    const int num_rows = std::min(kRowChunk, intermediate_size() - first_row);
    for (int done = 0; done < group.num_slots; done += kTokenTile) {
      const int num_tokens = std::min(kTokenTile, group.num_slots - done);
      const int first_slot = group.first_slot + done;
      const auto multiply = [&](const LoadedTensor& tensor, const uint8_t* input, float* output) {
        tensor.kernels->gemm({.weights = tensor.row(group.expert, first_row),
                              .panel_bytes = tensor.row_bytes,
                              .activations = input,
                              .activation_row_bytes = activation_row_bytes(*tensor.kernels, hidden_size()),
                              .token_rows = groups.slot_tokens() + first_slot,
                              .output = output,
                              .output_stride = kRowChunk,
                              .num_rows = num_rows,
                              .num_tokens = num_tokens,
                              .k = hidden_size()});
      };
      multiply(gate, inputs[0], scratch.gate);
      multiply(up, inputs[1], scratch.up);
      for (int t = 0; t < num_tokens; ++t)
        table_.silu_mul(scratch.gate + t * kRowChunk, scratch.up + t * kRowChunk,
                        intermediate + int64_t{first_slot + t} * intermediate_size() + first_row, num_rows);
    }
  }
}

// Item: a range of one slot's row.
void MoELayer::quantize_intermediate(const MoEPiece& piece, std::atomic<int64_t>& next_item) const {
  const int k = intermediate_size();
  const RowCut cut = cut_row(k, piece.groups->num_slots(), piece.num_workers, aligned_activations(*down.kernels));
  const int64_t num_items = int64_t{piece.groups->num_slots()} * cut.ranges;
  const float* intermediate = reinterpret_cast<const float*>(piece.workspace->intermediate());

  for (int64_t item; (item = next_item.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
    const int64_t slot = item / cut.ranges;
    const int begin = static_cast<int>(item % cut.ranges) * cut.length;
    uint8_t* row = piece.workspace->intermediate_quant() + slot * activation_row_bytes(*down.kernels, k);
    down.kernels->quantize_activations(intermediate + slot * k + begin, row + activation_bytes(*down.kernels, begin),
                                       std::min(cut.length, k - begin));
  }
}

// Item: a chunk of hidden rows, for all experts and tokens. One worker adds up everything that goes into an output
// element, experts ascending, so there is no reduction between threads and the order of the sum is always the same.
void MoELayer::down_sum(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const {
  const TokenGroups& groups = *piece.groups;
  const int64_t chunks = ceil_div(hidden_size(), kRowChunk);
  const WorkerScratch scratch(piece.workspace->worker(worker), hidden_size());
  const size_t row_bytes = activation_row_bytes(*down.kernels, intermediate_size());

  for (int64_t item; (item = next_item.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
    const int first_row = static_cast<int>(item) * kRowChunk;
    const int num_rows = std::min(kRowChunk, hidden_size() - first_row);
    std::fill_n(scratch.accumulator, int64_t{piece.num_tokens} * kRowChunk, 0.0f);
    for (int g = 0; g < groups.num_groups(); ++g) {
      const TokenGroups::Group& group = groups.group(g);
      for (int done = 0; done < group.num_slots; done += kTokenTile) {
        const int num_tokens = std::min(kTokenTile, group.num_slots - done);
        const int first_slot = group.first_slot + done;
        down.kernels->gemm({.weights = down.row(group.expert, first_row),
                            .panel_bytes = down.row_bytes,
                            .activations = piece.workspace->intermediate_quant() + first_slot * row_bytes,
                            .activation_row_bytes = row_bytes,
                            .token_rows = nullptr,
                            .output = scratch.gate,
                            .output_stride = kRowChunk,
                            .num_rows = num_rows,
                            .num_tokens = num_tokens,
                            .k = intermediate_size()});
        for (int t = 0; t < num_tokens; ++t)
          table_.add_scaled(groups.slot_weights()[first_slot + t], scratch.gate + t * kRowChunk,
                            scratch.accumulator + int64_t{groups.slot_tokens()[first_slot + t]} * kRowChunk, num_rows);
      }
    }
    const size_t element = float_bytes(piece.float_type);
    for (int64_t token = 0; token < piece.num_tokens; ++token)
      table_.store_floats(scratch.accumulator + token * kRowChunk, piece.float_type,
                          piece.output + (token * hidden_size() + first_row) * element, num_rows);
  }
}

}  // namespace kt
