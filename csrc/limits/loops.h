// The loops that limits.cpp times.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

struct PeakLoop {
  const char* kind;
  uint32_t required_features;  // CpuFeature bits
  double ops_per_round;
  void (*run)(int rounds);
};

extern const PeakLoop kPeakLoops[];
extern const int kNumPeakLoops;

// Reads bytes [begin, begin + bytes) once with the widest vector loads of these features. begin: 64-byte aligned;
// bytes: a multiple of 512. Returns something that depends on all of them.
uint64_t read_bytes(const uint8_t* begin, size_t bytes, uint32_t features);

}  // namespace kt
