#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "executor/down_passes.h"
#include "executor/work_queue.h"
#include "test_harness.h"

namespace kt {
namespace {

TokenGroups random_groups(int num_experts, int tile_min_slots) {
  const int num_tokens = test::random_int(1, test::random_int(1, 900)), top_k = test::random_int(1, 4);
  std::vector<int32_t> ids(num_tokens * top_k);
  const int skew = test::random_int(0, 2);
  for (int32_t& id : ids) {
    id = test::random_int(0, num_experts - 1);
    for (int i = 0; i < skew; ++i) id = test::random_int(0, id);
  }
  TokenGroups groups;
  groups.reserve(num_tokens, top_k, num_experts);
  groups.assign(ids.data(), std::vector<float>(ids.size()).data(), num_tokens, top_k, num_experts, tile_min_slots);
  return groups;
}

TEST(split_rows_covers_all) {
  for (int round = 0; round < 1000; ++round) {
    const int num_rows = test::random_int(1, 3000), granule = 16 * test::random_int(1, 8);
    std::vector<int> shares(test::random_int(1, 5));
    for (int& share : shares) share = test::random_int(1, 20);
    int end = 0;
    for (const RowRange& range : split_rows(num_rows, granule, shares)) {
      CHECK(range.begin == end && range.size() >= 0, "a range begins at " << range.begin << ", expected " << end);
      CHECK(range.begin % granule == 0 || range.begin == num_rows, "cut at " << range.begin);
      end = range.end;
    }
    CHECK(end == num_rows, "ends at " << end << " of " << num_rows);
  }
  const std::vector<RowRange> even = split_rows(2048, 32, {8, 8});
  CHECK(even[0].end == 1024, "two equal shares are cut at " << even[0].end << " of 2048");
}

TEST(every_output_once) {
  for (int round = 0; round < 200; ++round) {
    const TokenGroups groups = random_groups(test::random_int(1, 20), test::random_int(1, 100));
    const int granule = 32 * test::random_int(1, 3);
    const ItemLimits limits{granule, granule * test::random_int(1, 2), granule * test::random_int(1, 2)};
    const int num_rows = test::random_int(1, 700), slice_granule = std::lcm(granule, limits.tile_granule);
    std::vector<int> workers(test::random_int(1, 3));
    for (int& count : workers) count = test::random_int(1, 9);
    const std::vector<RowRange> rows = split_rows(num_rows, slice_granule, workers);
    WorkQueue queue(workers);
    queue.reserve(20);
    queue.fill(groups, rows, limits);

    std::map<int, std::vector<int>> seen;  // group -> [slot][granule of rows]
    const int granules = (num_rows + granule - 1) / granule;
    for (int g = 0; g < groups.num_groups(); ++g) seen[g].resize(groups.group(g).num_slots * granules);
    WorkItem item;
    const auto take_by_any = [&] {
      const int home = test::random_int(0, static_cast<int>(workers.size()) - 1);
      return queue.take(home, test::random_int(0, workers[home] - 1), &item);
    };
    while (take_by_any()) {
      const TokenGroups::Group& group = groups.group(item.group);
      const RowRange& slice = rows[item.slice];
      CHECK(item.num_rows > 0 && item.first_row >= slice.begin && item.first_row + item.num_rows <= slice.end,
            "rows " << item.first_row << " + " << item.num_rows);
      const int path_granule = group.uses_tiles() ? limits.tile_granule : granule;
      CHECK(item.first_row % path_granule == 0, "rows begin at " << item.first_row);
      CHECK(item.num_rows % path_granule == 0 || item.first_row + item.num_rows == num_rows, item.num_rows << " rows");
      CHECK(item.num_rows <= (group.uses_tiles() ? kMaxItemRows : limits.max_vector_rows), item.num_rows << " rows");
      CHECK(item.first_token % kTileTokens == 0 && item.num_tokens > 0 && item.num_tokens <= kMaxItemTokens,
            "tokens " << item.first_token << " + " << item.num_tokens);
      CHECK(item.first_token + item.num_tokens <= group.num_slots, "tokens past the group");
      for (int slot = item.first_token; slot < item.first_token + item.num_tokens; ++slot)
        for (int row = item.first_row; row < item.first_row + item.num_rows; row += granule)
          ++seen[item.group][slot * granules + row / granule];
    }
    for (const auto& [group, counts] : seen)
      for (int count : counts)
        CHECK(count == 1, "an output of group " << group << " is computed " << count << " times");
  }
}

TEST(own_items_first) {
  const TokenGroups groups = random_groups(4, 1);
  const std::vector<int> workers = {2, 2};
  WorkQueue queue(workers);
  queue.reserve(4);
  queue.fill(groups, split_rows(256, 32, workers), {32, 32, 32});
  bool helps = false;
  for (WorkItem item; queue.take(1, 1, &item);) {
    CHECK(item.slice == 0 || !helps, "own items after those of others");
    helps = item.slice == 0;
  }
  CHECK(helps, "no help");
}

// 4096 tokens of DeepSeek-R1 on 16 workers: as many items as it takes to end together, and not many more.
TEST(number_of_items) {
  const int num_experts = 256, num_tokens = 4096, top_k = 8;
  std::vector<int32_t> ids(num_tokens * top_k);
  for (int32_t& id : ids) id = test::random_int(0, num_experts - 1);
  TokenGroups groups;
  groups.reserve(num_tokens, top_k, num_experts);
  for (int tokens : {1, 64, 4096}) {
    groups.assign(ids.data(), std::vector<float>(ids.size()).data(), tokens, top_k, num_experts, 16);
    WorkQueue queue({16});
    queue.reserve(num_experts);
    queue.fill(groups, {{0, 2048}}, {32, 32, 32});
    int count = 0, last_rows = 0;
    for (WorkItem item; queue.take(0, 15, &item); ++count)
      if (item.group == groups.groups_by_size()[groups.num_groups() - 1]) last_rows = item.num_rows;
    CHECK(count >= 16 * 16 && count <= groups.num_groups() * 64, count << " items for " << tokens << " tokens");
    CHECK(last_rows <= 64, "an item of the last expert has " << last_rows << " rows");
  }
}

// What a worker is told of its next item is so while nobody helps, and the runs of all workers are worth about the
// same.
TEST(runs) {
  for (int round = 0; round < 50; ++round) {
    const int num_workers = test::random_int(1, 16);
    const TokenGroups groups = random_groups(test::random_int(1, 20), test::random_int(1, 100));
    WorkQueue queue({num_workers});
    queue.reserve(20);
    queue.fill(groups, {{0, 2048}}, {32, 64, 32});
    int64_t total = 0, largest = 0;
    std::vector<int64_t> costs(num_workers);
    for (int place = 0; place < num_workers; ++place) {
      WorkItem item, before{};
      bool more = false;
      do {
        if (!queue.take(0, place, &item)) break;  // fewer items than workers
        CHECK(!more || (item.group == before.next_group && item.first_row == before.next_first_row),
              "row " << item.first_row << " of group " << item.group << ", told row " << before.next_first_row << " of "
                     << before.next_group);
        const int64_t cost = int64_t{item.num_rows} * (item.num_tokens + 4);
        costs[place] += cost;
        total += cost;
        largest = std::max(largest, cost);
        before = item;
        more = item.next_group >= 0;
      } while (more);
    }
    for (int64_t cost : costs)
      CHECK(cost <= total / num_workers + 2 * largest,
            "a run of " << cost << " of " << total << " for " << num_workers);
  }
}

TEST(passes) {
  for (int round = 0; round < 300; ++round) {
    const int hidden = test::random_int(1, 8000), num_slots = test::random_int(0, 50'000);
    std::vector<int> shares(test::random_int(1, 4));
    for (int& share : shares) share = test::random_int(1, 9);
    const std::vector<RowRange> slices = split_rows(hidden, kHiddenGranule, shares);
    const DownPasses passes(slices, num_slots);
    const size_t bytes = size_t(num_slots) * passes.stride() * sizeof(float);
    CHECK(bytes <= DownPasses::buffer_bytes(slices, num_slots, false), "too small a buffer");
    CHECK(bytes <= DownPasses::buffer_bytes(slices, num_slots, true) || passes.num_passes() == 1, "no second buffer");
    CHECK(bytes <= DownPasses::buffer_bytes(slices, 50'000, false), "too small a buffer for fewer slots");
    CHECK(bytes <= kMaxSlotRowBytes || passes.stride() <= 48 * static_cast<int>(shares.size()), bytes << " bytes");
    std::multiset<int> granules;
    for (int pass = 0; pass < passes.num_passes(); ++pass) {
      int column = 0;
      for (size_t slice = 0; slice < slices.size(); ++slice) {
        const DownPasses::Part part = passes.part(pass, static_cast<int>(slice));
        CHECK(part.column == column, "a part stands at " << part.column << ", expected " << column);
        CHECK(column % kHiddenGranule == 0 || part.rows.size() == 0, "a part begins at column " << column);
        CHECK(part.rows.begin >= slices[slice].begin && part.rows.end <= slices[slice].end, "not its slice");
        column += part.rows.size();
        for (int row = part.rows.begin; row < part.rows.end; row += kHiddenGranule) granules.insert(row);
      }
      CHECK(column == passes.width(pass) && column <= passes.stride(), column << " columns");
    }
    CHECK(granules.size() == size_t(hidden + kHiddenGranule - 1) / kHiddenGranule, granules.size() << " granules");
    CHECK(std::set<int>(granules.begin(), granules.end()).size() == granules.size(), "a row twice");
  }
}

}  // namespace
}  // namespace kt
