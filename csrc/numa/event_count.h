// A counter that threads wait on: spin briefly, then sleep in the kernel. No lock, no allocation.
#pragma once

#include <atomic>
#include <cstdint>

namespace kt {

// Longer than waking a sleeper costs (some 5 us) and than one work item of a decode step takes (some 25 us for
// DeepSeek-R1 at 10 GB/s), for which the others wait at the end of a stage, so that they rarely sleep; short beside a
// scheduler tick (1 to 4 ms), because torch's threads share our cores and a peer that was descheduled gets its core
// back only when we stop spinning.
inline constexpr int64_t kSpinNanoseconds = 50'000;

int64_t now_ns();  // a clock that only goes forward

class alignas(64) EventCount {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  // What the caller wrote before is visible to every thread that sees the new value. Any thread.
  void advance();

  // Returns the value once it differs from `seen`. Any thread. spin_ns 0 sleeps at once.
  uint32_t wait_change(uint32_t seen, int64_t spin_ns);

  // Sleeps, without spinning, until the value differs from `seen` or about timeout_ns have passed. Returns the value.
  uint32_t sleep_until_change(uint32_t seen, int64_t timeout_ns);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace kt
