// Decoding against values worked out by hand. Bit-exactness against the `gguf` package is tested from Python.
#include <cmath>
#include <cstring>

#include "check.h"
#include "gguf/block_layouts.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "gguf/iq_grids.h"
#include "test_harness.h"

namespace kt {
namespace {

constexpr uint8_t kHalfOne[2] = {0x00, 0x3c};      // 1.0
constexpr uint8_t kHalfQuarter[2] = {0x00, 0x34};  // 0.25

template <class Block>
std::vector<float> decode(GgmlType type, const Block& block) {
  // An odd address: blocks may stand anywhere.
  std::vector<uint8_t> bytes(sizeof block + 1);
  std::memcpy(bytes.data() + 1, &block, sizeof block);
  std::vector<float> out(ggml_type_info(type).block_size);
  dequantize(type, bytes.data() + 1, static_cast<int64_t>(out.size()), out.data());
  return out;
}

TEST(type_table) {
  int count = 0;
  const GgmlTypeInfo* types = ggml_types(&count);
  CHECK(count == 23, count);
  for (int i = 0; i < count; ++i) {
    CHECK(i == 0 || types[i - 1].type < types[i].type, types[i].name << " out of order");
    CHECK(&ggml_type_info(types[i].type) == &types[i], types[i].name);
    CHECK(&ggml_type_info(std::string_view(types[i].name)) == &types[i], types[i].name);
  }
  CHECK(ggml_row_bytes(GgmlType::Q4_K, 7168) == 28 * 144, ggml_row_bytes(GgmlType::Q4_K, 7168));
  CHECK(ggml_row_bytes(GgmlType::BF16, 3) == 6, "bf16");
  CHECK_ERROR(ggml_type_info(static_cast<GgmlType>(4)), "number 4", "Q4_K", "BF16");
  CHECK_ERROR(ggml_type_info("TQ1_0"), "TQ1_0", "Q6_K");
  CHECK_ERROR(ggml_row_bytes(GgmlType::Q6_K, 300), "300", "Q6_K", "256");
  float out;
  CHECK_ERROR(dequantize(GgmlType::Q8_0, nullptr, 31, &out), "31", "32");
}

TEST(q8_0) {
  BlockQ8_0 block = {};
  std::memcpy(block.d, kHalfQuarter, 2);
  for (int i = 0; i < 32; ++i) block.qs[i] = static_cast<uint8_t>(i * 8 - 128);
  const auto out = decode(GgmlType::Q8_0, block);
  for (int i = 0; i < 32; ++i) CHECK(out[i] == 0.25f * static_cast<float>(i * 8 - 128), i << " " << out[i]);
}

// Scales 1 + j and mins 63 - j for group j: small and large, so both ways of packing carry high bits somewhere.
void pack_scales(uint8_t* packed) {
  for (int j = 0; j < 4; ++j) {
    const int low_scale = 1 + j, low_min = 63 - j, high_scale = 5 + j + 48, high_min = 59 - j;
    packed[j] = static_cast<uint8_t>(low_scale | (high_scale >> 4 << 6));
    packed[4 + j] = static_cast<uint8_t>(low_min | (high_min >> 4 << 6));
    packed[8 + j] = static_cast<uint8_t>((high_scale & 15) | ((high_min & 15) << 4));
  }
}
int scale_of(int group) { return group < 4 ? 1 + group : 1 + group + 48; }
int min_of(int group) { return 63 - group; }

TEST(q4_k) {
  BlockQ4_K block = {};
  std::memcpy(block.d, kHalfOne, 2);
  std::memcpy(block.dmin, kHalfQuarter, 2);
  pack_scales(block.scales);
  for (int i = 0; i < 256; ++i)
    block.qs[i / 64 * 32 + i % 32] |= static_cast<uint8_t>((i * 7 % 16) << (i / 32 % 2 * 4));
  const auto out = decode(GgmlType::Q4_K, block);
  for (int i = 0; i < 256; ++i) {
    const int group = i / 32;
    const float want = static_cast<float>(scale_of(group) * (i * 7 % 16)) - 0.25f * static_cast<float>(min_of(group));
    CHECK(out[i] == want, i << " got " << out[i] << " want " << want);
  }
}

TEST(q5_k) {
  BlockQ5_K block = {};
  std::memcpy(block.d, kHalfOne, 2);
  std::memcpy(block.dmin, kHalfQuarter, 2);
  pack_scales(block.scales);
  for (int i = 0; i < 256; ++i) {
    const int q = i * 11 % 32;
    block.qs[i / 64 * 32 + i % 32] |= static_cast<uint8_t>((q & 15) << (i / 32 % 2 * 4));
    block.qh[i % 32] |= static_cast<uint8_t>((q >> 4) << (i / 32));
  }
  const auto out = decode(GgmlType::Q5_K, block);
  for (int i = 0; i < 256; ++i) {
    const int group = i / 32;
    const float want = static_cast<float>(scale_of(group) * (i * 11 % 32)) - 0.25f * static_cast<float>(min_of(group));
    CHECK(out[i] == want, i << " got " << out[i] << " want " << want);
  }
}

TEST(q6_k) {
  BlockQ6_K block = {};
  std::memcpy(block.d, kHalfQuarter, 2);
  for (int j = 0; j < 16; ++j) block.scales[j] = static_cast<uint8_t>(j * 16 - 128);
  for (int i = 0; i < 256; ++i) {
    const int q = i * 13 % 64, half = i / 128, j = i % 128;
    block.ql[half * 64 + j % 64] |= static_cast<uint8_t>((q & 15) << (j / 64 * 4));
    block.qh[half * 32 + j % 32] |= static_cast<uint8_t>((q >> 4) << (j / 32 * 2));
  }
  const auto out = decode(GgmlType::Q6_K, block);
  for (int i = 0; i < 256; ++i) {
    const float want = 0.25f * static_cast<float>((i / 16 * 16 - 128) * (i * 13 % 64 - 32));
    CHECK(out[i] == want, i << " got " << out[i] << " want " << want);
  }
}

// Puts value into bits `at` and up of a row of bits, lowest bit of the first byte first.
void put_bits(uint8_t* bytes, int at, int num_bits, int value) {
  for (int i = 0; i < num_bits; ++i)
    bytes[(at + i) / 8] = static_cast<uint8_t>(bytes[(at + i) / 8] | (value >> i & 1) << ((at + i) % 8));
}

// Compares with want(i), which must be exact.
template <class Want>
void check_decoded(GgmlType type, const std::vector<float>& out, Want want) {
  for (int i = 0; i < static_cast<int>(out.size()); ++i)
    CHECK(out[i] == want(i), ggml_type_info(type).name << " " << i << " got " << out[i] << " want " << want(i));
}

TEST(nibbles_in_blocks_of_32) {
  BlockQ4_0 q4_0 = {};
  BlockQ4_1 q4_1 = {};
  BlockQ5_0 q5_0 = {};
  BlockQ5_1 q5_1 = {};
  BlockIQ4_NL iq4_nl = {};
  BlockMXFP4 mxfp4 = {};
  for (uint8_t* d : {q4_0.d, q4_1.d, q5_0.d, q5_1.d, iq4_nl.d}) std::memcpy(d, kHalfQuarter, 2);
  std::memcpy(q4_1.m, kHalfOne, 2);
  std::memcpy(q5_1.m, kHalfOne, 2);
  mxfp4.e = 126;  // an E8M0 scale of 1/2
  const auto q4 = [](int i) { return i * 7 % 16; };
  const auto q5 = [](int i) { return i * 11 % 32; };
  for (int i = 0; i < 32; ++i) {
    const int at = i % 16 * 8 + i / 16 * 4;
    for (uint8_t* qs : {q4_0.qs, q4_1.qs, iq4_nl.qs, mxfp4.qs}) put_bits(qs, at, 4, q4(i));
    for (uint8_t* qs : {q5_0.qs, q5_1.qs}) put_bits(qs, at, 4, q5(i) & 15);
    for (uint8_t* qh : {q5_0.qh, q5_1.qh}) put_bits(qh, i, 1, q5(i) >> 4);
  }
  check_decoded(GgmlType::Q4_0, decode(GgmlType::Q4_0, q4_0), [&](int i) { return 0.25f * (q4(i) - 8); });
  check_decoded(GgmlType::Q4_1, decode(GgmlType::Q4_1, q4_1), [&](int i) { return 0.25f * q4(i) + 1; });
  check_decoded(GgmlType::Q5_0, decode(GgmlType::Q5_0, q5_0), [&](int i) { return 0.25f * (q5(i) - 16); });
  check_decoded(GgmlType::Q5_1, decode(GgmlType::Q5_1, q5_1), [&](int i) { return 0.25f * q5(i) + 1; });
  check_decoded(GgmlType::IQ4_NL, decode(GgmlType::IQ4_NL, iq4_nl), [&](int i) { return 0.25f * iq4nl_values[q4(i)]; });
  const float e2m1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
  check_decoded(GgmlType::MXFP4, decode(GgmlType::MXFP4, mxfp4), [&](int i) { return 0.5f * e2m1[q4(i)]; });
}

TEST(e8m0) {
  for (int e = 0; e < 256; ++e) {
    const float want = std::ldexp(1.0f, e - 128);
    CHECK(e8m0_half_to_f32(static_cast<uint8_t>(e)) == want, e);
  }
}

TEST(q2_k) {
  BlockQ2_K block = {};
  std::memcpy(block.d, kHalfOne, 2);
  std::memcpy(block.dmin, kHalfQuarter, 2);
  for (int j = 0; j < 16; ++j) block.scales[j] = static_cast<uint8_t>((15 - j) | j * 7 % 16 << 4);
  const auto q = [](int i) { return i * 5 / 3 % 4; };
  for (int i = 0; i < 256; ++i) put_bits(block.qs, (i / 128 * 32 + i % 32) * 8 + i % 128 / 32 * 2, 2, q(i));
  check_decoded(GgmlType::Q2_K, decode(GgmlType::Q2_K, block),
                [&](int i) { return static_cast<float>((15 - i / 16) * q(i)) - 0.25f * (i / 16 * 7 % 16); });
}

TEST(q3_k) {
  BlockQ3_K block = {};
  std::memcpy(block.d, kHalfQuarter, 2);
  const auto scale = [](int group) { return group * 13 % 64; };
  for (int j = 0; j < 16; ++j) {
    put_bits(block.scales, j % 8 * 8 + j / 8 * 4, 4, scale(j) & 15);
    put_bits(block.scales + 8, j % 4 * 8 + j / 4 * 2, 2, scale(j) >> 4);
  }
  const auto q = [](int i) { return i * 5 / 3 % 8; };
  for (int i = 0; i < 256; ++i) {
    put_bits(block.qs, (i / 128 * 32 + i % 32) * 8 + i % 128 / 32 * 2, 2, q(i) & 3);
    put_bits(block.hmask, i % 32 * 8 + i / 32, 1, q(i) >> 2);
  }
  check_decoded(GgmlType::Q3_K, decode(GgmlType::Q3_K, block),
                [&](int i) { return 0.25f * (scale(i / 16) - 32) * (q(i) - 4); });
}

TEST(iq4_xs) {
  BlockIQ4_XS block = {};
  std::memcpy(block.d, kHalfQuarter, 2);
  const auto scale = [](int group) { return group * 9 % 64; };
  const auto q = [](int i) { return i * 7 / 3 % 16; };
  for (int group = 0; group < 8; ++group) {
    put_bits(block.scales_l, group * 4, 4, scale(group) & 15);
    put_bits(block.scales_h, group * 2, 2, scale(group) >> 4);
  }
  for (int i = 0; i < 256; ++i) put_bits(block.qs, (i / 32 * 16 + i % 16) * 8 + i % 32 / 16 * 4, 4, q(i));
  check_decoded(GgmlType::IQ4_XS, decode(GgmlType::IQ4_XS, block),
                [&](int i) { return 0.25f * (scale(i / 32) - 32) * iq4nl_values[q(i)]; });
}

// Byte i of an entry of a codebook.
int byte_of(uint64_t word, int i) { return static_cast<int8_t>(word >> (8 * i) & 0xff); }

TEST(iq1) {
  BlockIQ1_S s = {};
  BlockIQ1_M m = {};
  std::memcpy(s.d, kHalfQuarter, 2);
  for (int i = 0; i < 4; ++i) put_bits(m.scales, 16 * i + 12, 4, 0x3400 >> (4 * i) & 15);  // a quarter too
  const auto index = [](int octet) { return octet * 613 % 2048; };
  const auto scale = [](int group) { return group * 3 % 8; };
  const auto minus = [](int part) { return part * 5 / 3 % 2; };
  for (int octet = 0; octet < 32; ++octet) {
    s.qs[octet] = m.qs[octet] = static_cast<uint8_t>(index(octet) & 255);
    put_bits(s.qh, octet / 4 * 16 + octet % 4 * 3, 3, index(octet) >> 8);
    put_bits(m.qh, octet * 4, 3, index(octet) >> 8);
    put_bits(m.qh, octet * 4 + 3, 1, minus(octet));
  }
  for (int group = 0; group < 8; ++group) {
    put_bits(s.qh, group * 16 + 12, 3, scale(group));
    put_bits(s.qh, group * 16 + 15, 1, minus(group));
  }
  for (int group = 0; group < 16; ++group) put_bits(m.scales, group / 4 * 16 + group % 4 * 3, 3, scale(group));
  const auto want = [&](int i, int group_size, int minus_size) {
    const float delta = minus(i / minus_size) ? -0.125f : 0.125f;
    return 0.25f * (2 * scale(i / group_size) + 1) * (byte_of(iq1s_grid[index(i / 8)], i % 8) + delta);
  };
  check_decoded(GgmlType::IQ1_S, decode(GgmlType::IQ1_S, s), [&](int i) { return want(i, 32, 32); });
  check_decoded(GgmlType::IQ1_M, decode(GgmlType::IQ1_M, m), [&](int i) { return want(i, 16, 8); });
}

TEST(iq2) {
  BlockIQ2_XXS xxs = {};
  BlockIQ2_XS xs = {};
  BlockIQ2_S s = {};
  for (uint8_t* d : {xxs.d, xs.d, s.d}) std::memcpy(d, kHalfQuarter, 2);
  const auto index = [](int octet, int size) { return octet * 613 % size; };
  const auto signs = [](int octet) { return octet * 37 % 128; };
  const auto scale = [](int group) { return group * 7 % 16; };
  for (int octet = 0; octet < 32; ++octet) {
    put_bits(xxs.qs, octet / 4 * 64 + octet % 4 * 8, 8, index(octet, 256));
    put_bits(xxs.qs, octet / 4 * 64 + 32 + octet % 4 * 7, 7, signs(octet));
    put_bits(xs.qs, octet * 16, 9, index(octet, 512));
    put_bits(xs.qs, octet * 16 + 9, 7, signs(octet));
    put_bits(s.qs, octet * 8, 8, index(octet, 1024) & 255);
    put_bits(s.qh, octet * 2, 2, index(octet, 1024) >> 8);
    put_bits(s.signs, octet * 8, 8, 2 * signs(octet) + 1);
  }
  for (int group = 0; group < 8; ++group) put_bits(xxs.qs, group * 64 + 60, 4, scale(group));
  for (uint8_t* scales : {xs.scales, s.scales})
    for (int group = 0; group < 16; ++group) put_bits(scales, group * 4, 4, scale(group));
  const auto want = [&](int i, int group_size, uint64_t word, int all_signs) {
    const float size = 0.25f * 0.25f * (scale(i / group_size) + 0.5f) * byte_of(word, i % 8);
    return all_signs >> i % 8 & 1 ? -size : size;
  };
  check_decoded(GgmlType::IQ2_XXS, decode(GgmlType::IQ2_XXS, xxs),
                [&](int i) { return want(i, 32, iq2xxs_grid[index(i / 8, 256)], iq_signs(signs(i / 8))); });
  check_decoded(GgmlType::IQ2_XS, decode(GgmlType::IQ2_XS, xs),
                [&](int i) { return want(i, 16, iq2xs_grid[index(i / 8, 512)], iq_signs(signs(i / 8))); });
  check_decoded(GgmlType::IQ2_S, decode(GgmlType::IQ2_S, s),
                [&](int i) { return want(i, 16, iq2s_grid[index(i / 8, 1024)], 2 * signs(i / 8) + 1); });
}

TEST(iq3) {
  BlockIQ3_XXS xxs = {};
  BlockIQ3_S s = {};
  for (uint8_t* d : {xxs.d, s.d}) std::memcpy(d, kHalfQuarter, 2);
  const auto index = [](int quad, int size) { return quad * 613 % size; };
  const auto signs = [](int octet) { return octet * 37 % 128; };
  const auto scale = [](int group) { return group * 7 % 16; };
  for (int quad = 0; quad < 64; ++quad) {
    xxs.qs[quad] = static_cast<uint8_t>(index(quad, 256));
    s.qs[quad] = static_cast<uint8_t>(index(quad, 512) & 255);
    put_bits(s.qh, quad, 1, index(quad, 512) >> 8);
  }
  for (int octet = 0; octet < 32; ++octet) {
    put_bits(xxs.signs, octet / 4 * 32 + octet % 4 * 7, 7, signs(octet));
    put_bits(s.signs, octet * 8, 8, 2 * signs(octet) + 1);
  }
  for (int group = 0; group < 8; ++group) {
    put_bits(xxs.signs, group * 32 + 28, 4, scale(group));
    put_bits(s.scales, group * 4, 4, scale(group));
  }
  check_decoded(GgmlType::IQ3_XXS, decode(GgmlType::IQ3_XXS, xxs), [&](int i) {
    const float size = 0.25f * 0.5f * (scale(i / 32) + 0.5f) * byte_of(iq3xxs_grid[index(i / 4, 256)], i % 4);
    return iq_signs(signs(i / 8)) >> i % 8 & 1 ? -size : size;
  });
  check_decoded(GgmlType::IQ3_S, decode(GgmlType::IQ3_S, s), [&](int i) {
    const float size = 0.25f * (2 * scale(i / 32) + 1) * byte_of(iq3s_grid[index(i / 4, 512)], i % 4);
    return (2 * signs(i / 8) + 1) >> i % 8 & 1 ? -size : size;
  });
}

TEST(sign_patterns) {
  for (int index = 0; index < 128; ++index) {
    int num_negative = 0;
    for (int i = 0; i < 8; ++i) {
      const int mask = byte_of(iq_sign_masks[index], i);
      num_negative -= mask;
      CHECK(mask == -(iq_signs(index) >> i & 1), index << " " << i << " " << mask);
      CHECK(i == 7 || mask == -(index >> i & 1), index << " " << i << " " << mask);
    }
    CHECK(num_negative % 2 == 0, index << " " << num_negative);
  }
}

TEST(tables_are_aligned) {
  for (const void* table :
       std::initializer_list<const void*>{iq1s_grid, iq2xxs_grid, iq2xs_grid, iq2s_grid, iq3xxs_grid, iq3s_grid,
                                          iq_sign_masks, iq4nl_values, mxfp4_values})
    CHECK(reinterpret_cast<uintptr_t>(table) % 64 == 0, table);
}

TEST(float_types) {
  const float values[] = {0.0f, -0.0f, 1.0f, -2.5f, 65504.0f, 0x1p-24f, INFINITY, -INFINITY};
  for (float value : values) {
    float out = -1;
    dequantize(GgmlType::F32, reinterpret_cast<const uint8_t*>(&value), 1, &out);
    CHECK(float_to_bits(out) == float_to_bits(value), value);
    const uint16_t half = f32_to_f16(value);
    dequantize(GgmlType::F16, reinterpret_cast<const uint8_t*>(&half), 1, &out);
    CHECK(float_to_bits(out) == float_to_bits(value), value);
  }
  const uint16_t bf16[3] = {0x3f80, 0xc020, 0x7fc1};
  float out[3];
  dequantize(GgmlType::BF16, reinterpret_cast<const uint8_t*>(bf16), 3, out);
  CHECK(out[0] == 1.0f && out[1] == -2.5f && std::isnan(out[2]), out[0] << " " << out[1] << " " << out[2]);
  dequantize(GgmlType::F32, nullptr, 0, nullptr);  // nothing to do
}

TEST(conversions_round_to_nearest_even) {
  const struct {
    float value;
    uint16_t f16, bf16;
  } cases[] = {
      {1.0f + 0x1p-11f, 0x3c00, 0x3f80},    // half way: to the even below
      {1.0f + 0x1.8p-10f, 0x3c02, 0x3f80},  // half way: to the even above
      {1.0f + 0x1p-8f, 0x3c04, 0x3f80},    {1.0f + 0x1.8p-7f, 0x3c0c, 0x3f82}, {65519.0f, 0x7bff, 0x4780},
      {65520.0f, 0x7c00, 0x4780},          {-70000.0f, 0xfc00, 0xc789},        {0x1p-25f, 0x0000, 0x3300},
      {0x1.000002p-25f, 0x0001, 0x3300},   {0x1.8p-24f, 0x0002, 0x33c0},       {0x1.ff8p-15f, 0x03ff, 0x3880},
      {0x1.ffcp-15f, 0x0400, 0x3880},      {3.4e38f, 0x7c00, 0x7f80},          {INFINITY, 0x7c00, 0x7f80},
  };
  for (const auto& c : cases) {
    CHECK(f32_to_f16(c.value) == c.f16, c.value << " " << f32_to_f16(c.value) << " want " << c.f16);
    CHECK(f32_to_bf16(c.value) == c.bf16, c.value << " " << f32_to_bf16(c.value) << " want " << c.bf16);
  }
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7fc00000u}) {
    CHECK(std::isnan(f16_to_f32(f32_to_f16(bits_to_float(bits)))), bits);
    CHECK(std::isnan(bf16_to_f32(f32_to_bf16(bits_to_float(bits)))), bits);
  }
}

}  // namespace
}  // namespace kt
