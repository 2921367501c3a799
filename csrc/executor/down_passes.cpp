#include "executor/down_passes.h"

#include <algorithm>

#include "executor/activation_layout.h"

namespace kt {
namespace {

constexpr int kLineFloats = kCacheLine / sizeof(float);

// Floats of a slot row when each slice is cut into num_passes parts: an odd number of cache lines. With strides of a
// power of two the sums that a tile kernel comes back to would share a few places of the first level cache.
int64_t stride_of(const std::vector<RowRange>& slices, int num_passes) {
  int64_t columns = 0;
  for (const RowRange& slice : slices)
    columns +=
        std::min<int64_t>(slice.size(), ceil_div(ceil_div(slice.size(), kHiddenGranule), num_passes) * kHiddenGranule);
  return (ceil_div(columns, kLineFloats) | 1) * kLineFloats;
}

int max_passes(const std::vector<RowRange>& slices) {
  int64_t granules = 1;
  for (const RowRange& slice : slices) granules = std::max(granules, ceil_div(slice.size(), kHiddenGranule));
  return static_cast<int>(granules);
}

}  // namespace

DownPasses::DownPasses(const std::vector<RowRange>& slices, int num_slots) : slices_(&slices) {
  const int64_t max_stride = static_cast<int64_t>(kMaxSlotRowBytes / sizeof(float)) / std::max(num_slots, 1);
  const int most = max_passes(slices);
  while (num_passes_ < most && stride_of(slices, num_passes_) > max_stride) ++num_passes_;
  stride_ = static_cast<int>(stride_of(slices, num_passes_));
}

RowRange DownPasses::rows(int pass, int slice) const {
  const RowRange& all = (*slices_)[slice];
  const int64_t granules = ceil_div(all.size(), kHiddenGranule);
  const auto cut = [&](int64_t at) {
    return std::min(all.end, all.begin + static_cast<int>(granules * at / num_passes_) * kHiddenGranule);
  };
  return {cut(pass), cut(pass + 1)};
}

DownPasses::Part DownPasses::part(int pass, int slice) const {
  int column = 0;
  for (int before = 0; before < slice; ++before) column += rows(pass, before).size();
  return {rows(pass, slice), column};
}

int DownPasses::width(int pass) const {
  int width = 0;
  for (int slice = 0; slice < num_slices(); ++slice) width += rows(pass, slice).size();
  return width;
}

size_t DownPasses::buffer_bytes(const std::vector<RowRange>& slices, int64_t max_num_slots, bool second) {
  const size_t whole = static_cast<size_t>(max_num_slots * stride_of(slices, 1)) * sizeof(float);
  if (whole <= kMaxSlotRowBytes) return second ? 0 : whole;
  const size_t least = static_cast<size_t>(max_num_slots * stride_of(slices, max_passes(slices))) * sizeof(float);
  return std::max(least, kMaxSlotRowBytes);
}

}  // namespace kt
