// IQ1 to IQ3: blocks of 256, weights from codebooks. Formats: gguf/block_layouts.h. A group is 32 weights, an octet 8.
//
// Codebook words become vectors by gather_64() and gather_32(); but for IQ1's pairs, their bytes stand in weight order
// already. No index can leave its codebook: it is masked, or has no more bits than the codebook takes.
//
// Codes are symmetric about an offset, the largest value of the type: with the least offset that leaves none negative
// the mins cancel least, and all fit 7 bits.
#pragma once

#include "gguf/iq_grids.h"
#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

inline void store_scale(Codes& codes, int group, int h, Floats scale) {
  store_floats(codes.scales[group] + h * kLanes, scale);
}

// d * (bits + 1/2) * fraction, rounded once
inline Floats half_odd_scale(Floats d, Ints bits, float fraction) {
  return multiply(d, multiply_add(to_floats(bits), splat_float(fraction), splat_float(0.5f * fraction)));
}

// d * (2 * bits + 1)
inline Floats odd_scale(Floats d, Ints bits) {
  return multiply(d, multiply_add(to_floats(bits), splat_float(2), splat_float(1)));
}

alignas(16) constexpr uint8_t kOddToTop[16] = {0, 0x80, 0x80, 0, 0x80, 0, 0, 0x80, 0x80, 0, 0, 0x80, 0, 0x80, 0x80, 0};

// iq_signs() of each byte, which holds 7 bits.
inline Ints with_eighth_sign(Ints bytes) {
  return bit_or(bytes, look_up(kOddToTop, low_nibbles(bit_xor(bytes, shift_right<4>(bytes)))));
}

// 4 x 7 bits of each lane to the signs of 4 octets, a byte each.
inline Ints sign_bytes(Ints v) {
  const Ints low = bit_or(bit_and(v, splat(0x7f)), bit_and(shift_left<1>(v), splat(0x7f00)));
  const Ints high = bit_or(bit_and(shift_left<2>(v), splat(0x7f0000)), bit_and(shift_left<3>(v), splat(0x7f000000)));
  return with_eighth_sign(bit_or(low, high));
}

// Codes of an octet. magnitudes: weights 0 to 3 and 4 to 7. signs: bit i of the lowest byte, weight i is negative.
template <int kOffset>
inline void store_signed_octet(Codes& codes, int octet, int h, IntPair magnitudes, Ints signs) {
  const Ints offset = splat(kOffset * 0x01010101), s = spread_byte_0(signs);
  store(codes.quads[2 * octet][h * kLanes], add_or_sub_bytes(offset, magnitudes.low, s, splat(0x08040201)));
  store(codes.quads[2 * octet + 1][h * kLanes], add_or_sub_bytes(offset, magnitudes.high, s, splat(0x80402010)));
}

constexpr int kOffsetIQ2 = 43, kOffsetIQ3_XXS = 62, kOffsetIQ3_S = 15;

struct UnpackIQ2_XXS {
  static constexpr int kBlock = 256, kBlockBytes = 66, kGroup = 32, kMaxCode = 2 * kOffsetIQ2, kCenter = kOffsetIQ2;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 0, 0, h));
      for (int g = 0; g < 8; ++g) {
        Ints q = load(unit(block, 2, 2 * g, h));
        const Ints high = load(unit(block, 2, 2 * g + 1, h));
        store_scale(codes, g, h, half_odd_scale(d, shift_right<28>(high), 0.25f));
        Ints signs = sign_bytes(high);
        for (int j = 0; j < 4; ++j) {
          store_signed_octet<kOffsetIQ2>(codes, 4 * g + j, h, gather_64(iq2xxs_grid, bit_and(q, splat(255))), signs);
          q = shift_right<8>(q);
          signs = shift_right<8>(signs);
        }
      }
    }
  }
};

// 16 nibbles at `offset`: scales of 16 weights each, of IQ2_XS and IQ2_S.
inline void store_scales_iq2(Codes& codes, const uint8_t* block, int offset, Floats d, int h) {
  for (int word = 0; word < 2; ++word) {
    Ints bits = load(unit(block, offset, word, h));
    for (int i = 0; i < 8; ++i) {
      store_scale(codes, 8 * word + i, h, half_odd_scale(d, bit_and(bits, splat(15)), 0.25f));
      bits = shift_right<4>(bits);
    }
  }
}

struct UnpackIQ2_XS {
  static constexpr int kBlock = 256, kBlockBytes = 74, kGroup = 16, kMaxCode = 2 * kOffsetIQ2, kCenter = kOffsetIQ2;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    const Ints low_9 = splat(511);
    for (int h = 0; h < kHalves; ++h) {
      store_scales_iq2(codes, block, 66, load_f16(unit<2>(block, 0, 0, h)), h);
      for (int i = 0; i < 16; ++i) {  // two octets
        const Ints q = load(unit(block, 2, i, h));
        const Ints signs = with_eighth_sign(
            bit_or(bit_and(shift_right<9>(q), splat(0x7f)), bit_and(shift_right<17>(q), splat(0x7f00))));
        store_signed_octet<kOffsetIQ2>(codes, 2 * i, h, gather_64(iq2xs_grid, bit_and(q, low_9)), signs);
        store_signed_octet<kOffsetIQ2>(codes, 2 * i + 1, h, gather_64(iq2xs_grid, bit_and(shift_right<16>(q), low_9)),
                                       shift_right<8>(signs));
      }
    }
  }
};

struct UnpackIQ2_S {
  static constexpr int kBlock = 256, kBlockBytes = 82, kGroup = 16, kMaxCode = 2 * kOffsetIQ2, kCenter = kOffsetIQ2;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      store_scales_iq2(codes, block, 74, load_f16(unit<2>(block, 0, 0, h)), h);
      for (int half = 0; half < 2; ++half) {
        Ints high = load(unit(block, 66, half, h));  // 2 bits an octet
        for (int g = 4 * half; g < 4 * half + 4; ++g) {
          Ints q = load(unit(block, 2, g, h)), signs = load(unit(block, 34, g, h));
          for (int j = 0; j < 4; ++j) {
            const Ints index = bit_or(bit_and(q, splat(255)), bit_and(shift_left<8>(high), splat(0x300)));
            store_signed_octet<kOffsetIQ2>(codes, 4 * g + j, h, gather_64(iq2s_grid, index), signs);
            q = shift_right<8>(q);
            high = shift_right<2>(high);
            signs = shift_right<8>(signs);
          }
        }
      }
    }
  }
};

struct UnpackIQ3_XXS {
  static constexpr int kBlock = 256, kBlockBytes = 98, kGroup = 32, kMaxCode = 2 * kOffsetIQ3_XXS,
                       kCenter = kOffsetIQ3_XXS;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 0, 0, h));
      for (int g = 0; g < 8; ++g) {
        const Ints high = load(unit(block, 66, g, h));
        store_scale(codes, g, h, half_odd_scale(d, shift_right<28>(high), 0.5f));
        Ints signs = sign_bytes(high);
        for (int i = 0; i < 2; ++i) {
          const Ints q = load(unit(block, 2, 2 * g + i, h)), low_8 = splat(255);
          const IntPair first = {gather_32(iq3xxs_grid, bit_and(q, low_8)),
                                 gather_32(iq3xxs_grid, bit_and(shift_right<8>(q), low_8))};
          const IntPair second = {gather_32(iq3xxs_grid, bit_and(shift_right<16>(q), low_8)),
                                  gather_32(iq3xxs_grid, shift_right<24>(q))};
          store_signed_octet<kOffsetIQ3_XXS>(codes, 4 * g + 2 * i, h, first, signs);
          store_signed_octet<kOffsetIQ3_XXS>(codes, 4 * g + 2 * i + 1, h, second, shift_right<8>(signs));
          signs = shift_right<16>(signs);
        }
      }
    }
  }
};

struct UnpackIQ3_S {
  static constexpr int kBlock = 256, kBlockBytes = 110, kGroup = 32, kMaxCode = 2 * kOffsetIQ3_S,
                       kCenter = kOffsetIQ3_S;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    const Ints low_8 = splat(255), bit_8 = splat(256);
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 0, 0, h));
      Ints scales = load(unit(block, 106, 0, h)), high = zero_ints();
      for (int g = 0; g < 8; ++g) {
        store_scale(codes, g, h, odd_scale(d, bit_and(scales, splat(15))));
        scales = shift_right<4>(scales);
        if (g % 4 == 0) high = load(unit(block, 66, g / 4, h));  // a bit for each 4 weights
        Ints signs = load(unit(block, 74, g, h));
        for (int i = 0; i < 2; ++i) {
          const Ints q = load(unit(block, 2, 2 * g + i, h));
          const IntPair first = {
              gather_32(iq3s_grid, bit_or(bit_and(q, low_8), bit_and(shift_left<8>(high), bit_8))),
              gather_32(iq3s_grid, bit_or(bit_and(shift_right<8>(q), low_8), bit_and(shift_left<7>(high), bit_8)))};
          const IntPair second = {
              gather_32(iq3s_grid, bit_or(bit_and(shift_right<16>(q), low_8), bit_and(shift_left<6>(high), bit_8))),
              gather_32(iq3s_grid, bit_or(shift_right<24>(q), bit_and(shift_left<5>(high), bit_8)))};
          store_signed_octet<kOffsetIQ3_S>(codes, 4 * g + 2 * i, h, first, signs);
          store_signed_octet<kOffsetIQ3_S>(codes, 4 * g + 2 * i + 1, h, second, shift_right<8>(signs));
          signs = shift_right<16>(signs);
          high = shift_right<4>(high);
        }
      }
    }
  }
};

// IQ1: w = scale * (v +- 1/8), v = -1, 0 or 1, becomes scale / 8 * (code - 9): code = 8 (v + 1), and 2 more for + 1/8.
// So it makes no difference to what follows that IQ1_M has a sign for each octet.
constexpr int kOffsetIQ1 = 9;

// The codes of an octet. high: bits 0 to 2 of each lane are the upper bits of the index, low_8 its lowest 8 bits.
// plus: 0x02020202 in the rows where 1/8 is added.
inline void store_iq1_octet(Codes& codes, int octet, int h, Ints low_8, Ints high, Ints plus) {
  const Ints pairs = gather_32(iq1s_pairs, bit_or(low_8, bit_and(shift_left<8>(high), splat(0x700))));
  const Ints eights = splat(0x18181818);
  store(codes.quads[2 * octet][h * kLanes], bit_or(bit_and(pairs, eights), plus));
  store(codes.quads[2 * octet + 1][h * kLanes], bit_or(bit_and(shift_right<2>(pairs), eights), plus));
}

// 0x02020202 where the lane's highest bit, of a minus, is clear
inline Ints iq1_plus(Ints minus) {
  return bit_and(shift_right_signed<31>(bit_xor(minus, splat(0x80000000))), splat(0x02020202));
}

struct UnpackIQ1_S {
  static constexpr int kBlock = 256, kBlockBytes = 50, kGroup = 32, kMaxCode = 2 * kOffsetIQ1, kCenter = kOffsetIQ1;
  static constexpr bool kSigned = false, kHasMin = false;

  // high: the group's 16 bits in the upper half of each lane
  static inline void unpack_group(Codes& codes, int g, int h, Floats eighth, Ints q, Ints high) {
    store_scale(codes, g, h, odd_scale(eighth, bit_and(shift_right<28>(high), splat(7))));
    const Ints plus = iq1_plus(high);
    high = shift_right<16>(high);
    for (int j = 0; j < 4; ++j) {
      store_iq1_octet(codes, 4 * g + j, h, bit_and(q, splat(255)), high, plus);
      q = shift_right<8>(q);
      high = shift_right<3>(high);
    }
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Floats eighth = multiply(load_f16(unit<2>(block, 0, 0, h)), splat_float(0.125f));
      for (int i = 0; i < 4; ++i) {
        const Ints high = load(unit(block, 34, i, h));
        unpack_group(codes, 2 * i, h, eighth, load(unit(block, 2, 2 * i, h)), shift_left<16>(high));
        unpack_group(codes, 2 * i + 1, h, eighth, load(unit(block, 2, 2 * i + 1, h)), high);
      }
    }
  }
};

struct UnpackIQ1_M {
  static constexpr int kBlock = 256, kBlockBytes = 56, kGroup = 16, kMaxCode = 2 * kOffsetIQ1, kCenter = kOffsetIQ1;
  static constexpr bool kSigned = false, kHasMin = false;

  // words: 4 x 16 bits of each row: 4 x 3 bits of scales, then 4 bits of d.
  static inline void store_scales(Codes& codes, const Ints (&words)[2], int h) {
    const Ints low =
        bit_or(bit_and(shift_right<12>(words[0]), splat(0xf)), bit_and(shift_right<24>(words[0]), splat(0xf0)));
    const Ints high =
        bit_or(bit_and(shift_right<4>(words[1]), splat(0xf00)), bit_and(shift_right<16>(words[1]), splat(0xf000)));
    const Floats eighth = multiply(f16_to_floats(bit_or(low, high)), splat_float(0.125f));
    for (int i = 0; i < 4; ++i) {
      Ints bits = i % 2 == 0 ? words[i / 2] : shift_right<16>(words[i / 2]);
      for (int j = 0; j < 4; ++j) {
        store_scale(codes, 4 * i + j, h, odd_scale(eighth, bit_and(bits, splat(7))));
        bits = shift_right<3>(bits);
      }
    }
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Ints words[2] = {load(unit(block, 48, 0, h)), load(unit(block, 48, 1, h))};
      store_scales(codes, words, h);
      for (int i = 0; i < 4; ++i) {
        Ints high = load(unit(block, 32, i, h));  // a nibble an octet
        for (int g = 2 * i; g < 2 * i + 2; ++g) {
          Ints q = load(unit(block, 0, g, h));
          for (int j = 0; j < 4; ++j) {
            store_iq1_octet(codes, 4 * g + j, h, bit_and(q, splat(255)), high, iq1_plus(shift_left<28>(high)));
            q = shift_right<8>(q);
            high = shift_right<4>(high);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
