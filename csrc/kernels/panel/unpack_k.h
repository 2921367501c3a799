// Q2_K to Q6_K: blocks of 256. Formats: gguf/block_layouts.h. `m` is the place of a quad within 32 consecutive weights.
#pragma once

#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

// The scales and mins of Q4_K and Q5_K from their three words: bytes of each lane in group order.
struct ScaleBytesK4 {
  Ints scales[2], mins[2];  // groups 0..3 and 4..7
};

inline ScaleBytesK4 scale_bytes_k4(const uint8_t* block, int offset, int h) {
  const Ints a = load(unit(block, offset, 0, h)), b = load(unit(block, offset, 1, h)),
             c = load(unit(block, offset, 2, h));
  const Ints low_6 = splat(0x3f3f3f3f), bits_45 = splat(0x30303030);
  return {{bit_and(a, low_6), bit_or(low_nibbles(c), bit_and(shift_right<2>(a), bits_45))},
          {bit_and(b, low_6), bit_or(high_nibbles(c), bit_and(shift_right<2>(b), bits_45))}};
}

template <int j>
inline void store_scale_k4(Codes& codes, const ScaleBytesK4& bytes, Floats d, Floats dmin, int h) {
  for (int half = 0; half < 2; ++half) {
    store_floats(codes.scales[4 * half + j] + h * kLanes, multiply(d, byte_to_floats<j>(bytes.scales[half])));
    store_floats(codes.mins[4 * half + j] + h * kLanes, multiply(dmin, byte_to_floats<j>(bytes.mins[half])));
  }
}

inline void store_scales_k4(Codes& codes, const uint8_t* block, int h) {
  const Floats d = load_f16(unit<2>(block, 0, 0, h)), dmin = load_f16(unit<2>(block, 2, 0, h));
  const ScaleBytesK4 bytes = scale_bytes_k4(block, 4, h);
  store_scale_k4<0>(codes, bytes, d, dmin, h);
  store_scale_k4<1>(codes, bytes, d, dmin, h);
  store_scale_k4<2>(codes, bytes, d, dmin, h);
  store_scale_k4<3>(codes, bytes, d, dmin, h);
}

struct UnpackQ4_K {
  static constexpr int kBlock = 256, kBlockBytes = 144, kGroup = 32, kMaxCode = 15, kCenter = 8;
  static constexpr bool kSigned = false, kHasMin = true;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      store_scales_k4(codes, block, h);
      for (int i = 0; i < 4; ++i)
        for (int m = 0; m < 8; ++m) {
          const Ints q = load(unit(block, 16, 8 * i + m, h));
          store(codes.quads[16 * i + m][h * kLanes], low_nibbles(q));
          store(codes.quads[16 * i + 8 + m][h * kLanes], high_nibbles(q));
        }
    }
  }
};

struct UnpackQ5_K {
  static constexpr int kBlock = 256, kBlockBytes = 176, kGroup = 32, kMaxCode = 31, kCenter = 16;
  static constexpr bool kSigned = false, kHasMin = true;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    const Ints bit_4 = splat(0x10101010);
    for (int h = 0; h < kHalves; ++h) {
      store_scales_k4(codes, block, h);
      for (int m = 0; m < 8; ++m) {
        Ints fifth = load(unit(block, 16, m, h));  // bit i: group i
        for (int i = 0; i < 4; ++i) {
          const Ints q = load(unit(block, 48, 8 * i + m, h));
          store(codes.quads[16 * i + m][h * kLanes], bit_or(low_nibbles(q), bit_and(shift_left<4>(fifth), bit_4)));
          store(codes.quads[16 * i + 8 + m][h * kLanes], bit_or(high_nibbles(q), bit_and(shift_left<3>(fifth), bit_4)));
          fifth = shift_right<2>(fifth);
        }
      }
    }
  }
};

struct UnpackQ6_K {
  static constexpr int kBlock = 256, kBlockBytes = 210, kGroup = 16, kMaxCode = 63, kCenter = 32;
  static constexpr bool kSigned = false, kHasMin = false;

  template <int j>
  static inline void store_scale(Codes& codes, Ints bytes, Floats d, int word, int h) {
    store_floats(codes.scales[4 * word + j] + h * kLanes, multiply(d, signed_byte_to_floats<j>(bytes)));
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    const Ints bits_45 = splat(0x30303030);
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 208, 0, h));
      for (int word = 0; word < 4; ++word) {
        const Ints bytes = load(unit(block, 192, word, h));
        store_scale<0>(codes, bytes, d, word, h);
        store_scale<1>(codes, bytes, d, word, h);
        store_scale<2>(codes, bytes, d, word, h);
        store_scale<3>(codes, bytes, d, word, h);
      }
      for (int i = 0; i < 2; ++i)
        for (int m = 0; m < 8; ++m) {
          const Ints high = load(unit(block, 128, 8 * i + m, h));  // bit pair p: weights 32 p + ..
          const Ints a = load(unit(block, 0, 16 * i + m, h)), b = load(unit(block, 0, 16 * i + 8 + m, h));
          uint8_t (*quads)[kPanelRows][4] = codes.quads + 32 * i + m;
          store(quads[0][h * kLanes], bit_or(low_nibbles(a), bit_and(shift_left<4>(high), bits_45)));
          store(quads[8][h * kLanes], bit_or(low_nibbles(b), bit_and(shift_left<2>(high), bits_45)));
          store(quads[16][h * kLanes], bit_or(high_nibbles(a), bit_and(high, bits_45)));
          store(quads[24][h * kLanes], bit_or(high_nibbles(b), bit_and(shift_right<2>(high), bits_45)));
        }
    }
  }
};

// Bit pair p of byte j of half i: weight 128 i + 32 p + j. The codes of Q2_K, the low bits of Q3_K's.
inline Ints pair_of(Ints q, int p) {
  const Ints mask = splat(0x03030303);
  switch (p) {
    case 0:
      return bit_and(q, mask);
    case 1:
      return bit_and(shift_right<2>(q), mask);
    case 2:
      return bit_and(shift_right<4>(q), mask);
    default:
      return bit_and(shift_right<6>(q), mask);
  }
}

struct UnpackQ2_K {
  static constexpr int kBlock = 256, kBlockBytes = 84, kGroup = 16, kMaxCode = 3, kCenter = 2;
  static constexpr bool kSigned = false, kHasMin = true;

  template <int j>
  static inline void store_scale(Codes& codes, Ints bytes, Floats d, Floats dmin, int word, int h) {
    store_floats(codes.scales[4 * word + j] + h * kLanes, multiply(d, byte_to_floats<j>(low_nibbles(bytes))));
    store_floats(codes.mins[4 * word + j] + h * kLanes, multiply(dmin, byte_to_floats<j>(high_nibbles(bytes))));
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 80, 0, h)), dmin = load_f16(unit<2>(block, 82, 0, h));
      for (int word = 0; word < 4; ++word) {
        const Ints bytes = load(unit(block, 0, word, h));
        store_scale<0>(codes, bytes, d, dmin, word, h);
        store_scale<1>(codes, bytes, d, dmin, word, h);
        store_scale<2>(codes, bytes, d, dmin, word, h);
        store_scale<3>(codes, bytes, d, dmin, word, h);
      }
      for (int i = 0; i < 2; ++i)
        for (int m = 0; m < 8; ++m) {
          const Ints q = load(unit(block, 16, 8 * i + m, h));
          for (int p = 0; p < 4; ++p) store(codes.quads[32 * i + 8 * p + m][h * kLanes], pair_of(q, p));
        }
    }
  }
};

struct UnpackQ3_K {
  static constexpr int kBlock = 256, kBlockBytes = 110, kGroup = 16, kMaxCode = 7, kCenter = 4;
  static constexpr bool kSigned = false, kHasMin = false;

  template <int j>
  static inline void store_scale(Codes& codes, Ints bytes, Floats d, int word, int h) {
    store_floats(codes.scales[4 * word + j] + h * kLanes, multiply(d, add(byte_to_floats<j>(bytes), splat_float(-32))));
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    const Ints bits_45 = splat(0x30303030), bit_2 = splat(0x04040404);
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 108, 0, h));
      const Ints a = load(unit(block, 96, 0, h)), b = load(unit(block, 96, 1, h)), c = load(unit(block, 96, 2, h));
      const Ints bytes[4] = {bit_or(low_nibbles(a), bit_and(shift_left<4>(c), bits_45)),
                             bit_or(low_nibbles(b), bit_and(shift_left<2>(c), bits_45)),
                             bit_or(high_nibbles(a), bit_and(c, bits_45)),
                             bit_or(high_nibbles(b), bit_and(shift_right<2>(c), bits_45))};
      for (int word = 0; word < 4; ++word) {
        store_scale<0>(codes, bytes[word], d, word, h);
        store_scale<1>(codes, bytes[word], d, word, h);
        store_scale<2>(codes, bytes[word], d, word, h);
        store_scale<3>(codes, bytes[word], d, word, h);
      }
      for (int m = 0; m < 8; ++m) {
        // Bit 4 i + p of byte j: the third bit of weight 128 i + 32 p + j; set, the code is not less 4.
        Ints third = load(unit(block, 0, m, h));
        for (int i = 0; i < 2; ++i) {
          const Ints q = load(unit(block, 32, 8 * i + m, h));
          uint8_t (*quads)[kPanelRows][4] = codes.quads + 32 * i + m;
          store(quads[0][h * kLanes], bit_or(pair_of(q, 0), bit_and(shift_left<2>(third), bit_2)));
          store(quads[8][h * kLanes], bit_or(pair_of(q, 1), bit_and(shift_left<1>(third), bit_2)));
          store(quads[16][h * kLanes], bit_or(pair_of(q, 2), bit_and(third, bit_2)));
          store(quads[24][h * kLanes], bit_or(pair_of(q, 3), bit_and(shift_right<1>(third), bit_2)));
          third = shift_right<4>(third);
        }
      }
    }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
