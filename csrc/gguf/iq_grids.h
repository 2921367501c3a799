// Constant tables of the GGUF format: the codebooks of the IQ types, sign patterns, and 4-bit value sets.
// In every word byte i belongs to weight i (byte 0 is the lowest), so a table read as memory is bytes in weight order.
// 64-byte aligned plain data, made at compile time.
#pragma once

#include <cstdint>

namespace kt {

extern const uint64_t iq1s_grid[2048];   // IQ1_S and IQ1_M: 8 int8 a word, each -1, 0 or 1
extern const uint32_t iq1s_pairs[2048];  // the same entries: byte i has 8 * (weight i + 1) + 32 * (weight (4 + i) + 1)
extern const uint64_t iq2xxs_grid[256];  // 8 magnitudes a word, each 8, 25 or 43
extern const uint64_t iq2xs_grid[512];   // as iq2xxs_grid
extern const uint64_t iq2s_grid[1024];   // as iq2xxs_grid
extern const uint32_t iq3xxs_grid[256];  // 4 magnitudes a word, each 4, 12, 20, 28, 36, 44, 52 or 62
extern const uint32_t iq3s_grid[512];    // 4 magnitudes a word, each 1, 3, 5, 7, 9, 11, 13 or 15
extern const uint64_t iq_sign_masks[128];  // byte i is 0xff where bit i of iq_signs(index) is set, else 0
extern const int8_t iq4nl_values[16];      // IQ4_NL and IQ4_XS
extern const int8_t mxfp4_values[16];      // E2M1 times 2

// Files store 7 of 8 signs: index is those of weights 0 to 6, 1 for negative; the eighth makes the number of ones even.
static inline constexpr uint8_t iq_signs(uint32_t index) {
  const uint32_t parity = index ^ (index >> 4);
  return static_cast<uint8_t>(index | ((0x6996 >> (parity & 15) & 1) << 7));  // bit i of 0x6996: i has an odd popcount
}

}  // namespace kt
