#include "kernels/amx/kernels.h"
#include "kernels/amx/sources.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

void tile_gemm_Q8_0(const TileGemmParams& params) { tile_gemm<IntSource<UnpackQ8_0>>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
