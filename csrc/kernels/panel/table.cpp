#include "kernels/activation_blocks.h"
#include "kernels/cpu_features.h"
#include "kernels/panel.h"
#include "kernels/panel/kernels.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

#define KT_FLOAT_ENTRY(type) \
  {GgmlType::type, ActivationFormat::F32, 1, sizeof(float), copy_activations, gemm_##type, kPanelRows},
#define KT_INT_ENTRY(type) \
  {GgmlType::type, ActivationFormat::INT8_32, 32, sizeof(ActivationBlock32), quantize_int8_32, gemm_##type, kPanelRows},

constexpr TypeKernels kTypes[] = {KT_FLOAT_TYPES(KT_FLOAT_ENTRY) KT_INT_TYPES(KT_INT_ENTRY)};

#if defined(__AVX512VNNI__)
constexpr const char* kIsa = "avx512";
constexpr const char* kVariant = "VNNI";
constexpr uint32_t kFeatures = kAvx512 | kAvx512Vnni;
#elif defined(__AVX512F__)
constexpr const char* kIsa = "avx512";
constexpr const char* kVariant = "";
constexpr uint32_t kFeatures = kAvx512;
#elif defined(__AVXVNNI__)
constexpr const char* kIsa = "avx2";
constexpr const char* kVariant = "AVX-VNNI";
constexpr uint32_t kFeatures = kAvxVnni;
#else
constexpr const char* kIsa = "avx2";
constexpr const char* kVariant = "";
constexpr uint32_t kFeatures = 0;
#endif

}  // namespace

extern const KernelTable kTable;
const KernelTable kTable = {
    .isa = kIsa,
    .required_features = kAvx2 | kFma | kF16c | kFeatures,
    .types = kTypes,
    .num_types = sizeof(kTypes) / sizeof(kTypes[0]),
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .load_floats = load_floats,
    .store_floats = store_floats,
    .variant = kVariant,
};

}  // namespace kt::KT_ISA_NAMESPACE
