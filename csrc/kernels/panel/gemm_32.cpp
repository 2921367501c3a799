#include "kernels/panel/gemm_int.h"
#include "kernels/panel/kernels.h"
#include "kernels/panel/unpack_32.h"

namespace kt::KT_ISA_NAMESPACE {

void gemm_Q4_0(const GemmParams& params) { gemm_int<UnpackQ4_0>(params); }
void gemm_Q4_1(const GemmParams& params) { gemm_int<UnpackQ4_1>(params); }
void gemm_Q5_0(const GemmParams& params) { gemm_int<UnpackQ5_0>(params); }
void gemm_Q5_1(const GemmParams& params) { gemm_int<UnpackQ5_1>(params); }
void gemm_Q8_0(const GemmParams& params) { gemm_int<UnpackQ8_0>(params); }
void gemm_IQ4_NL(const GemmParams& params) { gemm_int<UnpackIQ4_NL>(params); }
void gemm_IQ4_XS(const GemmParams& params) { gemm_int<UnpackIQ4_XS>(params); }
void gemm_MXFP4(const GemmParams& params) { gemm_int<UnpackMXFP4>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
