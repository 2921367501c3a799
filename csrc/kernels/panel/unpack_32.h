// Types in blocks of 32 with one scale, and IQ4_XS, which is eight such blocks with 6-bit scales. Formats:
// gguf/block_layouts.h. In all of them nibbles of byte j are weights j (low) and j + 16 (high). `g` is the block's
// group in Codes.
#pragma once

#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

inline void store_scale(Codes& codes, int g, int h, Floats scale) { store_floats(codes.scales[g] + h * kLanes, scale); }
inline void store_min(Codes& codes, int g, int h, Floats min) { store_floats(codes.mins[g] + h * kLanes, min); }
inline void store_quad(Codes& codes, int g, int m, int h, Ints quad) {
  store(codes.quads[8 * g + m][h * kLanes], quad);
}

struct UnpackQ4_0 {
  static constexpr int kBlock = 32, kBlockBytes = 18, kGroup = 32, kMaxCode = 15, kCenter = 8;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      for (int m = 0; m < 4; ++m) {
        const Ints q = load(unit(block, 2, m, h));
        store_quad(codes, g, m, h, low_nibbles(q));
        store_quad(codes, g, 4 + m, h, high_nibbles(q));
      }
    }
  }
};

struct UnpackQ4_1 {
  static constexpr int kBlock = 32, kBlockBytes = 20, kGroup = 32, kMaxCode = 15, kCenter = 8;
  static constexpr bool kSigned = false, kHasMin = true;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      store_min(codes, g, h, multiply(load_f16(unit<2>(block, 2, 0, h)), splat_float(-1)));
      for (int m = 0; m < 4; ++m) {
        const Ints q = load(unit(block, 4, m, h));
        store_quad(codes, g, m, h, low_nibbles(q));
        store_quad(codes, g, 4 + m, h, high_nibbles(q));
      }
    }
  }
};

// The lowest four bits of each lane to bit 4 of its four bytes: the multiplication makes four copies that do not
// overlap, with bit i of the i-th at its place.
inline Ints fifth_bits(Ints bits) {
  return bit_and(multiply_ints(bit_and(bits, splat(15)), splat(1u << 4 | 1u << 11 | 1u << 18 | 1u << 25)),
                 splat(0x10101010));
}

// Nibbles at qs_offset, the fifth bit of weight j is bit j of the word at qh_offset.
inline void store_quads_5_bits(Codes& codes, const uint8_t* block, int qh_offset, int qs_offset, int g, int h) {
  Ints low = load(unit(block, qh_offset, 0, h));
  Ints high = shift_right<16>(low);
  for (int m = 0; m < 4; ++m) {
    const Ints q = load(unit(block, qs_offset, m, h));
    store_quad(codes, g, m, h, bit_or(low_nibbles(q), fifth_bits(low)));
    store_quad(codes, g, 4 + m, h, bit_or(high_nibbles(q), fifth_bits(high)));
    low = shift_right<4>(low);
    high = shift_right<4>(high);
  }
}

struct UnpackQ5_0 {
  static constexpr int kBlock = 32, kBlockBytes = 22, kGroup = 32, kMaxCode = 31, kCenter = 16;
  static constexpr bool kSigned = false, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      store_quads_5_bits(codes, block, 2, 6, g, h);
    }
  }
};

struct UnpackQ5_1 {
  static constexpr int kBlock = 32, kBlockBytes = 24, kGroup = 32, kMaxCode = 31, kCenter = 16;
  static constexpr bool kSigned = false, kHasMin = true;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      store_min(codes, g, h, multiply(load_f16(unit<2>(block, 2, 0, h)), splat_float(-1)));
      store_quads_5_bits(codes, block, 4, 8, g, h);
    }
  }
};

struct UnpackQ8_0 {
  static constexpr int kBlock = 32, kBlockBytes = 34, kGroup = 32, kMaxCode = 255, kCenter = 0;
  static constexpr bool kSigned = true, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      for (int m = 0; m < 8; ++m) store_quad(codes, g, m, h, load(unit(block, 2, m, h)));
    }
  }
};

// The non-linear values of IQ4_NL and IQ4_XS.
alignas(16) constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

struct UnpackIQ4_NL {
  static constexpr int kBlock = 32, kBlockBytes = 18, kGroup = 32, kMaxCode = 255, kCenter = 0;
  static constexpr bool kSigned = true, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, load_f16(unit<2>(block, 0, 0, h)));
      for (int m = 0; m < 4; ++m) {
        const Ints q = load(unit(block, 2, m, h));
        store_quad(codes, g, m, h, look_up(kIq4Values, low_nibbles(q)));
        store_quad(codes, g, 4 + m, h, look_up(kIq4Values, high_nibbles(q)));
      }
    }
  }
};

struct UnpackIQ4_XS {
  static constexpr int kBlock = 256, kBlockBytes = 136, kGroup = 32, kMaxCode = 255, kCenter = 0;
  static constexpr bool kSigned = true, kHasMin = false;

  static inline void unpack(const uint8_t* block, Codes& codes, int) {
    for (int h = 0; h < kHalves; ++h) {
      const Floats d = load_f16(unit<2>(block, 0, 0, h));
      Ints low = load(unit(block, 4, 0, h));                    // 4 bits a group
      Ints high = zero_extend_halves(unit<2>(block, 2, 0, h));  // 2 bits a group
      for (int g = 0; g < 8; ++g) {
        const Ints bits = bit_or(bit_and(low, splat(15)), bit_and(shift_left<4>(high), splat(0x30)));
        store_scale(codes, g, h, multiply(d, add(to_floats(bits), splat_float(-32))));
        low = shift_right<4>(low);
        high = shift_right<2>(high);
        for (int m = 0; m < 4; ++m) {
          const Ints q = load(unit(block, 8, 4 * g + m, h));
          store_quad(codes, g, m, h, look_up(kIq4Values, low_nibbles(q)));
          store_quad(codes, g, 4 + m, h, look_up(kIq4Values, high_nibbles(q)));
        }
      }
    }
  }
};

// Twice the values of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), plus 12 to be unsigned.
alignas(16) constexpr uint8_t kMxfp4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct UnpackMXFP4 {
  static constexpr int kBlock = 32, kBlockBytes = 17, kGroup = 32, kMaxCode = 24, kCenter = 12;
  static constexpr bool kSigned = false, kHasMin = false;

  // Half of the E8M0 scale, 2^(e - 128), as a product of two powers: each is a normal float for every e.
  static inline Floats scale(const uint8_t* exponents) {
    const Ints e = zero_extend_bytes(exponents);
    const Ints half = shift_right<1>(e), bias = splat(63);
    const Ints rest = add_ints(half, bit_and(e, splat(1)));
    return multiply(as_floats(shift_left<23>(add_ints(half, bias))), as_floats(shift_left<23>(add_ints(rest, bias))));
  }

  static inline void unpack(const uint8_t* block, Codes& codes, int g) {
    for (int h = 0; h < kHalves; ++h) {
      store_scale(codes, g, h, scale(unit<1>(block, 0, 0, h)));
      for (int m = 0; m < 4; ++m) {
        const Ints q = load(unit(block, 1, m, h));
        store_quad(codes, g, m, h, look_up(kMxfp4Codes, low_nibbles(q)));
        store_quad(codes, g, 4 + m, h, look_up(kMxfp4Codes, high_nibbles(q)));
      }
    }
  }
};

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
