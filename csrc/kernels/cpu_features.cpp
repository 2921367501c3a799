#include "kernels/cpu_features.h"

#include <cpuid.h>

namespace kt {
namespace {

// Which register state the operating system saves: bit 1 XMM, bit 2 YMM. Needs OSXSAVE.
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kXmmAndYmmState = 0x6;

}  // namespace

uint32_t detect_cpu_features() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  const uint32_t leaf1_ecx = ecx;
  if (!(leaf1_ecx & bit_OSXSAVE) || !(leaf1_ecx & bit_AVX)) return 0;
  if ((read_xcr0() & kXmmAndYmmState) != kXmmAndYmmState) return 0;

  uint32_t features = 0;
  if (leaf1_ecx & bit_FMA) features |= kFma;
  if (leaf1_ecx & bit_F16C) features |= kF16c;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_AVX2)) features |= kAvx2;
  return features;
}

std::string cpu_feature_names(uint32_t features) {
  static constexpr struct {
    uint32_t bit;
    const char* name;
  } kNames[] = {{kAvx2, "avx2"}, {kFma, "fma"}, {kF16c, "f16c"}};
  std::string names;
  for (const auto& entry : kNames) {
    if (!(features & entry.bit)) continue;
    if (!names.empty()) names += ' ';
    names += entry.name;
  }
  return names;
}

}  // namespace kt
