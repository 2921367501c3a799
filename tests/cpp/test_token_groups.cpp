#include <algorithm>
#include <set>
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

// Groups by size, rows of tiles, and the way back from a token to its slots.
void check_second_numbers(const TokenGroups& groups, int num_tokens, int tile_min_slots) {
  std::set<int> order;
  int tile = 0;
  for (int g = 0; g < groups.num_groups(); ++g) {
    const TokenGroups::Group& group = groups.group(g);
    order.insert(groups.groups_by_size()[g]);
    if (g > 0)
      CHECK(
          groups.group(groups.groups_by_size()[g - 1]).num_slots >= groups.group(groups.groups_by_size()[g]).num_slots,
          "group " << g << " by size is larger than the one before");
    const bool uses_tiles = group.num_slots >= tile_min_slots;
    CHECK(group.first_tile == (uses_tiles ? tile : -1) && group.uses_tiles() == uses_tiles,
          "group " << g << " has its first tile at " << group.first_tile << ", expected " << tile);
    const int num_tiles = (group.num_slots + kTileTokens - 1) / kTileTokens;
    CHECK(group.tile_slots <= kTileTokens && group.tile_slots * num_tiles >= group.num_slots &&
              (group.tile_slots - 1) * num_tiles < group.num_slots,
          group.num_slots << " slots as " << num_tiles << " times " << group.tile_slots);
    for (int i = 0; i < group.num_slots; ++i)
      CHECK(groups.slot_tile_rows()[group.first_slot + i] ==
                (uses_tiles ? (tile + i / group.tile_slots) * kTileTokens + i % group.tile_slots : -1),
            "slot " << group.first_slot + i << " in row " << groups.slot_tile_rows()[group.first_slot + i]);
    if (uses_tiles) tile += num_tiles;
  }
  CHECK(groups.num_tiles() == tile, groups.num_tiles() << " tiles, expected " << tile);
  CHECK(static_cast<int>(order.size()) == groups.num_groups(), "the order by size names a group twice");
  int num_slots = 0;
  for (int token = 0; token < num_tokens; ++token) {
    int last = -1;
    for (const int32_t slot : groups.slots_of(token)) {
      CHECK(slot > last && groups.slot_tokens()[slot] == token, "slot " << slot << " is not of token " << token);
      last = slot;
      ++num_slots;
    }
  }
  CHECK(num_slots == groups.num_slots(), "tokens have " << num_slots << " slots");
}

void assign_and_compare(TokenGroups& groups, const std::vector<int32_t>& ids, int num_tokens, int top_k,
                        int num_experts) {
  std::vector<float> weights(ids.size());
  for (float& weight : weights) weight = test::random_normal();
  groups.reserve(num_tokens, top_k, num_experts);
  const int tile_min_slots = test::random_int(1, 20);
  groups.assign(ids.data(), weights.data(), num_tokens, top_k, num_experts, tile_min_slots);
  compare_with_sort(groups, ids, weights, num_tokens, top_k, num_experts);
  check_second_numbers(groups, num_tokens, tile_min_slots);
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
