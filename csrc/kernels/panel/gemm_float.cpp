#include "kernels/panel/gemm_float.h"

#include "kernels/panel/kernels.h"

namespace kt::KT_ISA_NAMESPACE {

void gemm_F32(const GemmParams& params) { gemm_float<WeightsF32>(params); }
void gemm_F16(const GemmParams& params) { gemm_float<WeightsF16>(params); }
void gemm_BF16(const GemmParams& params) { gemm_float<WeightsBF16>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
