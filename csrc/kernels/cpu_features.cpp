#include "kernels/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace kt {
namespace {

// Which register state the operating system saves. Needs OSXSAVE.
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kXmmAndYmmState = 0x6;
constexpr uint64_t kZmmState = 0xe0;      // mask registers, upper halves of ZMM0-15, ZMM16-31
constexpr uint64_t kTileState = 0x60000;  // tile configuration, tile data

// Linux hands out the 8 KiB of tile data on request only (since 5.16; arch/x86/include/uapi/asm/prctl.h).
bool ask_for_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

uint32_t detect_cpu_features() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  const uint32_t leaf1_ecx = ecx;
  if (!(leaf1_ecx & bit_OSXSAVE) || !(leaf1_ecx & bit_AVX)) return 0;
  const uint64_t saved = read_xcr0();
  if ((saved & kXmmAndYmmState) != kXmmAndYmmState) return 0;

  uint32_t features = 0;
  if (leaf1_ecx & bit_FMA) features |= kFma;
  if (leaf1_ecx & bit_F16C) features |= kF16c;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const uint32_t last_subleaf = eax, leaf7_ebx = ebx, leaf7_ecx = ecx, leaf7_edx = edx;
  uint32_t subleaf1_eax = 0;
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) subleaf1_eax = eax;
  if (leaf7_ebx & bit_AVX2) features |= kAvx2;
  if (subleaf1_eax & (1u << 4)) features |= kAvxVnni;

  constexpr uint32_t kAvx512Bits = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((saved & kZmmState) != kZmmState || (leaf7_ebx & kAvx512Bits) != kAvx512Bits) return features;
  features |= kAvx512;
  if (leaf7_ecx & bit_AVX512VNNI) features |= kAvx512Vnni;
  if (subleaf1_eax & (1u << 5)) features |= kAvx512Bf16;
  if (leaf7_edx & (1u << 23)) features |= kAvx512Fp16;

  constexpr uint32_t kAmxBf16Bit = 1u << 22, kAmxTileBit = 1u << 24, kAmxInt8Bit = 1u << 25;
  if ((saved & kTileState) != kTileState || !(leaf7_edx & kAmxTileBit) || !ask_for_tiles()) return features;
  features |= kAmxTile;
  if (leaf7_edx & kAmxBf16Bit) features |= kAmxBf16;
  if (leaf7_edx & kAmxInt8Bit) features |= kAmxInt8;
  return features;
}

std::string cpu_feature_names(uint32_t features) {
  static constexpr struct {
    uint32_t bit;
    const char* name;
  } kNames[] = {{kAvx2, "avx2"},
                {kFma, "fma"},
                {kF16c, "f16c"},
                {kAvxVnni, "avx_vnni"},
                {kAvx512, "avx512"},
                {kAvx512Vnni, "avx512_vnni"},
                {kAvx512Bf16, "avx512_bf16"},
                {kAvx512Fp16, "avx512_fp16"},
                {kAmxTile, "amx_tile"},
                {kAmxBf16, "amx_bf16"},
                {kAmxInt8, "amx_int8"}};
  std::string names;
  for (const auto& entry : kNames) {
    if (!(features & entry.bit)) continue;
    if (!names.empty()) names += ' ';
    names += entry.name;
  }
  return names;
}

}  // namespace kt
