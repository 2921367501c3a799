// The GEMM work of a stage, cut into items that workers take.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "executor/row_range.h"
#include "executor/token_groups.h"

namespace kt {

// Rows and tokens of one item, at most. Its float32 results, gate's and up's, are then 512 KiB: together with the
// activations of one part of K they stay in an L2 of 2 MiB.
inline constexpr int kMaxItemRows = 256;
inline constexpr int kMaxItemTokens = 256;

// Some rows of one expert, for some of its tokens.
struct WorkItem {
  int slice;  // of the weights
  int group;  // of the tokens
  int first_row, num_rows;
  int first_token, num_tokens;  // first_token: from the group's first slot; a multiple of its tile_slots
  // Where the worker's next item begins in the same slice, unless another takes it; next_group -1: unknown.
  int next_group, next_first_row;
};

// Rows of an item: a multiple of the granule of the expert's path, but the last rows of all, up to max_vector_rows or
// kMaxItemRows. Slices begin at multiples of both granules.
struct ItemLimits {
  int vector_granule;
  int max_vector_rows;  // a multiple of vector_granule
  int tile_granule;
};

// One list a slice, i.e. a group of workers near the same memory. Each worker begins with a run of neighbouring items
// of about the same cost, so that it reads weights in one stream and knows what it will read next, and then takes from
// the ends of the others' runs. fill() is for one thread while nobody takes.
class WorkQueue {
 public:
  // workers: near each slice
  explicit WorkQueue(const std::vector<int>& workers);

  void reserve(int num_groups);

  // rows: of each slice. Experts with many tokens come first. Allocates nothing.
  void fill(const TokenGroups& groups, const std::vector<RowRange>& rows, const ItemLimits& limits);

  // Any worker; `home` is the slice near it, `place` its number among the workers there. Its own items first, then
  // those of its neighbours, then of other slices: a remote read beats idling. False: none is left.
  bool take(int home, int place, WorkItem* item);

 private:
  struct Part {  // the items of one expert: [chunks of rows][blocks of tokens]
    int64_t first_item;
    int group;
    int chunk_rows;
    int block_tokens;
    int num_blocks;
    int64_t item_cost;
  };
  struct alignas(64) Run {
    std::atomic<uint64_t> items{0};  // begin, end << 32
  };
  struct List {
    int64_t num_items = 0;
    int num_parts = 0;
    RowRange rows;
    std::vector<Part> parts;
    std::vector<Run> runs;  // [workers]
  };

  void fill_list(List& list, const TokenGroups& groups, const ItemLimits& limits);
  static void share_out(List& list);
  bool take_from(int slice, int run, bool own, WorkItem* item);
  void describe(int slice, int64_t index, WorkItem* item) const;

  std::vector<List> lists_;
  const TokenGroups* groups_ = nullptr;
};

}  // namespace kt
