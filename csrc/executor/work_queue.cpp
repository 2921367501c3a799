#include "executor/work_queue.h"

#include <algorithm>

#include "executor/activation_layout.h"

namespace kt {
namespace {

// An item is at most this part of what a worker still has to do on average: the idle time at the end of a stage is then
// a fraction of an item that is small by itself.
constexpr int kItemsPerWorker = 8;

// Reading and decoding a weight row costs about as much as computing it for so many tokens.
constexpr int kRowCost = 4;

int64_t row_cost(const TokenGroups::Group& group) { return group.num_slots + kRowCost; }

}  // namespace

void WorkQueue::reserve(int num_groups) {
  for (List& list : lists_)
    if (list.parts.size() < static_cast<size_t>(num_groups)) list.parts.resize(num_groups);
}

void WorkQueue::fill(const TokenGroups& groups, const std::vector<RowRange>& rows, const std::vector<int>& workers,
                     const ItemLimits& limits) {
  groups_ = &groups;
  for (size_t slice = 0; slice < lists_.size(); ++slice) {
    lists_[slice].rows = rows[slice];
    fill_list(lists_[slice], groups, workers[slice], limits);
  }
}

void WorkQueue::fill_list(List& list, const TokenGroups& groups, int num_workers, const ItemLimits& limits) {
  list.next.store(0, std::memory_order_relaxed);
  list.num_items = 0;
  list.num_parts = 0;
  const int64_t num_rows = list.rows.size();
  if (num_rows == 0) return;
  int64_t remaining = 0;
  for (int i = 0; i < groups.num_groups(); ++i) remaining += row_cost(groups.group(i)) * num_rows;

  for (int i = 0; i < groups.num_groups(); ++i) {
    const int g = groups.groups_by_size()[i];
    const TokenGroups::Group& group = groups.group(g);
    const int64_t block_tokens =
        ceil_div(ceil_div(group.num_slots, ceil_div(group.num_slots, kMaxItemTokens)), kTileTokens) * kTileTokens;
    const int64_t num_blocks = ceil_div(group.num_slots, block_tokens);
    const int64_t granule = group.uses_tiles() ? limits.tile_granule : limits.vector_granule;
    const int64_t max_rows = group.uses_tiles() ? kMaxItemRows / granule * granule : limits.max_vector_rows;
    const int64_t item_cost = remaining / (int64_t{kItemsPerWorker} * num_workers);
    const int64_t wanted = item_cost * num_blocks / row_cost(group) / granule * granule;
    const int64_t num_chunks = ceil_div(num_rows, std::clamp<int64_t>(wanted, granule, max_rows));
    const int64_t chunk_rows = ceil_div(ceil_div(num_rows, num_chunks), granule) * granule;  // evened out
    list.parts[list.num_parts++] = {list.num_items, g, static_cast<int>(chunk_rows), static_cast<int>(block_tokens),
                                    static_cast<int>(num_blocks)};
    list.num_items += ceil_div(num_rows, chunk_rows) * num_blocks;
    remaining -= row_cost(group) * num_rows;
  }
}

bool WorkQueue::take(int home, WorkItem* item) {
  const int num_slices = static_cast<int>(lists_.size());
  for (int i = 0; i < num_slices; ++i) {
    const int slice = (home + i) % num_slices;
    List& list = lists_[slice];
    if (list.next.load(std::memory_order_relaxed) >= list.num_items) continue;  // spares the write
    const int64_t index = list.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= list.num_items) continue;
    const auto after = std::upper_bound(list.parts.begin(), list.parts.begin() + list.num_parts, index,
                                        [](int64_t value, const Part& part) { return value < part.first_item; });
    const Part& part = *(after - 1);
    const int64_t in_part = index - part.first_item;
    // The blocks of tokens of a chunk are neighbours, so that workers read its weights at the same time.
    item->slice = slice;
    item->group = part.group;
    item->first_row = list.rows.begin + static_cast<int>(in_part / part.num_blocks) * part.chunk_rows;
    item->num_rows = std::min(part.chunk_rows, list.rows.end - item->first_row);
    item->first_token = static_cast<int>(in_part % part.num_blocks) * part.block_tokens;
    item->num_tokens = std::min(part.block_tokens, groups_->group(part.group).num_slots - item->first_token);
    return true;
  }
  return false;
}

}  // namespace kt
