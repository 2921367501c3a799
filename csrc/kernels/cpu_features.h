// What this processor and its operating system allow. Compiled for the baseline, so it runs anywhere.
#pragma once

#include <cstdint>
#include <string>

namespace kt {

enum CpuFeature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvxVnni = 1u << 3,
  kAvx512 = 1u << 4,  // F, BW, DQ and VL: every CPU since Skylake-X that has any
  kAvx512Vnni = 1u << 5,
  kAvx512Bf16 = 1u << 6,
  kAvx512Fp16 = 1u << 7,
  kAmxTile = 1u << 8,  // tiles, and the kernel's permission to use them
  kAmxBf16 = 1u << 9,
  kAmxInt8 = 1u << 10,
};

// Bits of CpuFeature that CPUID, XCR0 (the register state the operating system saves) and, for AMX, the kernel grant.
// Asks the kernel for permission to use tiles, which threads created later inherit.
uint32_t detect_cpu_features();

// Linux flag names, e.g. "avx2 fma".
std::string cpu_feature_names(uint32_t features);

}  // namespace kt
