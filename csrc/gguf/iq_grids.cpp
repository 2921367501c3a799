#include "gguf/iq_grids.h"

#include <bit>
#include <cstddef>

namespace kt {
namespace {

static_assert(std::endian::native == std::endian::little, "byte i of a word must be byte i in memory");

constexpr int8_t kLevelsIQ1[4] = {-1, 0, 1};
constexpr int8_t kLevelsIQ2[4] = {8, 25, 43};
constexpr int8_t kLevelsIQ3_XXS[16] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr int8_t kLevelsIQ3_S[16] = {1, 3, 5, 7, 9, 11, 13, 15};

// An entry of the codebook: the level each code of it names. Word has a byte for every code.
template <class Word, int num_levels>
constexpr Word entry(uint16_t codes, const int8_t (&levels)[num_levels]) {
  Word word = 0;
  for (size_t i = 0; i < sizeof(Word); ++i) {
    const int code = codes >> (16 / sizeof(Word) * i) & (num_levels - 1);
    word |= static_cast<Word>(static_cast<uint8_t>(levels[code])) << (8 * i);
  }
  return word;
}

// Of an entry of iq1s_grid, which has 2 bits a weight for -1, 0 and 1.
constexpr uint32_t pairs_iq1(uint16_t codes) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes >> 2 * i & 3) << (8 * (i % 4) + (i < 4 ? 3 : 5));
  return word;
}

constexpr uint64_t sign_mask(int index) {
  uint64_t mask = 0;
  for (int i = 0; i < 8; ++i)
    if (iq_signs(index) >> i & 1) mask |= uint64_t{0xff} << (8 * i);
  return mask;
}

}  // namespace

alignas(64) constexpr uint64_t iq1s_grid[2048] = {
#define KT_CODES(codes) entry<uint64_t>(0x##codes, kLevelsIQ1),
#include "gguf/iq_grids/iq1s.inc"
#undef KT_CODES
};
alignas(64) constexpr uint32_t iq1s_pairs[2048] = {
#define KT_CODES(codes) pairs_iq1(0x##codes),
#include "gguf/iq_grids/iq1s.inc"
#undef KT_CODES
};

#define KT_CODES(codes) entry<uint64_t>(0x##codes, kLevelsIQ2),
alignas(64) constexpr uint64_t iq2xxs_grid[256] = {
#include "gguf/iq_grids/iq2xxs.inc"
};
alignas(64) constexpr uint64_t iq2xs_grid[512] = {
#include "gguf/iq_grids/iq2xs.inc"
};
alignas(64) constexpr uint64_t iq2s_grid[1024] = {
#include "gguf/iq_grids/iq2s.inc"
};
#undef KT_CODES

alignas(64) constexpr uint32_t iq3xxs_grid[256] = {
#define KT_CODES(codes) entry<uint32_t>(0x##codes, kLevelsIQ3_XXS),
#include "gguf/iq_grids/iq3xxs.inc"
#undef KT_CODES
};

alignas(64) constexpr uint32_t iq3s_grid[512] = {
#define KT_CODES(codes) entry<uint32_t>(0x##codes, kLevelsIQ3_S),
#include "gguf/iq_grids/iq3s.inc"
#undef KT_CODES
};

#define KT_MASKS_4(i) sign_mask(i), sign_mask(i + 1), sign_mask(i + 2), sign_mask(i + 3)
#define KT_MASKS_16(i) KT_MASKS_4(i), KT_MASKS_4(i + 4), KT_MASKS_4(i + 8), KT_MASKS_4(i + 12)
#define KT_MASKS_64(i) KT_MASKS_16(i), KT_MASKS_16(i + 16), KT_MASKS_16(i + 32), KT_MASKS_16(i + 48)
alignas(64) constexpr uint64_t iq_sign_masks[128] = {KT_MASKS_64(0), KT_MASKS_64(64)};

alignas(64) constexpr int8_t iq4nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                 1,    13,   25,  38,  53,  69,  89,  113};
alignas(64) constexpr int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

}  // namespace kt
