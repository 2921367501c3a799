// What this processor and its operating system allow. Compiled for the baseline, so it runs anywhere.
#pragma once

#include <cstdint>
#include <string>

namespace kt {

enum CpuFeature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
};

// Bits of CpuFeature that both CPUID and XCR0 (the register state the operating system saves) grant.
uint32_t detect_cpu_features();

// Linux flag names, e.g. "avx2 fma".
std::string cpu_feature_names(uint32_t features);

}  // namespace kt
