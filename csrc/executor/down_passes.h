// Which hidden rows are computed together, so that what they give for every slot fits a buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "executor/row_range.h"

namespace kt {

// Slot rows of one pass, at most; there are two buffers, one being filled while the other is merged. Small enough for
// the memory of any host, large enough that a pass of 4096 tokens of DeepSeek-R1 takes milliseconds, beside which the
// meeting of the workers at its end is nothing.
inline constexpr size_t kMaxSlotRowBytes = size_t{64} << 20;

// Hidden rows are cut at multiples of it.
inline constexpr int kHiddenGranule = 32;

// A pass computes a part of each slice, so that every group of workers has rows near it in every pass. Its slot rows
// are [num_slots, stride] float32, the parts of the slices one after another.
class DownPasses {
 public:
  struct Part {
    RowRange rows;  // hidden rows
    int column;     // of the first
  };

  // slices: of all hidden rows, at multiples of kHiddenGranule; not owned.
  DownPasses(const std::vector<RowRange>& slices, int num_slots);
  DownPasses() = default;

  int num_passes() const { return num_passes_; }
  int num_slices() const { return static_cast<int>(slices_->size()); }
  int stride() const { return stride_; }  // floats of a slot row: whole cache lines
  Part part(int pass, int slice) const;
  int width(int pass) const;  // hidden rows of a pass

  // Bytes of one buffer that hold a pass of any call of up to max_num_slots; second: of the other buffer, which calls
  // of one pass do without.
  static size_t buffer_bytes(const std::vector<RowRange>& slices, int64_t max_num_slots, bool second);

 private:
  RowRange rows(int pass, int slice) const;

  const std::vector<RowRange>* slices_ = nullptr;
  int num_passes_ = 1;
  int stride_ = 0;
};

}  // namespace kt
