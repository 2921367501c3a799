// Whether a worker keeps losing its CPU to others, and so keeps all workers waiting.
#pragma once

#include <cstdint>
#include <limits>

namespace kt {

// Nanoseconds that the calling thread was ready to run but had no CPU, since it began. -1: the kernel does not tell.
int64_t run_delay_ns();

// When a worker is left out of the work for a while. One that costs the others more than it computes is; the defaults
// say how soon that is believed.
struct ParkPolicy {
  // Keeping all others waiting for longer than this is worth a look (a system call). Above the usual work item.
  int64_t late_ns = 300'000;
  // Time cost, less the worker's share in the work since, at which it is parked: several ticks of the scheduler (1 to
  // 4 ms), since one or two lost are everyday.
  int64_t park_at_ns = 8'000'000;
  // Of one time lost, at most this counts: a single long one, however long, proves nothing.
  int64_t count_at_most_ns = 2'500'000;
  // How long at most. The first time it is as long as costs what was lost; each time that the reason proves to be there
  // still, twice as long. Coming back for nothing costs some lost ticks, 2 % of the most.
  int64_t park_ns = 500'000'000;

  // Nobody is ever parked, and jobs may count on every worker.
  bool all_take_part() const { return late_ns == std::numeric_limits<int64_t>::max(); }
};

// One worker's account, for its own thread. delay_ns: its run_delay_ns().
class LostCpu {
 public:
  // Whether the last look is so old that everyone's small delays since then would be taken for something.
  bool wants_look(int64_t now_ns) const;
  // The worker is not late: what it lost so far is of no matter.
  void look(int64_t now_ns, int64_t delay_ns);
  // All others of the num_active that share its work waited late_by_ns for the worker, excused_ns of it for a good
  // reason. True when it should park.
  bool look_late(int64_t now_ns, int64_t delay_ns, int64_t late_by_ns, int64_t excused_ns, int num_active,
                 const ParkPolicy& policy);
  // It is parked: for how long. Then back from that.
  int64_t park(int64_t now_ns, int num_active, const ParkPolicy& policy);
  void resume(int64_t now_ns, int64_t delay_ns);

 private:
  int64_t owed_ns_ = 0;
  int64_t forgiven_ns_ = 0;  // up to when
  int64_t looked_ns_ = 0;    // when delay_ns_ was read; 0: never
  int64_t delay_ns_ = 0;
  int64_t resumed_ns_ = 0;
  int64_t parked_for_ns_ = 0;  // the last time; 0: never
};

}  // namespace kt
