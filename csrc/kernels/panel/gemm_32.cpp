#include "kernels/panel/gemm_int.h"
#include "kernels/panel/kernels.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

void gemm_Q8_0(const GemmParams& params) { gemm_int<UnpackQ8_0>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
