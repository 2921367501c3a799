#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_k.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_Q2_K(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ2_K>>(params); }
void tile_gemm_Q3_K(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ3_K>>(params); }
void tile_gemm_Q4_K(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ4_K>>(params); }
void tile_gemm_Q5_K(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ5_K>>(params); }
void tile_gemm_Q6_K(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ6_K>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
