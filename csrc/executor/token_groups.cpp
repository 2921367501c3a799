#include "executor/token_groups.h"

#include <algorithm>
#include <numeric>

namespace kt {
namespace {

template <typename T>
void grow(std::vector<T>& values, size_t size) {
  if (values.size() < size) values.resize(size);
}

bool in_range(int32_t id, int num_experts) { return static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts); }

}  // namespace

void TokenGroups::reserve(int max_num_tokens, int top_k, int num_experts) {
  const size_t max_slots = static_cast<size_t>(max_num_tokens) * top_k;
  grow(groups_, num_experts);
  grow(order_, num_experts);
  grow(next_slot_, num_experts);
  grow(tokens_, max_slots);
  grow(weights_, max_slots);
  grow(tile_rows_, max_slots);
  grow(token_slots_, max_slots);
  grow(num_token_slots_, max_num_tokens);
  grow(routed_, max_num_tokens);
}

// A counting sort: count per expert, lay the experts out one after another, put every pair in its place.
void TokenGroups::assign(const int32_t* topk_ids, const float* topk_weights, int num_tokens, int top_k, int num_experts,
                         int tile_min_slots) {
  top_k_ = top_k;
  count_slots(topk_ids, num_tokens, num_experts);
  lay_out_groups(num_experts, tile_min_slots);
  for (int i = 0; i < num_routed_tokens_; ++i) {
    for (int k = 0; k < top_k; ++k) {
      const int64_t pair = static_cast<int64_t>(routed_[i]) * top_k + k;
      if (!in_range(topk_ids[pair], num_experts)) continue;
      const int slot = next_slot_[topk_ids[pair]]++;
      tokens_[slot] = routed_[i];
      weights_[slot] = topk_weights[pair];
    }
  }
  link_slots();
}

void TokenGroups::count_slots(const int32_t* topk_ids, int num_tokens, int num_experts) {
  num_routed_tokens_ = num_invalid_ids_ = 0;
  std::fill_n(next_slot_.begin(), num_experts, 0);
  for (int token = 0; token < num_tokens; ++token) {
    num_token_slots_[token] = 0;
    bool routed = false;
    for (int k = 0; k < top_k_; ++k) {
      const int32_t id = topk_ids[static_cast<int64_t>(token) * top_k_ + k];
      if (in_range(id, num_experts)) {
        ++next_slot_[id];
        routed = true;
      } else if (id != -1) {
        ++num_invalid_ids_;
      }
    }
    if (routed) routed_[num_routed_tokens_++] = token;
  }
}

void TokenGroups::lay_out_groups(int num_experts, int tile_min_slots) {
  num_slots_ = num_groups_ = num_tiles_ = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    const int count = next_slot_[expert];
    next_slot_[expert] = num_slots_;
    if (count == 0) continue;
    const bool uses_tiles = count >= tile_min_slots;
    groups_[num_groups_++] = {expert, num_slots_, count, uses_tiles ? num_tiles_ : -1, tile_group_tokens(count)};
    num_slots_ += count;
    if (uses_tiles) num_tiles_ += (count + kTileTokens - 1) / kTileTokens;
  }
  std::iota(order_.begin(), order_.begin() + num_groups_, 0);
  std::sort(order_.begin(), order_.begin() + num_groups_, [this](int a, int b) {
    return groups_[a].num_slots != groups_[b].num_slots ? groups_[a].num_slots > groups_[b].num_slots : a < b;
  });
}

// From slots to their rows in the tiles, and from tokens to their slots.
void TokenGroups::link_slots() {
  for (int g = 0; g < num_groups_; ++g) {
    const Group& group = groups_[g];
    for (int i = 0; i < group.num_slots; ++i) {
      const int slot = group.first_slot + i;
      const int32_t token = tokens_[slot];
      tile_rows_[slot] =
          group.uses_tiles() ? (group.first_tile + i / group.tile_slots) * kTileTokens + i % group.tile_slots : -1;
      token_slots_[int64_t{token} * top_k_ + num_token_slots_[token]++] = slot;
    }
  }
}

}  // namespace kt
