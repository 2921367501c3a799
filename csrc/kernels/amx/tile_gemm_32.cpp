#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_Q4_0(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ4_0>>(params); }
void tile_gemm_Q4_1(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ4_1>>(params); }
void tile_gemm_Q5_0(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ5_0>>(params); }
void tile_gemm_Q5_1(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ5_1>>(params); }
void tile_gemm_Q8_0(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackQ8_0>>(params); }
void tile_gemm_IQ4_NL(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ4_NL>>(params); }
void tile_gemm_IQ4_XS(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackIQ4_XS>>(params); }
void tile_gemm_MXFP4(const TileGemmParams& params) { tile_gemm_bf16<Maker<UnpackMXFP4>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
