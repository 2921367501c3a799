#include "kernels/activation_blocks.h"
#include "kernels/amx/kernels.h"
#include "kernels/cpu_features.h"
#include "kernels/panel.h"

namespace kt::KT_ISA_NAMESPACE {

namespace {

// With fewer tokens the vector kernels are faster; measured, see benchmarks/RESULTS.md.
constexpr int kMinTokensInt = 12, kMinTokensFloat = 4;

#define KT_FLOAT_ENTRY(type)                                                \
  {GgmlType::type, ActivationFormat::F32,         1,                        \
   sizeof(float),  avx512_vnni::copy_activations, avx512_vnni::gemm_##type, \
   kPanelRows,     {tile_gemm_bf16_##type},       kMinTokensFloat},
#define KT_INT_ENTRY(type, gemm, ...) \
  {GgmlType::type,                    \
   ActivationFormat::INT8_32,         \
   32,                                \
   sizeof(ActivationBlock32),         \
   avx512_vnni::quantize_int8_32,     \
   gemm,                              \
   kPanelRows,                        \
   {__VA_ARGS__},                     \
   kMinTokensInt},
#define KT_CODE_ENTRY(type) KT_INT_ENTRY(type, avx512_vnni::gemm_##type, tile_gemm_bf16_##type, tile_gemm_int8_##type)
#define KT_GRID_ENTRY(type) KT_INT_ENTRY(type, gemm_##type, tile_gemm_bf16_##type)

constexpr TypeKernels kTypes[] = {KT_FLOAT_TYPES(KT_FLOAT_ENTRY) KT_CODE_TYPES(KT_CODE_ENTRY)
                                      KT_GRID_TYPES(KT_GRID_ENTRY)};

}  // namespace

extern const KernelTable kTable;
const KernelTable kTable = {
    .isa = "amx",
    .required_features =
        kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni | kAvx512Bf16 | kAvx512Fp16 | kAmxTile | kAmxBf16 | kAmxInt8,
    .types = kTypes,
    .num_types = sizeof(kTypes) / sizeof(kTypes[0]),
    .silu_mul = avx512_vnni::silu_mul,
    .add_scaled = avx512_vnni::add_scaled,
    .load_floats = avx512_vnni::load_floats,
    .store_floats = avx512_vnni::store_floats,
    .tile_group_bytes = tile_group_bytes,
    .store_tile_row = store_tile_row,
};

}  // namespace kt::KT_ISA_NAMESPACE
