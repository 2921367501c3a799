#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/gemm_int8.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

#define KT_TILE_GEMM(type)                                                                                      \
  void tile_gemm_bf16_##type(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<Unpack##type>>(params); } \
  void tile_gemm_int8_##type(const TileGemmParams& params) { tile_gemm_int8<Int8Maker<Unpack##type>>(params); }

KT_TILE_GEMM(Q4_0)
KT_TILE_GEMM(Q4_1)
KT_TILE_GEMM(Q5_0)
KT_TILE_GEMM(Q5_1)
KT_TILE_GEMM(Q8_0)
KT_TILE_GEMM(IQ4_NL)
KT_TILE_GEMM(IQ4_XS)
KT_TILE_GEMM(MXFP4)

}  // namespace kt::KT_ISA_NAMESPACE
