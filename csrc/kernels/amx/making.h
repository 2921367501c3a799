// Makes weights into tiles between the products of the weights before them.
#pragma once

#include <immintrin.h>

#include "kernels/amx/chunks.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kPartK = 32;  // of a panel, made at once

// Makes chunks, each while the one before it is multiplied, in parts: for each panel Maker::begin(), then 32 k at a
// time. Vector instructions run beside the tile unit where few lie between two products; where that unit is given one
// product in so much time, as on busy machines, they cost next to nothing then. A Maker's functions are inlined by
// force: a dozen places call them, more than GCC inlines by itself.
template <class Maker>
class Making {
 public:
  using Tiles = typename Maker::Tiles;
  static constexpr int kSteps = Maker::kSteps;  // of a whole chunk

  // chunk: what is made, to be written to `tiles`. later: what is made after it, for prefetching: a chunk takes 1 to 10
  // microseconds, memory less than one.
  inline void start(const Chunk& chunk, const Chunk& later, Tiles& tiles) {
    chunk_ = &chunk;
    later_ = &later;
    tiles_ = &tiles;
  }

  // A whole chunk beside the products of a whole chunk: after product i of n of step s. The first panel is made during
  // the first half of the steps.
  template <int i, int n>
  inline void after_product(int s) {
    constexpr int kPartsOfStep = 2 * kMaxCodesK / kPartK / kSteps;
    const int panel = s / (kSteps / 2), step = s % (kSteps / 2);
    if (step == 0 && i == 0) begin(panel);
#pragma GCC unroll 4
    for (int part = kPartsOfStep * i / n; part < kPartsOfStep * (i + 1) / n; ++part)
      maker_.make(step * kPartsOfStep + part, *tiles_, panel);
  }

  // Any chunk, beside nothing.
  __attribute__((noinline)) void make_all() {
    for (int panel = 0; panel < chunk_->num_panels(); ++panel) {
      begin(panel);
      for (int part = 0; part * kPartK < chunk_->num_k; ++part) maker_.make(part, *tiles_, panel);
      maker_.fill_last_tile(*tiles_, panel);
    }
  }

  // The first chunk of a call, which has no products before it.
  inline void make_first(const Chunk& chunk, const Chunk& later, Tiles& tiles) {
    start(chunk, later, tiles);
    make_all();
    for (int s = 0; s < kSteps; ++s) prefetch(s);
  }

  // After step s: asks for a share of what is made later.
  inline void prefetch(int s) const {
    constexpr size_t kBytes = Maker::kChunkBytes / kSteps;
    for (const uint8_t* panel : later_->panels)
      for (size_t i = 0; panel != nullptr && i < kBytes; i += 64) prefetch_l1(panel + s * kBytes + i);
  }

 private:
  inline void begin(int panel) { maker_.begin(chunk_->panels[panel], chunk_->num_k, *tiles_, panel); }

  alignas(64) Maker maker_;
  const Chunk *chunk_ = nullptr, *later_ = nullptr;
  Tiles* tiles_ = nullptr;
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
