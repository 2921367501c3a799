// The tokens of one call, sorted by the expert they go to.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel_table.h"

namespace kt {

// A slot is one (token, expert) pair that counts; slots are numbered expert by expert, in token order within an expert.
// A group of many slots goes to the tile kernels; its slots are numbered a second time, as rows of activation tiles, so
// that each such group begins with a tile of its own.
// Plain data, one writer at a time. reserve() allocates, assign() does not.
class TokenGroups {
 public:
  struct Group {
    int expert;
    int first_slot;
    int num_slots;   // at least 1
    int first_tile;  // of tile_slots slots each; -1: computed by the vector kernels
    int tile_slots;  // at most kTileTokens
    bool uses_tiles() const { return first_tile >= 0; }
  };

  struct Slots {  // of one token, experts ascending
    const int32_t* slots;
    int count;
    const int32_t* begin() const { return slots; }
    const int32_t* end() const { return slots + count; }
  };

  void reserve(int max_num_tokens, int top_k, int num_experts);

  // topk_ids, topk_weights: [num_tokens, top_k]. Within what reserve() was given. Ids outside [0, num_experts) get no
  // slot. A group of tile_min_slots or more uses tiles.
  void assign(const int32_t* topk_ids, const float* topk_weights, int num_tokens, int top_k, int num_experts,
              int tile_min_slots);

  int num_slots() const { return num_slots_; }
  int num_groups() const { return num_groups_; }
  int num_tiles() const { return num_tiles_; }
  const Group& group(int i) const { return groups_[i]; }               // experts ascending
  const int32_t* groups_by_size() const { return order_.data(); }      // [num_groups], most slots first
  const int32_t* slot_tokens() const { return tokens_.data(); }        // [num_slots]
  const float* slot_weights() const { return weights_.data(); }        // [num_slots]
  const int32_t* slot_tile_rows() const { return tile_rows_.data(); }  // [num_slots] row in the tiles, or -1
  Slots slots_of(int token) const { return {&token_slots_[int64_t{token} * top_k_], num_token_slots_[token]}; }
  int num_routed_tokens() const { return num_routed_tokens_; }
  const int32_t* routed_tokens() const { return routed_.data(); }  // [num_routed_tokens] tokens with a slot, ascending
  int num_invalid_ids() const { return num_invalid_ids_; }         // out of range and not -1

 private:
  void count_slots(const int32_t* topk_ids, int num_tokens, int num_experts);
  void lay_out_groups(int num_experts, int tile_min_slots);
  void link_slots();

  std::vector<Group> groups_;
  std::vector<int32_t> order_;
  std::vector<int32_t> next_slot_;  // [num_experts]
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<int32_t> tile_rows_;
  std::vector<int32_t> token_slots_;      // [num_tokens, top_k]
  std::vector<int32_t> num_token_slots_;  // [num_tokens]
  std::vector<int32_t> routed_;
  int top_k_ = 0;
  int num_slots_ = 0;
  int num_groups_ = 0;
  int num_tiles_ = 0;
  int num_routed_tokens_ = 0;
  int num_invalid_ids_ = 0;
};

}  // namespace kt
