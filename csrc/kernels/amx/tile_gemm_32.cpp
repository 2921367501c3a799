#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/gemm_int8.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

KT_DEFINE_TILE_GEMMS(Q4_0)
KT_DEFINE_TILE_GEMMS(Q4_1)
KT_DEFINE_TILE_GEMMS(Q5_0)
KT_DEFINE_TILE_GEMMS(Q5_1)
KT_DEFINE_TILE_GEMMS(Q8_0)
KT_DEFINE_TILE_GEMMS(IQ4_NL)
KT_DEFINE_TILE_GEMMS(IQ4_XS)
KT_DEFINE_TILE_GEMMS(MXFP4)

}  // namespace kt::KT_ISA_NAMESPACE
