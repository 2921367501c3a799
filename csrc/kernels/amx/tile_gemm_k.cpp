#include "kernels/amx/gemm_bf16.h"
#include "kernels/amx/gemm_int8.h"
#include "kernels/amx/kernels.h"
#include "kernels/panel/unpack_k.h"

namespace kt::KT_ISA_NAMESPACE {

KT_DEFINE_TILE_GEMMS(Q2_K)
KT_DEFINE_TILE_GEMMS(Q3_K)
KT_DEFINE_TILE_GEMMS(Q4_K)
KT_DEFINE_TILE_GEMMS(Q5_K)
KT_DEFINE_TILE_GEMMS(Q6_K)

}  // namespace kt::KT_ISA_NAMESPACE
