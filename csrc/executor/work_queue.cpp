#include "executor/work_queue.h"

#include <algorithm>

#include "executor/activation_layout.h"

namespace kt {
namespace {

// An item is at most this part of what a worker still has to do on average: the idle time at the end of a stage is then
// a fraction of an item that is small by itself.
constexpr int64_t kItemsPerWorker = 8;

// Reading and decoding a weight row costs about as much as computing it for so many tokens.
constexpr int kRowCost = 4;

int64_t row_cost(const TokenGroups::Group& group) { return group.num_slots + kRowCost; }

}  // namespace

WorkQueue::WorkQueue(const std::vector<int>& workers) : lists_(workers.size()) {
  for (size_t slice = 0; slice < workers.size(); ++slice) lists_[slice].runs = std::vector<Run>(workers[slice]);
}

void WorkQueue::reserve(int num_groups) {
  for (List& list : lists_)
    if (list.parts.size() < static_cast<size_t>(num_groups)) list.parts.resize(num_groups);
}

void WorkQueue::fill(const TokenGroups& groups, const std::vector<RowRange>& rows, const ItemLimits& limits) {
  groups_ = &groups;
  for (size_t slice = 0; slice < lists_.size(); ++slice) {
    lists_[slice].rows = rows[slice];
    fill_list(lists_[slice], groups, limits);
    share_out(lists_[slice]);
  }
}

void WorkQueue::fill_list(List& list, const TokenGroups& groups, const ItemLimits& limits) {
  list.num_items = 0;
  list.num_parts = 0;
  const int64_t num_rows = list.rows.size(), num_workers = static_cast<int64_t>(list.runs.size());
  if (num_rows == 0) return;
  int64_t remaining = 0;
  for (int i = 0; i < groups.num_groups(); ++i) remaining += row_cost(groups.group(i)) * num_rows;

  for (int i = 0; i < groups.num_groups(); ++i) {
    const int g = groups.groups_by_size()[i];
    const TokenGroups::Group& group = groups.group(g);
    const int64_t block_tokens =
        ceil_div(ceil_div(group.num_slots, ceil_div(group.num_slots, kMaxItemTokens)), group.tile_slots) *
        group.tile_slots;
    const int64_t num_blocks = ceil_div(group.num_slots, block_tokens);
    const int64_t granule = group.uses_tiles() ? limits.tile_granule : limits.vector_granule;
    const int64_t max_rows = group.uses_tiles() ? kMaxItemRows / granule * granule : limits.max_vector_rows;
    const int64_t item_cost = remaining / (kItemsPerWorker * num_workers);
    const int64_t wanted = item_cost * num_blocks / row_cost(group) / granule * granule;
    const int64_t num_chunks = ceil_div(num_rows, std::clamp<int64_t>(wanted, granule, max_rows));
    const int64_t chunk_rows = ceil_div(ceil_div(num_rows, num_chunks), granule) * granule;  // evened out
    list.parts[list.num_parts++] = {list.num_items,
                                    g,
                                    static_cast<int>(chunk_rows),
                                    static_cast<int>(block_tokens),
                                    static_cast<int>(num_blocks),
                                    row_cost(group) * chunk_rows / num_blocks};
    list.num_items += ceil_div(num_rows, chunk_rows) * num_blocks;
    remaining -= row_cost(group) * num_rows;
  }
}

// Cuts the list's items into runs of about the same cost.
void WorkQueue::share_out(List& list) {
  const int64_t num_workers = static_cast<int64_t>(list.runs.size());
  const auto items_until = [&](const Part* part) {
    return part == list.parts.data() + list.num_parts ? list.num_items : part->first_item;
  };
  int64_t total = 0;
  for (const Part* part = list.parts.data(); part != list.parts.data() + list.num_parts; ++part)
    total += (items_until(part + 1) - part->first_item) * part->item_cost;
  const Part* part = list.parts.data();
  int64_t before = 0, begin = 0;  // cost of the parts ahead of `part`; first item of the run
  for (int64_t worker = 0; worker < num_workers; ++worker) {
    const int64_t until = total * (worker + 1) / num_workers;
    int64_t end = list.num_items;
    if (worker + 1 < num_workers && list.num_parts > 0) {
      for (int64_t cost; before + (cost = (items_until(part + 1) - part->first_item) * part->item_cost) <= until;
           ++part)
        before += cost;
      end = part->first_item + (until - before + part->item_cost / 2) / part->item_cost;
    }
    list.runs[worker].items.store(static_cast<uint64_t>(begin) | static_cast<uint64_t>(end) << 32,
                                  std::memory_order_relaxed);
    begin = end;
  }
}

bool WorkQueue::take(int home, int place, WorkItem* item) {
  const int num_slices = static_cast<int>(lists_.size());
  for (int i = 0; i < num_slices; ++i) {
    const int slice = (home + i) % num_slices, num_runs = static_cast<int>(lists_[slice].runs.size());
    for (int j = 0; j < num_runs; ++j)
      if (take_from(slice, (place + j) % num_runs, i == 0 && j == 0, item)) return true;
  }
  return false;
}

// own: from the front, where what follows is next; others take from the end.
bool WorkQueue::take_from(int slice, int run, bool own, WorkItem* item) {
  std::atomic<uint64_t>& items = lists_[slice].runs[run].items;
  for (uint64_t seen = items.load(std::memory_order_relaxed);;) {
    const uint64_t begin = seen & 0xffffffff, end = seen >> 32;
    if (begin >= end) return false;
    const uint64_t left = own ? (begin + 1) | end << 32 : begin | (end - 1) << 32;
    if (!items.compare_exchange_weak(seen, left, std::memory_order_relaxed)) continue;
    describe(slice, static_cast<int64_t>(own ? begin : end - 1), item);
    item->next_group = -1;
    if (own && begin + 1 < end) {
      WorkItem next;
      describe(slice, static_cast<int64_t>(begin + 1), &next);
      item->next_group = next.group;
      item->next_first_row = next.first_row;
    }
    return true;
  }
}

void WorkQueue::describe(int slice, int64_t index, WorkItem* item) const {
  const List& list = lists_[slice];
  const auto after = std::upper_bound(list.parts.begin(), list.parts.begin() + list.num_parts, index,
                                      [](int64_t value, const Part& part) { return value < part.first_item; });
  const Part& part = *(after - 1);
  const int64_t in_part = index - part.first_item;
  // The blocks of tokens of a chunk are neighbours, so that its weights are read from a cache.
  item->slice = slice;
  item->group = part.group;
  item->first_row = list.rows.begin + static_cast<int>(in_part / part.num_blocks) * part.chunk_rows;
  item->num_rows = std::min(part.chunk_rows, list.rows.end - item->first_row);
  item->first_token = static_cast<int>(in_part % part.num_blocks) * part.block_tokens;
  item->num_tokens = std::min(part.block_tokens, groups_->group(part.group).num_slots - item->first_token);
}

}  // namespace kt
