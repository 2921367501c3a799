#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_iq.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_IQ1_S(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ1_S>>(params); }
void tile_gemm_IQ1_M(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ1_M>>(params); }
void tile_gemm_IQ2_XXS(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ2_XXS>>(params); }
void tile_gemm_IQ2_XS(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ2_XS>>(params); }
void tile_gemm_IQ2_S(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ2_S>>(params); }
void tile_gemm_IQ3_XXS(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ3_XXS>>(params); }
void tile_gemm_IQ3_S(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ3_S>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
