// The blocks of the GGUF file, byte for byte. Members are bytes, so a block may stand at any address.
#pragma once

#include <cstdint>

namespace kt {

inline constexpr int kBlockQ8_0 = 32;  // weights in a Q8_0 block
inline constexpr int kBlockK = 256;    // weights in a block of any K type

// w = d * q
struct BlockQ8_0 {
  uint8_t d[2];    // float16
  uint8_t qs[32];  // int8
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

static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 &&
              sizeof(BlockQ6_K) == 210);

// The 12 bytes of Q4_K and Q5_K: 6 bits each of scale[0..7] and min[0..7]. packed: [12]; scales, mins: [8].
static inline void unpack_scales_k4(const uint8_t* packed, uint8_t* scales, uint8_t* mins) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = packed[i] & 63;
    mins[i] = packed[4 + i] & 63;
    scales[4 + i] = static_cast<uint8_t>((packed[8 + i] & 15) | ((packed[i] >> 6) << 4));
    mins[4 + i] = static_cast<uint8_t>((packed[8 + i] >> 4) | ((packed[4 + i] >> 6) << 4));
  }
}

}  // namespace kt
