// The blocks of the GGUF file, byte for byte. Members are bytes, so a block may stand at any address.
#pragma once

#include <cstdint>

namespace kt {

inline constexpr int kBlock32 = 32;  // weights in a block of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and MXFP4
inline constexpr int kBlockQ8_0 = kBlock32;
inline constexpr int kBlockK = 256;  // weights in a block of any K type and any other IQ type

// In formulas, q is what is stored for a weight, and numbers of more than one byte are little endian.

// Blocks of 32. Where there are nibbles, those of byte j are of weights j (low) and 16 + j (high).

// w = d * (q - 8)
struct BlockQ4_0 {
  uint8_t d[2];    // float16
  uint8_t qs[16];  // nibbles
};

// w = d * q + m
struct BlockQ4_1 {
  uint8_t d[2];  // float16
  uint8_t m[2];  // float16
  uint8_t qs[16];
};

// w = d * (q - 16)
struct BlockQ5_0 {
  uint8_t d[2];   // float16
  uint8_t qh[4];  // bit i of the 32 is the fifth bit of weight i
  uint8_t qs[16];
};

// w = d * q + m
struct BlockQ5_1 {
  uint8_t d[2];   // float16
  uint8_t m[2];   // float16
  uint8_t qh[4];  // as in Q5_0
  uint8_t qs[16];
};

// w = d * q
struct BlockQ8_0 {
  uint8_t d[2];    // float16
  uint8_t qs[32];  // int8
};

// w = d * iq4nl_values[q]
struct BlockIQ4_NL {
  uint8_t d[2];  // float16
  uint8_t qs[16];
};

// w = 2^(e - 128) * mxfp4_values[q]: E2M1 times an E8M0 scale of 2^(e - 127), with the values of the table doubled.
struct BlockMXFP4 {
  uint8_t e;
  uint8_t qs[16];
};

// Blocks of 256.

// w = d * scale * q - dmin * min; one 4-bit scale and one 4-bit min for each 16 weights.
struct BlockQ2_K {
  uint8_t scales[16];  // low nibble: scale of weights 16 i to 16 i + 15; high nibble: their min
  uint8_t qs[64];      // [2][32]: bit pair p of byte j is weight 128 i + 32 p + j
  uint8_t d[2];        // float16
  uint8_t dmin[2];     // float16
};

// w = d * (scale - 32) * (q - 4); one 6-bit scale for each 16 weights.
struct BlockQ3_K {
  uint8_t hmask[32];   // bit i of byte j is the third bit of weight 32 i + j
  uint8_t qs[64];      // the other two bits, as in Q2_K
  uint8_t scales[12];  // 16 scales, see unpack_scales_q3_k()
  uint8_t d[2];        // float16
};

// w = d * scale * q - dmin * min; one 6-bit scale and one 6-bit min for each 32 weights.
struct BlockQ4_K {
  uint8_t d[2];        // float16
  uint8_t dmin[2];     // float16
  uint8_t scales[12];  // 8 scales and 8 mins, see unpack_scales_k4()
  uint8_t qs[128];     // [4][32]: low nibbles are weights 64 i + j, high nibbles 64 i + 32 + j
};

// As Q4_K, with a fifth bit.
struct BlockQ5_K {
  uint8_t d[2];
  uint8_t dmin[2];
  uint8_t scales[12];
  uint8_t qh[32];   // bit i of byte j is the fifth bit of weight 32 i + j
  uint8_t qs[128];  // as in Q4_K
};

// w = d * scale * (q - 32); one int8 scale for each 16 weights.
struct BlockQ6_K {
  uint8_t ql[128];     // [2][64]: low nibbles are weights 128 i + j, high nibbles 128 i + 64 + j
  uint8_t qh[64];      // [2][32]: bit pair p of byte j holds bits 4 and 5 of weight 128 i + 32 p + j
  uint8_t scales[16];  // int8
  uint8_t d[2];        // float16
};

// The IQ types keep, for 8 weights (IQ3: 4), the index of an entry of a codebook in iq_grids.h, and signs apart.
// Below, group g is weights 32 g to 32 g + 31 and octet o is weights 8 o to 8 o + 7.

// w = d * (2 * scale + 1) * (iq1s_grid[index] +- 1/8); one 3-bit scale and one sign of the 1/8 for each group.
struct BlockIQ1_S {
  uint8_t d[2];    // float16
  uint8_t qs[32];  // low 8 bits of the index of octet o
  uint8_t qh[16];  // [8] uint16, one a group: 4 x 3 high bits of the indices, 3 bits scale, 1 bit: minus 1/8
};

// As IQ1_S, with a scale for each 16 weights and a sign of the 1/8 for each octet.
struct BlockIQ1_M {
  uint8_t qs[32];     // as in IQ1_S
  uint8_t qh[16];     // a nibble for each octet, low one first: 3 high bits of the index, 1 bit: minus 1/8
  uint8_t scales[8];  // [4] uint16: 4 x 3 bits scale; the 4 highest bits of all, first word lowest, are d as float16
};

// w = d * (scale + 1/2) / 4 * +-iq2xxs_grid[index]; one 4-bit scale for each group.
struct BlockIQ2_XXS {
  uint8_t d[2];    // float16
  uint8_t qs[64];  // [8][8], one a group: 4 indices; uint32 of 4 x 7 bits, see iq_signs(), and 4 bits scale
};

// w = d * (scale + 1/2) / 4 * +-iq2xs_grid[index]; one 4-bit scale for each 16 weights.
struct BlockIQ2_XS {
  uint8_t d[2];       // float16
  uint8_t qs[64];     // [32] uint16, one an octet: 9 bits index, 7 bits signs, see iq_signs()
  uint8_t scales[8];  // nibbles, low one first
};

// w = d * (scale + 1/2) / 4 * +-iq2s_grid[index]; one 4-bit scale for each 16 weights.
struct BlockIQ2_S {
  uint8_t d[2];       // float16
  uint8_t qs[32];     // low 8 bits of the index of octet o
  uint8_t signs[32];  // bit i of byte o: weight i of octet o is negative
  uint8_t qh[8];      // bit pairs, lowest first: high 2 bits of the index of octet o
  uint8_t scales[8];  // nibbles, low one first
};

// w = d * (scale + 1/2) / 2 * +-iq3xxs_grid[index]; one 4-bit scale for each group.
struct BlockIQ3_XXS {
  uint8_t d[2];       // float16
  uint8_t qs[64];     // index for 4 weights
  uint8_t signs[32];  // [8] uint32, one a group: 4 x 7 bits, see iq_signs(), and 4 bits scale
};

// w = d * (2 * scale + 1) * +-iq3s_grid[index]; one 4-bit scale for each group.
struct BlockIQ3_S {
  uint8_t d[2];       // float16
  uint8_t qs[64];     // low 8 bits of the index for 4 weights
  uint8_t qh[8];      // bit i of byte g is the ninth bit of the index for weights 32 g + 4 i to 32 g + 4 i + 3
  uint8_t signs[32];  // as in IQ2_S
  uint8_t scales[4];  // nibbles, low one first
};

// w = d * (scale - 32) * iq4nl_values[q]; one 6-bit scale for each group.
struct BlockIQ4_XS {
  uint8_t d[2];         // float16
  uint8_t scales_h[2];  // bit pair g is the high bits of the scale of group g
  uint8_t scales_l[4];  // nibbles, low one first: its low bits
  uint8_t qs[128];      // [8][16]: nibbles of byte j are weights 32 g + j (low) and 32 g + 16 + j (high)
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 &&
              sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18 &&
              sizeof(BlockMXFP4) == 17);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144 &&
              sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ1_S) == 50 && sizeof(BlockIQ1_M) == 56 && sizeof(BlockIQ2_XXS) == 66 &&
              sizeof(BlockIQ2_XS) == 74 && sizeof(BlockIQ2_S) == 82 && sizeof(BlockIQ3_XXS) == 98 &&
              sizeof(BlockIQ3_S) == 110 && sizeof(BlockIQ4_XS) == 136);

// The 12 bytes of Q3_K: 6 bits each of 16 scales, of which 32 is yet to be taken. packed: [12]; scales: [16].
static inline void unpack_scales_q3_k(const uint8_t* packed, uint8_t* scales) {
  for (int i = 0; i < 16; ++i) {
    const int low = (packed[i % 8] >> (i / 8 * 4)) & 15, high = (packed[8 + i % 4] >> (i / 4 * 2)) & 3;
    scales[i] = static_cast<uint8_t>(low | (high << 4));
  }
}

// The 12 bytes of Q4_K and Q5_K: 6 bits each of scale[0..7] and min[0..7]. packed: [12]; scales, mins: [8].
static inline void unpack_scales_k4(const uint8_t* packed, uint8_t* scales, uint8_t* mins) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = packed[i] & 63;
    mins[i] = packed[4 + i] & 63;
    scales[4 + i] = static_cast<uint8_t>((packed[8 + i] & 15) | ((packed[i] >> 6) << 4));
    mins[4 + i] = static_cast<uint8_t>((packed[8 + i] >> 4) | ((packed[4 + i] >> 6) << 4));
  }
}

// The float16 bits that IQ1_M spreads over its scales. scales: [8].
static inline uint16_t iq1_m_scale_bits(const uint8_t* scales) {
  return static_cast<uint16_t>((scales[1] >> 4) | (scales[3] & 0xf0) | ((scales[5] & 0xf0) << 4) |
                               ((scales[7] & 0xf0) << 8));
}

}  // namespace kt
