// One layer's experts: its weights and the four stages that compute it.
#pragma once

#include <atomic>
#include <cstdint>

#include "executor/token_groups.h"
#include "executor/workspace.h"
#include "kernels/kernel_table.h"
#include "moe_params.h"
#include "numa/node_memory.h"

namespace kt {

enum class MoEStage : int { kQuantizeInput, kGateUp, kQuantizeIntermediate, kDown };

// Part of a call that the workspace holds at once. Pointers are to the part's own first token.
struct MoEPiece {
  const uint8_t* hidden_states;  // [num_tokens, hidden_size] of float_type
  uint8_t* output;               // [num_tokens, hidden_size] of float_type
  FloatType float_type;
  int num_tokens;
  const TokenGroups* groups;
  const Workspace* workspace;
  int num_workers;
};

// The weights of one projection: rows as in the GGUF file, expert after expert.
struct LoadedTensor {
  ExpertTensor spec;
  const TypeKernels* kernels;
  size_t row_bytes;
  NodeMemory memory;  // empty until allocate()

  size_t bytes() const { return row_bytes * spec.num_rows * spec.num_experts; }
  const uint8_t* row(int expert, int row) const {
    return memory.data() + (static_cast<size_t>(expert) * spec.num_rows + row) * row_bytes;
  }
};

// Immutable once its weights are there; run() is then for any number of threads.
class MoELayer {
 public:
  // Checks shapes, kernels, spans and file lengths. Reads and allocates nothing. `index` is for the texts.
  // `table` must outlive the layer. Throws kt::Error.
  MoELayer(const MoELayerSpec& spec, const KernelTable& table, int index);

  int hidden_size() const { return gate.spec.num_cols; }
  int intermediate_size() const { return gate.spec.num_rows; }
  int num_experts() const { return gate.spec.num_experts; }
  WorkspaceSize workspace_size(int max_num_tokens, int top_k) const;

  // Takes work items of the stage from next_item (0 at the stage's start) until none is left. Every worker calls it;
  // a stage may begin when all workers have left the one before. The result of a token does not depend on the number
  // of workers, on who takes which item, or on the other tokens.
  void run(MoEStage stage, const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const;

  LoadedTensor gate, up, down;
  bool loaded = false;

 private:
  void quantize_input(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const;
  void gate_up(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const;
  void quantize_intermediate(const MoEPiece& piece, std::atomic<int64_t>& next_item) const;
  void down_sum(const MoEPiece& piece, std::atomic<int64_t>& next_item, int worker) const;
  bool shares_input() const { return gate.kernels->activation_format == up.kernels->activation_format; }

  const KernelTable& table_;
};

}  // namespace kt
