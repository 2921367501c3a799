#include "gguf/block_layouts.h"
#include "kernels/activation_blocks.h"
#include "kernels/avx2/kernels.h"
#include "kernels/cpu_features.h"

namespace kt::avx2 {
namespace {

constexpr TypeKernels on_f32(GgmlType type, void (*gemm)(const GemmParams&)) {
  return {type, ActivationFormat::F32, 1, sizeof(float), copy_activations, gemm};
}

constexpr TypeKernels on_int8_256(GgmlType type, void (*gemm)(const GemmParams&)) {
  return {type, ActivationFormat::INT8_256, kBlockK, sizeof(ActivationBlock256), quantize_int8_256, gemm};
}

constexpr TypeKernels kTypes[] = {
    on_f32(GgmlType::F32, gemm_f32),
    on_f32(GgmlType::F16, gemm_f16),
    on_f32(GgmlType::BF16, gemm_bf16),
    {GgmlType::Q8_0, ActivationFormat::INT8_32, kBlockQ8_0, sizeof(ActivationBlock32), quantize_int8_32, gemm_q8_0},
    on_int8_256(GgmlType::Q4_K, gemm_q4_k),
    on_int8_256(GgmlType::Q5_K, gemm_q5_k),
    on_int8_256(GgmlType::Q6_K, gemm_q6_k),
};

}  // namespace

extern const KernelTable kTable;
const KernelTable kTable = {
    .isa = "avx2",
    .required_features = kAvx2 | kFma | kF16c,
    .types = kTypes,
    .num_types = sizeof(kTypes) / sizeof(kTypes[0]),
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .load_floats = load_floats,
    .store_floats = store_floats,
};

}  // namespace kt::avx2
