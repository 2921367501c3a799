// Decoding against values worked out by hand. Bit-exactness against the `gguf` package is tested from Python.
#include <cmath>
#include <cstring>

#include "check.h"
#include "gguf/block_layouts.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
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
  CHECK(count == 7, count);
  for (int i = 0; i < count; ++i) {
    CHECK(i == 0 || types[i - 1].type < types[i].type, types[i].name << " out of order");
    CHECK(&ggml_type_info(types[i].type) == &types[i], types[i].name);
    CHECK(&ggml_type_info(std::string_view(types[i].name)) == &types[i], types[i].name);
  }
  CHECK(ggml_row_bytes(GgmlType::Q4_K, 7168) == 28 * 144, ggml_row_bytes(GgmlType::Q4_K, 7168));
  CHECK(ggml_row_bytes(GgmlType::BF16, 3) == 6, "bf16");
  CHECK_ERROR(ggml_type_info(static_cast<GgmlType>(2)), "number 2", "Q4_K", "BF16");
  CHECK_ERROR(ggml_type_info("IQ1_S"), "IQ1_S", "Q6_K");
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
