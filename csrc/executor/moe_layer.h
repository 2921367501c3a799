// One layer's experts: its weights and the stages that compute it.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "executor/down_passes.h"
#include "executor/expert_weights.h"
#include "executor/token_groups.h"
#include "executor/work_queue.h"
#include "executor/workspace.h"
#include "kernels/kernel_table.h"
#include "moe_params.h"
#include "numa/thread_pool.h"

namespace kt {

// Part of a call that the workspace holds at once. Pointers are to the part's own first token.
struct MoEPiece {
  const ThreadPool* pool = nullptr;
  Workspace* workspace = nullptr;
  TokenGroups groups;

  const uint8_t* hidden_states = nullptr;  // [num_tokens, hidden_size] of float_type
  uint8_t* output = nullptr;               // [num_tokens, hidden_size] of float_type
  FloatType float_type{};
  int num_tokens = 0;
  Prefetch prefetch = Prefetch::kFar;

  // Of the phase that is running; set by MoELayer::begin_phase().
  DownPasses passes;
  std::vector<RowRange> rows;  // [slices]
  WorkQueue queue;
  alignas(64) std::atomic<int64_t> next_token_item{0};  // of the work on whole tokens: prepare, merge

  MoEPiece(const ThreadPool& on, Workspace& in)
      : pool(&on), workspace(&in), rows(on.num_nodes()), queue(on.workers_on_nodes()) {}
};

// Immutable once its weights are there; run_phase() is then for any number of threads.
//
// A piece is computed in phases, which all workers run together:
//   0      prepare: tokens as the kernels of gate and up want them
//   1      gate_up: silu(gate) * up of every slot, as down's kernels want it
//   2 + p  merge of pass p - 1, the weighted sum of each token's slots to the output, and down of pass p, the hidden
//          rows of that pass for every slot; from p = 0, which has nothing to merge, to p = num_passes, which only
//          merges
//
// An expert with many tokens goes through the tile kernels, where the table has them for all three matrices, the others
// through the vector kernels; both read and write slots of their own. The result of a token depends on the path of its
// experts, but not on the number of workers or nodes, on who takes which item, or on the other tokens otherwise.
class MoELayer {
 public:
  // Checks shapes, kernels, spans and file lengths. Reads and allocates nothing. `index` is for the texts.
  // `table` and `pool` must outlive the layer. Throws kt::Error.
  MoELayer(const MoELayerSpec& spec, const KernelTable& table, const ThreadPool& pool, int index);

  int hidden_size() const { return gate_.k(); }
  int intermediate_size() const { return gate_.num_rows(); }
  int num_experts() const { return gate_.num_experts(); }
  // An expert with at least so many tokens goes through the tile kernels; beyond any number when there are none.
  int tile_min_tokens() const { return tile_min_tokens_; }
  WorkspaceSize workspace_size(int max_num_tokens, int top_k) const;

  // The first phase of a piece whose groups are assigned, or the one after `phase`; -1 when that was the last.
  // Sets up what the piece needs for it. One thread, while no worker runs.
  int begin_phase(MoEPiece& piece) const;
  int begin_phase_after(int phase, MoEPiece& piece) const;
  // Takes work items until none is left. Every worker calls it.
  void run_phase(int phase, MoEPiece& piece, int worker) const;

  // Memory, and what is to be read into it. Throws kt::Error.
  void prepare_loading(ExpertLoader& loader);
  const ExpertWeights& gate() const { return gate_; }
  const ExpertWeights& up() const { return up_; }
  const ExpertWeights& down() const { return down_; }
  bool loaded = false;

 private:
  struct Scratch;

  void begin(int phase, MoEPiece& piece) const;
  void prepare(MoEPiece& piece, int worker) const;
  void gate_up(MoEPiece& piece, int worker) const;
  static const uint8_t* next_panel(const ExpertWeights& weights, const MoEPiece& piece, const WorkItem& item);
  void gate_up_vectors(const MoEPiece& piece, const WorkItem& item, const Scratch& scratch) const;
  void gate_up_tiles(const MoEPiece& piece, const WorkItem& item, const Scratch& scratch) const;
  void down(MoEPiece& piece, int pass, int worker) const;
  void down_vectors(const MoEPiece& piece, const WorkItem& item, float* output) const;
  void down_tiles(const MoEPiece& piece, const WorkItem& item, float* output) const;
  void merge(MoEPiece& piece, int pass, int worker) const;
  void store_tiles(TileFormat format, const float* x, int begin, int n, int k, int64_t row, uint8_t* tiles) const;
  bool has_tiles() const;
  bool shares_input() const { return gate_.kernels().activation_format == up_.kernels().activation_format; }

  const KernelTable& table_;
  const ThreadPool& pool_;
  ExpertWeights gate_, up_, down_;
  int vector_granule_;  // of intermediate rows
  TileFormat input_tile_format_;
  int tile_min_tokens_;
};

}  // namespace kt
