#include "kernels/amx/kernels.h"
#include "kernels/amx/sources.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_F32(const TileGemmParams& params) { tile_gemm<FloatSource<WeightsF32>>(params); }
void tile_gemm_F16(const TileGemmParams& params) { tile_gemm<FloatSource<WeightsF16>>(params); }
void tile_gemm_BF16(const TileGemmParams& params) { tile_gemm<FloatSource<WeightsBF16>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
