// Runs of weight rows, and how they are shared out.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

struct RowRange {
  int begin = 0;
  int end = 0;
  int size() const { return end - begin; }
};

// [num_rows] cut into one range for each of `shares` in proportion to it, at multiples of `granule`. A range may be
// empty.
inline std::vector<RowRange> split_rows(int num_rows, int granule, const std::vector<int>& shares) {
  int64_t total = 0, until = 0;
  for (int share : shares) total += share;
  const int64_t granules = (num_rows + granule - 1) / granule;
  std::vector<RowRange> ranges;
  int begin = 0;
  for (int share : shares) {
    until += share;
    const int64_t end = (granules * until * 2 + total) / (2 * total) * granule;  // rounded to nearest
    ranges.push_back({begin, static_cast<int>(end < num_rows ? end : num_rows)});
    begin = ranges.back().end;
  }
  return ranges;
}

}  // namespace kt
