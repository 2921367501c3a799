#include "kernels/panel/gemm_int.h"
#include "kernels/panel/kernels.h"
#include "kernels/panel/unpack_k.h"

namespace kt::KT_ISA_NAMESPACE {

void gemm_Q2_K(const GemmParams& params) { gemm_int<UnpackQ2_K>(params); }
void gemm_Q3_K(const GemmParams& params) { gemm_int<UnpackQ3_K>(params); }
void gemm_Q4_K(const GemmParams& params) { gemm_int<UnpackQ4_K>(params); }
void gemm_Q5_K(const GemmParams& params) { gemm_int<UnpackQ5_K>(params); }
void gemm_Q6_K(const GemmParams& params) { gemm_int<UnpackQ6_K>(params); }

}  // namespace kt::KT_ISA_NAMESPACE
