// Whether a worker keeps losing its CPU to others, and so keeps all workers waiting.
#pragma once

#include <cstdint>

namespace kt {

// Nanoseconds that the calling thread was ready to run but had no CPU, since it began. -1: the kernel does not tell.
int64_t run_delay_ns();

// When a worker is left out of the work for a while. A worker that costs the others more than it computes is; the
// defaults say how soon that is believed.
struct ParkPolicy {
  // Arriving later than this after most others is worth a look (a system call). Above the usual wake-up and work item.
  int64_t late_ns = 300'000;
  // Time cost, less the worker's share in the work since, at which it is parked. A scheduler tick is 1 to 4 ms, and one
  // or two lost are everyday.
  int64_t park_at_ns = 8'000'000;
  // How long. Coming back for nothing costs one lost tick, 1 % of this.
  int64_t park_ns = 500'000'000;
};

// One worker's account, for its own thread.
class LostCpu {
 public:
  // Starts again from now, with what is owed: before a parked worker works again.
  void resume(int64_t now_ns);
  // The worker arrived late_by_ns after most others of the num_active that share its work. True when it should park.
  bool arrived_late(int64_t now_ns, int64_t late_by_ns, int num_active, const ParkPolicy& policy);

 private:
  int64_t owed_ns_ = 0;
  int64_t looked_ns_ = 0;  // when run_delay_ns() was
  int64_t delay_ns_ = 0;
};

}  // namespace kt
