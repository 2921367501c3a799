#include <algorithm>
#include <vector>

#include "executor/token_groups.h"
#include "test_harness.h"

namespace kt {
namespace {

// Every pair in order of expert, then token, then place in the token: what a stable sort gives.
void compare_with_sort(const TokenGroups& groups, const std::vector<int32_t>& ids, const std::vector<float>& weights,
                       int num_tokens, int top_k, int num_experts) {
  struct Pair {
    int expert, token;
    float weight;
  };
  std::vector<Pair> pairs;
  std::vector<int> routed;
  int num_invalid = 0;
  for (int i = 0; i < num_tokens * top_k; ++i) {
    if (ids[i] >= 0 && ids[i] < num_experts) {
      pairs.push_back({ids[i], i / top_k, weights[i]});
      if (routed.empty() || routed.back() != i / top_k) routed.push_back(i / top_k);
    } else if (ids[i] != -1) {
      ++num_invalid;
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.expert < b.expert; });

  CHECK(groups.num_slots() == static_cast<int>(pairs.size()), groups.num_slots() << " slots, " << pairs.size());
  CHECK(groups.num_invalid_ids() == num_invalid, groups.num_invalid_ids() << ", expected " << num_invalid);
  CHECK(groups.num_routed_tokens() == static_cast<int>(routed.size()), groups.num_routed_tokens());
  CHECK(std::equal(routed.begin(), routed.end(), groups.routed_tokens()), "routed tokens differ");
  int slot = 0;
  for (int g = 0; g < groups.num_groups(); ++g) {
    const TokenGroups::Group& group = groups.group(g);
    CHECK(group.first_slot == slot && group.num_slots > 0, "group " << g << " begins at " << group.first_slot);
    CHECK(g == 0 || groups.group(g - 1).expert < group.expert, "experts do not ascend at group " << g);
    for (; slot < group.first_slot + group.num_slots; ++slot)
      CHECK(pairs[slot].expert == group.expert && pairs[slot].token == groups.slot_tokens()[slot] &&
                pairs[slot].weight == groups.slot_weights()[slot],
            "slot " << slot << " has token " << groups.slot_tokens()[slot] << ", expected " << pairs[slot].token);
  }
  CHECK(slot == groups.num_slots(), "groups hold " << slot << " slots");
}

void assign_and_compare(TokenGroups& groups, const std::vector<int32_t>& ids, int num_tokens, int top_k,
                        int num_experts) {
  std::vector<float> weights(ids.size());
  for (float& weight : weights) weight = test::random_normal();
  groups.reserve(num_tokens, top_k, num_experts);
  groups.assign(ids.data(), weights.data(), num_tokens, top_k, num_experts);
  compare_with_sort(groups, ids, weights, num_tokens, top_k, num_experts);
}

TEST(random_calls_on_one_object) {
  TokenGroups groups;
  for (int round = 0; round < 500; ++round) {
    const int num_tokens = test::random_int(0, 60), top_k = test::random_int(1, 9),
              num_experts = test::random_int(1, 40);
    std::vector<int32_t> ids(num_tokens * top_k);
    for (int32_t& id : ids) id = test::random_int(-2, test::random_int(0, num_experts));
    assign_and_compare(groups, ids, num_tokens, top_k, num_experts);
  }
}

TEST(extremes) {
  TokenGroups groups;
  assign_and_compare(groups, {}, 0, 8, 256);
  assign_and_compare(groups, std::vector<int32_t>(300 * 8, 255), 300, 8, 256);
  assign_and_compare(groups, std::vector<int32_t>(300 * 8, -1), 300, 8, 256);
  assign_and_compare(groups, {INT32_MIN, INT32_MAX, 256, -2, 0, -1}, 3, 2, 256);
}

}  // namespace
}  // namespace kt
