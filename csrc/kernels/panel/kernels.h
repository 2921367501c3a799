// The functions of the tables made from this folder: it is compiled once for each variant in CMakeLists.txt, into
// namespace kt::<variant>.
#pragma once

#include "kernels/kernel_table.h"

// Every quantised type with a kernel, as named in GgmlType: those with a code for each weight, and those whose codes
// stand for several in a grid.
#define KT_CODE_TYPES(X) \
  X(Q4_0)                \
  X(Q4_1)                \
  X(Q5_0)                \
  X(Q5_1)                \
  X(Q8_0)                \
  X(Q2_K)                \
  X(Q3_K)                \
  X(Q4_K)                \
  X(Q5_K)                \
  X(Q6_K)                \
  X(IQ4_NL)              \
  X(IQ4_XS)              \
  X(MXFP4)
#define KT_GRID_TYPES(X) \
  X(IQ1_S)               \
  X(IQ1_M)               \
  X(IQ2_XXS)             \
  X(IQ2_XS)              \
  X(IQ2_S)               \
  X(IQ3_XXS)             \
  X(IQ3_S)
#define KT_INT_TYPES(X) KT_CODE_TYPES(X) KT_GRID_TYPES(X)
#define KT_FLOAT_TYPES(X) \
  X(F32)                  \
  X(F16)                  \
  X(BF16)

#define KT_DECLARE_GEMM(type) void gemm_##type(const GemmParams& params);
// Where gemm_int.h and the type's Unpack are included.
#define KT_DEFINE_GEMM(type) \
  void gemm_##type(const GemmParams& params) { gemm_int<Unpack##type>(params); }
#define KT_DECLARE_PANEL_KERNELS(variant)                                \
  namespace kt::variant {                                                \
  KT_INT_TYPES(KT_DECLARE_GEMM)                                          \
  KT_FLOAT_TYPES(KT_DECLARE_GEMM)                                        \
  void copy_activations(const float* x, uint8_t* blocks, int k);         \
  void quantize_int8_32(const float* x, uint8_t* blocks, int k);         \
  void silu_mul(const float* gate, const float* up, float* out, int n);  \
  void add_scaled(float a, const float* x, float* y, int n);             \
  void load_floats(const void* src, FloatType type, float* dst, int n);  \
  void store_floats(const float* src, FloatType type, void* dst, int n); \
  }

KT_DECLARE_PANEL_KERNELS(KT_ISA_NAMESPACE)
