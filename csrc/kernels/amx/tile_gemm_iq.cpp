// Of types whose weights come from grids bfloat16 tiles only: the largest weight that a row's scale allows is rarely
// there, so steps for it would be coarse (a layer's error 1.45 to 1.5 %).
#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_iq.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_bf16_IQ1_S(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ1_S>>(params); }
void tile_gemm_bf16_IQ1_M(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ1_M>>(params); }
void tile_gemm_bf16_IQ2_XXS(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ2_XXS>>(params); }
void tile_gemm_bf16_IQ2_XS(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ2_XS>>(params); }
void tile_gemm_bf16_IQ2_S(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ2_S>>(params); }
void tile_gemm_bf16_IQ3_XXS(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ3_XXS>>(params); }
void tile_gemm_bf16_IQ3_S(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<UnpackIQ3_S>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
