// The weights of a call, in the order in which they are multiplied.
#pragma once

#include "kernels/amx/activations.h"
#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kRows = 2 * kPanelRows;  // weight rows computed together

// Up to 256 k of up to two panels.
struct Chunk {
  int row = 0, num_rows = 0;  // 0 rows: there is none
  int k = 0, num_k = 0;
  const uint8_t* panels[2] = {nullptr, nullptr};  // where its blocks begin; nullptr: not there

  bool exists() const { return num_rows > 0; }
  int num_panels() const { return panels[1] == nullptr ? 1 : 2; }
  bool is_whole() const { return exists() && num_k == kMaxCodesK && num_panels() == 2; }
};

// The chunks of a call one after another, and up to two after the one that is multiplied. They stay where they are, and
// are not copied: reading at once what was just written in parts waits for all that is being stored.
template <class Maker>
class Chunks {
 public:
  explicit Chunks(const TileGemmParams& p) : p_(p) {
    set(chunks_[0], 0, p.k_begin);
    set_after(0);
    set_after(1);
  }

  const Chunk& now() const { return chunks_[number_]; }
  const Chunk& next() const { return chunks_[(number_ + 1) % 3]; }
  const Chunk& after() const { return chunks_[(number_ + 2) % 3]; }

  void advance() {
    number_ = (number_ + 1) % 3;
    set_after((number_ + 1) % 3);
  }

 private:
  // To the chunk at row and k, which exists.
  KT_FORCE_INLINE void set(Chunk& chunk, int row, int k) const {
    const int rows = p_.num_rows - row;
    const uint8_t* panel = p_.weights + static_cast<size_t>(row / kPanelRows) * p_.panel_bytes;
    chunk.row = row;
    chunk.num_rows = rows < kRows ? rows : kRows;
    chunk.k = k;
    chunk.num_k = p_.k_end - k < kMaxCodesK ? p_.k_end - k : kMaxCodesK;
    set_panels(chunk, panel + Maker::kChunkBytes * k / kMaxCodesK, rows);
  }

  // To one past the last row: of what the next call reads only the place is known.
  KT_FORCE_INLINE void set_past(Chunk& chunk, const uint8_t* panel) const {
    chunk.num_rows = chunk.num_k = 0;
    set_panels(chunk, panel, p_.num_rows);
  }

  KT_FORCE_INLINE void set_panels(Chunk& chunk, const uint8_t* panel, int rows) const {
    chunk.panels[0] = panel;
    chunk.panels[1] = panel != nullptr && rows > kPanelRows ? panel + p_.panel_bytes : nullptr;
  }

  KT_FORCE_INLINE void set_after(int number) {
    const Chunk& chunk = chunks_[number];
    Chunk& after = chunks_[(number + 1) % 3];
    if (!chunk.exists())
      set_past(after, chunk.panels[0] == nullptr ? nullptr : chunk.panels[0] + Maker::kChunkBytes);
    else if (chunk.k + kMaxCodesK < p_.k_end)
      set(after, chunk.row, chunk.k + kMaxCodesK);
    else if (chunk.row + kRows < p_.num_rows)
      set(after, chunk.row + kRows, p_.k_begin);
    else
      set_past(after, p_.next_weights);
  }

  const TileGemmParams& p_;
  Chunk chunks_[3];
  int number_ = 0;
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
