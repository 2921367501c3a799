// The functions of the avx2 table, by file.
#pragma once

#include "kernels/kernel_table.h"

namespace kt::avx2 {

// quantize.cpp
void copy_activations(const float* x, uint8_t* blocks, int k);
void quantize_int8_32(const float* x, uint8_t* blocks, int k);
void quantize_int8_256(const float* x, uint8_t* blocks, int k);

// gemm_float.cpp
void gemm_f32(const GemmParams& params);
void gemm_f16(const GemmParams& params);
void gemm_bf16(const GemmParams& params);

// gemm_q8_0.cpp
void gemm_q8_0(const GemmParams& params);

// gemm_k.cpp
void gemm_q4_k(const GemmParams& params);
void gemm_q5_k(const GemmParams& params);
void gemm_q6_k(const GemmParams& params);

// elementwise.cpp
void silu_mul(const float* gate, const float* up, float* out, int n);
void add_scaled(float a, const float* x, float* y, int n);
void load_floats(const void* src, FloatType type, float* dst, int n);
void store_floats(const float* src, FloatType type, void* dst, int n);

}  // namespace kt::avx2
