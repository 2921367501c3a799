// The products of a chunk of weights, made into tiles, and of a pair of groups of tokens: the same for both formats.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "kernels/amx/activations.h"
#include "kernels/amx/tiles.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

using WeightTile = uint8_t[kTileBytes];

template <int kNumber>
using Number = std::integral_constant<int, kNumber>;

// To the sums in tiles 0 to 3: of group 0 and both panels, then of group 1. weights: [num_steps][panel]; a0, a1: the
// tiles of the two groups. Other work goes between: start_tile(tile) is called before the first product of each tile of
// sums, after_product(s, i, n) after product i of the n of step s, after_step(s) after those.
template <TileFormat kFormat, bool kTwoGroups, bool kTwoPanels, class StartTile, class AfterProduct, class AfterStep>
inline void add_products(const WeightTile (*weights)[2], const uint8_t* a0, const uint8_t* a1, int num_steps,
                         const StartTile& start_tile, const AfterProduct& after_product, const AfterStep& after_step) {
  constexpr bool kInt8 = kFormat == TileFormat::INT8_256;
  constexpr int kProducts = (kTwoGroups ? 2 : 1) * (kTwoPanels ? 2 : 1);
  for (int s = 0; s < num_steps; ++s) {
    // GCC does not know that loading a tile reads memory, and would leave out or move what made it.
    __asm__ volatile("" : : "r"(weights) : "memory");
    _tile_loadd(6, weights[s][0], kTileRowBytes);
    _tile_loadd(4, a0 + s * kTileBytes, kTileRowBytes);
    if (s == 0) start_tile(Number<0>());
    if constexpr (kInt8)
      _tile_dpbssd(0, 4, 6);
    else
      _tile_dpbf16ps(0, 4, 6);
    after_product(s, Number<0>(), Number<kProducts>());
    if constexpr (kTwoPanels) {
      _tile_loadd(7, weights[s][1], kTileRowBytes);
      if (s == 0) start_tile(Number<1>());
      if constexpr (kInt8)
        _tile_dpbssd(1, 4, 7);
      else
        _tile_dpbf16ps(1, 4, 7);
      after_product(s, Number<1>(), Number<kProducts>());
    }
    if constexpr (kTwoGroups) {
      _tile_loadd(5, a1 + s * kTileBytes, kTileRowBytes);
      if (s == 0) start_tile(Number<2>());
      if constexpr (kInt8)
        _tile_dpbssd(2, 5, 6);
      else
        _tile_dpbf16ps(2, 5, 6);
      after_product(s, Number<kTwoPanels ? 2 : 1>(), Number<kProducts>());
      if constexpr (kTwoPanels) {
        if (s == 0) start_tile(Number<3>());
        if constexpr (kInt8)
          _tile_dpbssd(3, 5, 7);
        else
          _tile_dpbf16ps(3, 5, 7);
        after_product(s, Number<3>(), Number<kProducts>());
      }
    }
    after_step(s);
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
