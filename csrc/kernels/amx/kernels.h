// The functions of the amx table.
#pragma once

#include "kernels/panel/kernels.h"

#define KT_DECLARE_TILE_GEMM(type) void tile_gemm_bf16_##type(const TileGemmParams& params);
#define KT_DECLARE_INT8_TILE_GEMM(type) void tile_gemm_int8_##type(const TileGemmParams& params);

// Both of a type; where gemm_bf16.h, gemm_int8.h and its Unpack are included.
#define KT_DEFINE_TILE_GEMMS(type)                                                                              \
  void tile_gemm_bf16_##type(const TileGemmParams& params) { tile_gemm_bf16<Bf16Maker<Unpack##type>>(params); } \
  void tile_gemm_int8_##type(const TileGemmParams& params) { tile_gemm_int8<Int8Maker<Unpack##type>>(params); }

KT_DECLARE_PANEL_KERNELS(avx512_vnni)

namespace kt::KT_ISA_NAMESPACE {

KT_INT_TYPES(KT_DECLARE_TILE_GEMM)
KT_CODE_TYPES(KT_DECLARE_INT8_TILE_GEMM)
KT_FLOAT_TYPES(KT_DECLARE_TILE_GEMM)
size_t tile_group_bytes(TileFormat format, int k);
void store_tile_row(TileFormat format, const float* x, int k_begin, int n, int k, int token, uint8_t* group);

}  // namespace kt::KT_ISA_NAMESPACE
