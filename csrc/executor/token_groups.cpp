#include "executor/token_groups.h"

#include <algorithm>

namespace kt {
namespace {

template <typename T>
void grow(std::vector<T>& values, size_t size) {
  if (values.size() < size) values.resize(size);
}

}  // namespace

void TokenGroups::reserve(int max_num_tokens, int top_k, int num_experts) {
  const size_t max_slots = static_cast<size_t>(max_num_tokens) * top_k;
  grow(groups_, num_experts);
  grow(next_slot_, num_experts);
  grow(tokens_, max_slots);
  grow(weights_, max_slots);
  grow(routed_, max_num_tokens);
}

// A counting sort: count per expert, lay the experts out one after another, put every pair in its place.
void TokenGroups::assign(const int32_t* topk_ids, const float* topk_weights, int num_tokens, int top_k,
                         int num_experts) {
  num_slots_ = num_groups_ = num_routed_tokens_ = num_invalid_ids_ = 0;
  std::fill_n(next_slot_.begin(), num_experts, 0);
  const auto in_range = [num_experts](int32_t id) {
    return static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts);
  };

  for (int token = 0; token < num_tokens; ++token) {
    bool routed = false;
    for (int k = 0; k < top_k; ++k) {
      const int32_t id = topk_ids[static_cast<int64_t>(token) * top_k + k];
      if (in_range(id)) {
        ++next_slot_[id];
        routed = true;
      } else if (id != -1) {
        ++num_invalid_ids_;
      }
    }
    if (routed) routed_[num_routed_tokens_++] = token;
  }
  for (int expert = 0; expert < num_experts; ++expert) {
    const int count = next_slot_[expert];
    next_slot_[expert] = num_slots_;
    if (count == 0) continue;
    groups_[num_groups_++] = {expert, num_slots_, count};
    num_slots_ += count;
  }
  for (int i = 0; i < num_routed_tokens_; ++i) {
    for (int k = 0; k < top_k; ++k) {
      const int64_t pair = static_cast<int64_t>(routed_[i]) * top_k + k;
      if (!in_range(topk_ids[pair])) continue;
      const int slot = next_slot_[topk_ids[pair]]++;
      tokens_[slot] = routed_[i];
      weights_[slot] = topk_weights[pair];
    }
  }
}

}  // namespace kt
