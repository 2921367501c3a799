// The scalar kernels: obvious, exact to float32 rounding, and running anywhere. What every other table is tested
// against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "kernels/kernel_table.h"

namespace kt::reference {

extern const KernelTable kTable;

namespace {

void copy_activations(const float* x, uint8_t* blocks, int k) {
  if (k > 0) std::memcpy(blocks, x, static_cast<size_t>(k) * sizeof(float));
}

// Partial sums of kGroup products, summed by chunk, then by row: the rounding error grows with the length of the
// longest chain of additions, 32 + 8 + k / 256, instead of with k.
constexpr int kGroup = 32;
constexpr int kChunk = 256;  // a whole number of blocks of every type

// a, b: [n]
float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int group = 0; group < n; group += kGroup) {
    float partial = 0;
    for (int i = group; i < std::min(n, group + kGroup); ++i) partial += a[i] * b[i];
    sum += partial;
  }
  return sum;
}

template <GgmlType type>
void gemm(const GemmParams& params) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  for (int row = 0; row < params.num_rows; ++row) {
    const uint8_t* weights = params.weights + static_cast<size_t>(row) * params.panel_bytes;
    for (int token = 0; token < params.num_tokens; ++token)
      params.output[static_cast<size_t>(token) * params.output_stride + row] = 0;
    for (int start = 0; start < params.k; start += kChunk) {
      const int n = std::min(kChunk, params.k - start);
      float decoded[kChunk], x[kChunk];
      dequantize(type, weights + start / info.block_size * info.block_bytes, n, decoded);
      for (int token = 0; token < params.num_tokens; ++token) {
        const size_t activation_row = params.token_rows ? params.token_rows[token] : token;
        const uint8_t* activations = params.activations + activation_row * params.activation_row_bytes;
        std::memcpy(x, activations + static_cast<size_t>(start) * sizeof(float), n * sizeof(float));
        params.output[static_cast<size_t>(token) * params.output_stride + row] += dot(decoded, x, n);
      }
    }
  }
}

void silu_mul(const float* gate, const float* up, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void add_scaled(float a, const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] += a * x[i];
}

void load_floats(const void* src, FloatType type, float* dst, int n) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  for (int i = 0; i < n; ++i) {
    switch (type) {
      case FloatType::F32:
        std::memcpy(dst + i, bytes + 4 * static_cast<size_t>(i), 4);
        break;
      case FloatType::F16:
        dst[i] = f16_to_f32(load_u16(bytes + 2 * static_cast<size_t>(i)));
        break;
      case FloatType::BF16:
        dst[i] = bf16_to_f32(load_u16(bytes + 2 * static_cast<size_t>(i)));
        break;
    }
  }
}

void store_floats(const float* src, FloatType type, void* dst, int n) {
  auto* bytes = static_cast<uint8_t*>(dst);
  for (int i = 0; i < n; ++i) {
    if (type == FloatType::F32) {
      std::memcpy(bytes + 4 * static_cast<size_t>(i), src + i, 4);
    } else {
      const uint16_t bits = type == FloatType::F16 ? f32_to_f16(src[i]) : f32_to_bf16(src[i]);
      std::memcpy(bytes + 2 * static_cast<size_t>(i), &bits, 2);
    }
  }
}

template <GgmlType type>
constexpr TypeKernels kernels_for = {type, ActivationFormat::F32, 1, sizeof(float), copy_activations, gemm<type>};

constexpr TypeKernels kTypes[] = {
    kernels_for<GgmlType::F32>,     kernels_for<GgmlType::F16>,    kernels_for<GgmlType::Q4_0>,
    kernels_for<GgmlType::Q4_1>,    kernels_for<GgmlType::Q5_0>,   kernels_for<GgmlType::Q5_1>,
    kernels_for<GgmlType::Q8_0>,    kernels_for<GgmlType::Q2_K>,   kernels_for<GgmlType::Q3_K>,
    kernels_for<GgmlType::Q4_K>,    kernels_for<GgmlType::Q5_K>,   kernels_for<GgmlType::Q6_K>,
    kernels_for<GgmlType::IQ2_XXS>, kernels_for<GgmlType::IQ2_XS>, kernels_for<GgmlType::IQ3_XXS>,
    kernels_for<GgmlType::IQ1_S>,   kernels_for<GgmlType::IQ4_NL>, kernels_for<GgmlType::IQ3_S>,
    kernels_for<GgmlType::IQ2_S>,   kernels_for<GgmlType::IQ4_XS>, kernels_for<GgmlType::IQ1_M>,
    kernels_for<GgmlType::BF16>,    kernels_for<GgmlType::MXFP4>,
};

}  // namespace

const KernelTable kTable = {
    .isa = "reference",
    .required_features = 0,
    .types = kTypes,
    .num_types = sizeof(kTypes) / sizeof(kTypes[0]),
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .load_floats = load_floats,
    .store_floats = store_floats,
};

}  // namespace kt::reference
