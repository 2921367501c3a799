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

// For groups of up to group_tokens. Sums 0 and 1 and activations 4 belong to the first of a pair, 2, 3 and 5 to the
// second. One group or two are all that tiles hold; of more, the last is computed whole, as configuring tiles takes as
// long as several products.
inline void configure_tiles(int num_tokens, int group_tokens) {
  const int first = num_tokens < group_tokens ? num_tokens : group_tokens;
  const int second = num_tokens > 2 * group_tokens || num_tokens == first ? first : num_tokens - first;
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(first);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(second);
  // GCC 12 believes that only the first 8 bytes are read, and leaves out storing the others.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Calls visit with the flags as types: what is not there is then not computed.
template <class Visitor>
inline void with_flags(bool a, const Visitor& visit) {
  if (a)
    visit(std::true_type());
  else
    visit(std::false_type());
}

template <class Visitor>
inline void with_flags(bool a, bool b, bool c, const Visitor& visit) {
  with_flags(a, [&](auto is_a) {
    with_flags(b, [&](auto is_b) { with_flags(c, [&](auto is_c) { visit(is_a, is_b, is_c); }); });
  });
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
