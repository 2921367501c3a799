// The products of a chunk of weights, made into tiles, and of a pair of groups of tokens: the same for both formats.
#pragma once

#include <immintrin.h>

#include "kernels/amx/ahead.h"
#include "kernels/amx/tiles.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

using WeightTile = uint8_t[kTileBytes];

// To the sums in tiles 0 to 3. weights: [num_steps][panel]; a0, a1: the tiles of the two groups. between: called after
// each step, with its number, for other work.
template <TileFormat kFormat, bool kTwoGroups, bool kTwoPanels, class Between>
inline void add_products(const WeightTile (*weights)[2], const uint8_t* a0, const uint8_t* a1, int num_steps,
                         const WeightsAhead& weights_ahead, const ActivationsAhead& activations_ahead,
                         const Between& between) {
  constexpr bool kInt8 = kFormat == TileFormat::INT8_256;
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(6, weights[s][0], kTileRowBytes);
    _tile_loadd(4, a0 + s * kTileBytes, kTileRowBytes);
    if constexpr (kInt8)
      _tile_dpbssd(0, 4, 6);
    else
      _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, weights[s][1], kTileRowBytes);
      if constexpr (kInt8)
        _tile_dpbssd(1, 4, 7);
      else
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoGroups) {
      _tile_loadd(5, a1 + s * kTileBytes, kTileRowBytes);
      if constexpr (kInt8)
        _tile_dpbssd(2, 5, 6);
      else
        _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels && kInt8)
        _tile_dpbssd(3, 5, 7);
      else if constexpr (kTwoPanels)
        _tile_dpbf16ps(3, 5, 7);
    }
    weights_ahead.prefetch(s);
    activations_ahead.prefetch(s);
    between(s);
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
