// One call of a layer, as a job of the pool.
#pragma once

#include <atomic>
#include <cstdint>

#include "executor/moe_layer.h"
#include "executor/workspace.h"
#include "moe_params.h"
#include "numa/thread_pool.h"

namespace kt {

// Tokens computed at once, at most. An expert of DeepSeek-R1 then sees 128 of them on average, enough for the tile
// kernels' full rate, and the workspace stays below 1 GB.
inline constexpr int kMaxPieceTokens = 4096;

// Its phases are those of the layer; a call longer than a piece goes through them again. Used for one call after
// another.
class MoECall final : public ThreadPool::Job {
 public:
  // The pool must outlive the call.
  MoECall(int max_num_tokens, const ThreadPool& pool);

  // Returns the first phase. Allocates when this layer or top_k needs more than any before. Throws kt::Error.
  int prepare(const MoELayer* layer, const MoEForwardParams& params);

  void run(int phase, int worker) override { layer_->run_phase(phase, piece_, worker); }
  int next_phase(int phase) override;

  void set_prefetch(Prefetch prefetch) { piece_.prefetch = prefetch; }

  // What this and every smaller call of the layer takes.
  size_t workspace_bytes(const MoELayer& layer, int top_k) const;
  uint64_t num_invalid_ids() const { return num_invalid_ids_.load(std::memory_order_relaxed); }

 private:
  int begin_piece();

  const int max_piece_tokens_;
  Workspace workspace_;
  MoEPiece piece_;
  const MoELayer* layer_ = nullptr;
  MoEForwardParams params_{};
  int first_token_ = 0;
  std::atomic<uint64_t> num_invalid_ids_{0};
};

}  // namespace kt
