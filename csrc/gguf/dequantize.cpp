#include "gguf/dequantize.h"

#include <cstring>

#include "gguf/decoders.h"
#include "gguf/float_bits.h"

namespace kt {
namespace {

void decode_f32(const uint8_t* blocks, int64_t num_weights, float* out) {
  if (num_weights > 0) std::memcpy(out, blocks, static_cast<size_t>(num_weights) * sizeof(float));
}

void decode_f16(const uint8_t* blocks, int64_t num_weights, float* out) {
  for (int64_t i = 0; i < num_weights; ++i) out[i] = f16_to_f32(load_u16(blocks + 2 * i));
}

void decode_bf16(const uint8_t* blocks, int64_t num_weights, float* out) {
  for (int64_t i = 0; i < num_weights; ++i) out[i] = bf16_to_f32(load_u16(blocks + 2 * i));
}

}  // namespace

void dequantize(GgmlType type, const uint8_t* blocks, int64_t num_weights, float* output) {
  ggml_row_bytes(type, num_weights);  // throws when num_weights is not whole blocks
  switch (type) {
    case GgmlType::F32:
      return decode_f32(blocks, num_weights, output);
    case GgmlType::F16:
      return decode_f16(blocks, num_weights, output);
    case GgmlType::Q4_0:
      return decode_q4_0(blocks, num_weights, output);
    case GgmlType::Q4_1:
      return decode_q4_1(blocks, num_weights, output);
    case GgmlType::Q5_0:
      return decode_q5_0(blocks, num_weights, output);
    case GgmlType::Q5_1:
      return decode_q5_1(blocks, num_weights, output);
    case GgmlType::Q8_0:
      return decode_q8_0(blocks, num_weights, output);
    case GgmlType::Q2_K:
      return decode_q2_k(blocks, num_weights, output);
    case GgmlType::Q3_K:
      return decode_q3_k(blocks, num_weights, output);
    case GgmlType::Q4_K:
      return decode_q4_k(blocks, num_weights, output);
    case GgmlType::Q5_K:
      return decode_q5_k(blocks, num_weights, output);
    case GgmlType::Q6_K:
      return decode_q6_k(blocks, num_weights, output);
    case GgmlType::IQ2_XXS:
      return decode_iq2_xxs(blocks, num_weights, output);
    case GgmlType::IQ2_XS:
      return decode_iq2_xs(blocks, num_weights, output);
    case GgmlType::IQ3_XXS:
      return decode_iq3_xxs(blocks, num_weights, output);
    case GgmlType::IQ1_S:
      return decode_iq1_s(blocks, num_weights, output);
    case GgmlType::IQ4_NL:
      return decode_iq4_nl(blocks, num_weights, output);
    case GgmlType::IQ3_S:
      return decode_iq3_s(blocks, num_weights, output);
    case GgmlType::IQ2_S:
      return decode_iq2_s(blocks, num_weights, output);
    case GgmlType::IQ4_XS:
      return decode_iq4_xs(blocks, num_weights, output);
    case GgmlType::IQ1_M:
      return decode_iq1_m(blocks, num_weights, output);
    case GgmlType::BF16:
      return decode_bf16(blocks, num_weights, output);
    case GgmlType::MXFP4:
      return decode_mxfp4(blocks, num_weights, output);
  }
}

}  // namespace kt
