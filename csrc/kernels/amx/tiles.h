// The configuration of tile registers all kernels here use: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kTokensAtOnce = 256;  // that share one making of weights

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// first, second: tokens in the two groups, 1 to 16; second 0: there is one group only. Sums 0 and 1 and activations 4
// belong to the first, 2, 3 and 5 to the second.
inline void configure_tiles(int first, int second) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(first);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(second == 0 ? first : second);
  // GCC 12 believes that only the first 8 bytes are read, and leaves out storing the others.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Calls visit with both as types: what is not there is then not computed.
template <class Visitor>
inline void with_tiles(bool two_groups, bool two_panels, const Visitor& visit) {
  if (two_groups && two_panels)
    visit(std::true_type(), std::true_type());
  else if (two_groups)
    visit(std::true_type(), std::false_type());
  else if (two_panels)
    visit(std::false_type(), std::true_type());
  else
    visit(std::false_type(), std::false_type());
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
