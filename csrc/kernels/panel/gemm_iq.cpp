#include "kernels/panel/gemm_int.h"
#include "kernels/panel/kernels.h"
#include "kernels/panel/unpack_iq.h"

namespace kt::KT_ISA_NAMESPACE {

void gemm_IQ1_S(const GemmParams& params) { gemm_int<UnpackIQ1_S>(params); }
void gemm_IQ1_M(const GemmParams& params) { gemm_int<UnpackIQ1_M>(params); }
void gemm_IQ2_XXS(const GemmParams& params) { gemm_int<UnpackIQ2_XXS>(params); }
void gemm_IQ2_XS(const GemmParams& params) { gemm_int<UnpackIQ2_XS>(params); }
void gemm_IQ2_S(const GemmParams& params) { gemm_int<UnpackIQ2_S>(params); }
void gemm_IQ3_XXS(const GemmParams& params) { gemm_int<UnpackIQ3_XXS>(params); }
void gemm_IQ3_S(const GemmParams& params) { gemm_int<UnpackIQ3_S>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
