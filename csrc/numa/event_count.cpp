#include "numa/event_count.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <ctime>

namespace kt {
namespace {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel reads the counter as a plain 32-bit word");

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected, const timespec* timeout = nullptr) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Reading the clock costs as much as about a pause; every so many keeps the spin cheap and its bound still exact
// enough.
constexpr int kPausesPerClockRead = 16;

}  // namespace

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void EventCount::advance() {
  // Both sides are sequentially consistent: either we see the sleeper, or the sleeper sees the new value.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&value_);
}

uint32_t EventCount::wait_change(uint32_t seen, int64_t spin_ns) {
  uint32_t value = this->value();
  if (value != seen) return value;
  if (spin_ns > 0) {
    const int64_t deadline = now_ns() + spin_ns;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        __builtin_ia32_pause();
        value = this->value();
        if (value != seen) return value;
      }
    } while (now_ns() < deadline);
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while ((value = value_.load(std::memory_order_seq_cst)) == seen) futex_wait(&value_, seen);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return value;
}

uint32_t EventCount::sleep_until_change(uint32_t seen, int64_t timeout_ns) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  if (value_.load(std::memory_order_seq_cst) == seen) futex_wait(&value_, seen, &timeout);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return value();
}

}  // namespace kt
