#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/kernels.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_bf16_F32(const TileGemmParams& params) { tile_gemm_bf16<FloatMaker<WeightsF32>>(params); }
void tile_gemm_bf16_F16(const TileGemmParams& params) { tile_gemm_bf16<FloatMaker<WeightsF16>>(params); }
void tile_gemm_bf16_BF16(const TileGemmParams& params) { tile_gemm_bf16<FloatMaker<WeightsBF16>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
