#include "executor/moe_call.h"

#include <algorithm>

namespace kt {

MoECall::MoECall(int max_num_tokens, const ThreadPool& pool)
    : max_piece_tokens_(std::min(max_num_tokens, kMaxPieceTokens)),
      workspace_(pool.num_workers()),
      piece_(pool, workspace_) {}

size_t MoECall::workspace_bytes(const MoELayer& layer, int top_k) const {
  return layer.workspace_size(max_piece_tokens_, top_k).total(piece_.pool->num_workers());
}

int MoECall::prepare(const MoELayer* layer, const MoEForwardParams& params) {
  workspace_.reserve(layer->workspace_size(max_piece_tokens_, params.top_k));
  piece_.groups.reserve(max_piece_tokens_, params.top_k, layer->num_experts());
  piece_.queue.reserve(layer->num_experts());
  layer_ = layer;
  params_ = params;
  first_token_ = 0;
  return begin_piece();
}

int MoECall::next_phase(int phase) {
  const int next = layer_->begin_phase_after(phase, piece_);
  if (next != ThreadPool::kDone) return next;
  first_token_ += piece_.num_tokens;
  return first_token_ < params_.num_tokens ? begin_piece() : ThreadPool::kDone;
}

// Sorts the tokens alone, on the caller for the first piece: 4096 tokens take under a thousandth of their call.
int MoECall::begin_piece() {
  const int64_t row = layer_->hidden_size() * static_cast<int64_t>(float_bytes(params_.float_type));
  piece_.hidden_states = static_cast<const uint8_t*>(params_.hidden_states) + first_token_ * row;
  piece_.output = static_cast<uint8_t*>(params_.output) + first_token_ * row;
  piece_.float_type = params_.float_type;
  piece_.num_tokens = std::min(params_.num_tokens - first_token_, max_piece_tokens_);
  const int64_t first_pair = int64_t{first_token_} * params_.top_k;
  piece_.groups.assign(params_.topk_ids + first_pair, params_.topk_weights + first_pair, piece_.num_tokens,
                       params_.top_k, layer_->num_experts(), layer_->tile_min_tokens());
  num_invalid_ids_.fetch_add(piece_.groups.num_invalid_ids(), std::memory_order_relaxed);
  return layer_->begin_phase(piece_);
}

}  // namespace kt
