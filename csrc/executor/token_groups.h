// The tokens of one call, sorted by the expert they go to.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

// A slot is one (token, expert) pair that counts; slots are numbered expert by expert, in token order within an expert.
// Plain data, one writer at a time. reserve() allocates, assign() does not.
class TokenGroups {
 public:
  struct Group {
    int expert;
    int first_slot;
    int num_slots;  // at least 1
  };

  void reserve(int max_num_tokens, int top_k, int num_experts);

  // topk_ids, topk_weights: [num_tokens, top_k]. Within what reserve() was given. Ids outside [0, num_experts) get no
  // slot.
  void assign(const int32_t* topk_ids, const float* topk_weights, int num_tokens, int top_k, int num_experts);

  int num_slots() const { return num_slots_; }
  int num_groups() const { return num_groups_; }
  const Group& group(int i) const { return groups_[i]; }         // experts ascending
  const int32_t* slot_tokens() const { return tokens_.data(); }  // [num_slots]
  const float* slot_weights() const { return weights_.data(); }  // [num_slots]
  int num_routed_tokens() const { return num_routed_tokens_; }
  const int32_t* routed_tokens() const { return routed_.data(); }  // [num_routed_tokens] tokens with a slot, ascending
  int num_invalid_ids() const { return num_invalid_ids_; }         // out of range and not -1

 private:
  std::vector<Group> groups_;
  std::vector<int32_t> next_slot_;  // [num_experts]
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<int32_t> routed_;
  int num_slots_ = 0;
  int num_groups_ = 0;
  int num_routed_tokens_ = 0;
  int num_invalid_ids_ = 0;
};

}  // namespace kt
