#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <functional>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "numa/thread_pool.h"
#include "test_harness.h"

namespace kt {
namespace {

// Some CPUs this process may use, repeated when there are fewer.
std::vector<WorkerPlace> some_cpus(int count) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  std::vector<WorkerPlace> places;
  for (int cpu = 0; static_cast<int>(places.size()) < count; cpu = (cpu + 1) % CPU_SETSIZE)
    if (CPU_ISSET(cpu, &allowed)) places.push_back({cpu, -1});
  return places;
}

// For jobs that count on every worker.
constexpr ParkPolicy kNeverPark{.late_ns = std::numeric_limits<int64_t>::max()};

// The phases of plain numbers: each worker adds to its own cell, and one of them checks all cells between phases.
struct Counting final : ThreadPool::Job {
  Counting(int num_workers, int phases) : cells(num_workers), num_phases(phases) {}
  void run(int phase, int worker) override { cells[worker] += phase + 1; }
  int next_phase(int phase) override {
    expected += phase + 1;
    for (int64_t cell : cells) mismatches += cell != expected;
    return phase + 1 < num_phases ? phase + 1 : ThreadPool::kDone;
  }
  std::vector<int64_t> cells;  // not atomic: the pool must order them
  int num_phases;
  int64_t expected = 0;
  int mismatches = 0;
};

struct Calling final : ThreadPool::Job {
  explicit Calling(std::function<void(int, int)> f) : body(std::move(f)) {}
  void run(int phase, int worker) override { body(phase, worker); }
  int next_phase(int phase) override { return phase < 2 ? phase + 1 : ThreadPool::kDone; }
  std::function<void(int, int)> body;
};

TEST(phases_are_ordered) {
  for (int num_workers = 1; num_workers <= 8; ++num_workers) {
    ThreadPool pool(some_cpus(num_workers), kNeverPark);
    Counting job(num_workers, 5);
    for (int call = 0; call < 300; ++call) {
      pool.start(&job, 0);
      pool.wait();
      CHECK(pool.done(), "not done after wait()");
    }
    CHECK(job.mismatches == 0, job.mismatches << " cells were wrong, " << num_workers << " workers");
    CHECK(job.expected == 300 * 15, "sum " << job.expected);
  }
}

TEST(sleepers_wake) {
  ThreadPool pool(some_cpus(2), kNeverPark);
  Counting job(2, 3);
  for (int call = 0; call < 50; ++call) {
    // Around the end of the spin, where falling asleep and being woken meet.
    std::this_thread::sleep_for(std::chrono::microseconds(test::random_int(0, 150)));
    pool.start(&job, 0);
    if (call % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(test::random_int(0, 150)));
    pool.wait();
  }
  CHECK(job.mismatches == 0, job.mismatches << " cells were wrong");
}

TEST(start_at_a_later_phase) {
  ThreadPool pool(some_cpus(2), kNeverPark);
  std::atomic<int> runs{0};
  Calling job([&](int phase, int) { runs += phase; });
  pool.start(&job, 2);
  pool.wait();
  CHECK(runs == 4, runs << ", expected phase 2 on two workers");
}

TEST(an_exception_is_reported_by_wait) {
  ThreadPool pool(some_cpus(3), kNeverPark);
  for (int thrower = 0; thrower < 3; ++thrower) {
    std::atomic<int> last_phase{0};
    Calling job([&](int phase, int worker) {
      last_phase = phase;
      if (phase == 1 && worker == thrower) throw std::logic_error("worker " + std::to_string(worker) + " is lost");
    });
    pool.start(&job, 0);
    CHECK_ERROR(pool.wait(), "a worker thread failed", "is lost");
    CHECK(last_phase == 1, "phase " << last_phase << " ran after the error");
    Counting next(3, 4);
    pool.start(&next, 0);
    pool.wait();
    CHECK(next.mismatches == 0 && next.expected == 10, "the pool does not work after an error");
  }
}

TEST(misuse_and_bad_options) {
  CHECK_ERROR(ThreadPool({}), "cpus is empty");
  CHECK_ERROR(ThreadPool({{-1, 0}}), "cpus has -1");
  CHECK_ERROR(ThreadPool({{0, -2}}), "nodes has -2");
  ThreadPool pool(some_cpus(1));
  pool.wait();  // nothing to wait for
  std::atomic<bool> go{false};
  Calling job([&](int, int) {
    while (!go) std::this_thread::yield();
  });
  pool.start(&job, 2);
  CHECK_ERROR(pool.start(&job, 2), "while another is running");
  go = true;
  pool.wait();
}

TEST(destructor_waits_for_the_job) {
  std::atomic<int> runs{0};
  Calling job([&](int, int) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ++runs;
  });
  {
    ThreadPool pool(some_cpus(2), kNeverPark);
    pool.start(&job, 0);
  }
  CHECK(runs == 6, runs << " runs, expected 2 workers x 3 phases");
}

TEST(an_exception_between_phases_is_reported_by_wait) {
  struct Failing final : ThreadPool::Job {
    void run(int, int) override {}
    int next_phase(int phase) override {
      if (phase == 0) throw std::logic_error("no next phase");
      throw 1;
    }
  } job;
  ThreadPool pool(some_cpus(2), kNeverPark);
  pool.start(&job, 0);
  CHECK_ERROR(pool.wait(), "no next phase");
  pool.start(&job, 1);
  CHECK_ERROR(pool.wait(), "unknown exception");
  pool.wait();  // reported once
}

// What torch or a library set in the creating thread (flushing subnormals is the usual thing) changes no result.
TEST(floating_point_environment) {
  const int before = std::fegetround();
  std::fesetround(FE_UPWARD);
  ThreadPool pool(some_cpus(2), kNeverPark);
  std::fesetround(before);
  std::vector<int> modes(2, -1);
  Calling job([&](int, int worker) { modes[worker] = std::fegetround(); });
  pool.start(&job, 2);
  pool.wait();
  for (int mode : modes) CHECK(mode == FE_TONEAREST, "rounding mode " << mode);
}

TEST(placement) {
  const std::vector<WorkerPlace> cpus = some_cpus(2);
  ThreadPool pool(cpus, kNeverPark);
  CHECK(pool.placement_report().starts_with("pinned 2 threads to CPUs "), pool.placement_report());
  std::vector<int> cpu_counts(2), signals_blocked(2), faults_blocked(2);
  Calling job([&](int, int worker) {
    cpu_set_t own;
    sched_getaffinity(0, sizeof(own), &own);
    cpu_counts[worker] = CPU_ISSET(cpus[worker].cpu, &own) ? CPU_COUNT(&own) : -1;
    sigset_t blocked;
    pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
    signals_blocked[worker] = sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGTERM);
    faults_blocked[worker] = sigismember(&blocked, SIGSEGV) || sigismember(&blocked, SIGFPE);
  });
  pool.start(&job, 2);
  pool.wait();
  for (int worker = 0; worker < 2; ++worker) {
    CHECK(cpu_counts[worker] == 1, "worker " << worker << " may run on " << cpu_counts[worker] << " CPUs");
    CHECK(signals_blocked[worker], "worker " << worker << " takes signals");
    CHECK(!faults_blocked[worker], "worker " << worker << " would die of a fault without a word");
  }
  const ThreadPool lost({cpus[0], {4000, -1}});
  CHECK(lost.placement_report().find("1 not pinned to CPUs 4000 (") != std::string::npos, lost.placement_report());
}

TEST(groups_are_numbered_as_they_appear) {
  const int cpu = some_cpus(1)[0].cpu;
  const ThreadPool pool({{cpu, 3}, {cpu, 3}, {cpu, -1}, {cpu, 0}, {cpu, 3}, {cpu, 0}});
  CHECK(pool.num_nodes() == 3, pool.num_nodes() << " groups");
  const int group_of[] = {0, 0, 1, 2, 0, 2}, numa_node[] = {3, -1, 0}, workers[] = {3, 1, 2};
  for (int worker = 0; worker < 6; ++worker)
    CHECK(pool.node_of(worker) == group_of[worker], "worker " << worker << " in group " << pool.node_of(worker));
  for (int group = 0; group < 3; ++group) {
    CHECK(pool.numa_node(group) == numa_node[group], "group " << group << " is node " << pool.numa_node(group));
    CHECK(pool.workers_on(group) == workers[group], "group " << group << " has " << pool.workers_on(group));
  }
  CHECK(pool.placement_report().find("; threads of NUMA node 3: 3, -1: 1, 0: 2") != std::string::npos,
        pool.placement_report());
  const ThreadPool one(some_cpus(3));
  CHECK(one.num_nodes() == 1 && one.numa_node(0) == -1 && one.workers_on(0) == 3, "not one group");
}

// Takes items from a counter, as jobs should, and notes who did.
struct Sharing final : ThreadPool::Job {
  Sharing(const ThreadPool& of, int phases) : pool(of), ran(of.num_workers()), num_phases(phases) {}
  void run(int, int worker) override {
    ran[worker] = stamp;
    while (next_item.fetch_add(1, std::memory_order_relaxed) < kItems) {
      ++items_done;
      if (item) item();
    }
  }
  int next_phase(int phase) override {
    std::vector<int> on_group(pool.num_nodes());
    int num_ran = 0;
    for (int worker = 0; worker < pool.num_workers(); ++worker) {
      if (ran[worker] != stamp) continue;
      ++num_ran;
      ++on_group[pool.node_of(worker)];
    }
    fewest = std::min(fewest, num_ran);
    idle_groups += std::count(on_group.begin(), on_group.end(), 0);
    items_expected += kItems;
    next_item = 0;
    ++stamp;
    return phase + 1 < num_phases ? phase + 1 : ThreadPool::kDone;
  }
  static constexpr int kItems = 20;
  const ThreadPool& pool;
  std::function<void()> item;
  std::vector<int> ran;  // not atomic: the pool must order them
  int stamp = 1;
  int num_phases;
  int fewest = 1 << 20;  // workers in a phase
  int64_t idle_groups = 0;
  int64_t items_expected = 0;
  std::atomic<int64_t> items_done{0};
  std::atomic<int> next_item{0};
};

// CPUs that are not there: all distinct, so that any number of workers may be parked; the scheduler places them.
std::vector<WorkerPlace> no_cpus(const std::vector<int>& nodes) {
  std::vector<WorkerPlace> places;
  for (int node : nodes) places.push_back({4000 + static_cast<int>(places.size()), node});
  return places;
}

// Who keeps others waiting at all is gone for one or two jobs: as many changes as there can be.
TEST(workers_come_and_go) {
  if (run_delay_ns() < 0) {
    std::cout << "not tested: this kernel does not tell run delays\n";
    return;
  }
  for (const auto& nodes : {std::vector<int>{0, 0}, {0, 1}, {0, 0, 0, 1}, {0, 1, 2, 3, 3}, {0, 0, 0, 0, 1, 1, 1, 1}}) {
    uint64_t parks = 0;
    {
      ThreadPool pool(no_cpus(nodes), {.late_ns = 0, .park_at_ns = 0, .park_ns = 20'000});
      Sharing job(pool, 3);
      job.item = [] {
        for (int i = 0; i < 50; ++i) __builtin_ia32_pause();  // time for others to begin
      };
      const int64_t limit = now_ns() + 10'000'000'000;
      const bool possible = nodes != std::vector<int>{0, 1};
      for (int call = 0; call < 1000 || (possible && pool.num_parks() < 10 && now_ns() < limit); ++call) {
        if (call % 100 == 99) std::this_thread::sleep_for(std::chrono::microseconds(test::random_int(0, 150)));
        pool.start(&job, 0);
        pool.wait();
      }
      parks = pool.num_parks();
      CHECK(job.items_done == job.items_expected, job.items_done << " items, expected " << job.items_expected);
      CHECK(job.idle_groups == 0, job.idle_groups << " times a group had no worker");
    }  // some are parked while the pool ends
    CHECK(parks == 0 || nodes != std::vector<int>({0, 1}), "the last worker of a group was parked");
    CHECK(parks > 0 || nodes == std::vector<int>({0, 1}), "none of " << nodes.size() << " workers was parked");
  }
}

// The first of a group to have nothing left ends the phase, whether the others have begun or not; each group has one.
TEST(who_is_late_to_begin_is_not_waited_for) {
  ThreadPool pool({{4000, 0}, {4001, 0}, {4002, 1}});
  Sharing sharing(pool, 3000);
  pool.start(&sharing, 0);
  pool.wait();
  CHECK(sharing.items_done == sharing.items_expected, sharing.items_done << " items");
  CHECK(sharing.idle_groups == 0, sharing.idle_groups << " times a group had no worker");
  CHECK(sharing.fewest < 3, "every worker was waited for, 3000 times");
}

// Keeps a CPU busy while it lives.
class Competitor {
 public:
  explicit Competitor(int cpu)
      : thread_([this, cpu] {
          cpu_set_t own;
          CPU_ZERO(&own);
          CPU_SET(cpu, &own);
          sched_setaffinity(0, sizeof(own), &own);
          while (!stop_.load(std::memory_order_relaxed)) {
          }
        }) {}
  ~Competitor() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

TEST(a_worker_that_loses_its_cpu_is_parked_and_comes_back) {
  const std::vector<WorkerPlace> places = some_cpus(2);
  if (places[0].cpu == places[1].cpu || run_delay_ns() < 0) {
    std::cout << "not tested: needs two CPUs and run delays\n";
    return;
  }
  const auto spin_20us = [] {
    const int64_t end = now_ns() + 20'000;
    while (now_ns() < end) {
    }
  };
  const auto limit = [start = now_ns()] { return now_ns() < start + 20'000'000'000; };
  ThreadPool pool(places, {.late_ns = 300'000, .park_at_ns = 1'000'000, .park_ns = 20'000'000});
  Sharing job(pool, 2);
  job.item = spin_20us;
  const auto call = [&] {
    pool.start(&job, 0);
    pool.wait();
  };
  {
    const Competitor competitor(places[0].cpu);
    while (pool.num_parks() == 0 && limit()) call();
  }
  CHECK(pool.num_parks() > 0, "nobody was parked");
  job.fewest = 0;
  while (job.fewest < 2 && limit()) {
    job.fewest = 2;
    call();
  }
  CHECK(job.fewest == 2, "the parked worker did not come back");
  CHECK(job.items_done == job.items_expected, job.items_done << " items, expected " << job.items_expected);
}

// Workers of one CPU take it from each other: nothing to blame them for.
TEST(workers_that_share_a_cpu_are_not_parked) {
  ThreadPool pool({some_cpus(1)[0], some_cpus(1)[0], some_cpus(1)[0]}, {.late_ns = 0, .park_at_ns = 0});
  Sharing job(pool, 3);
  for (int i = 0; i < 100; ++i) {
    pool.start(&job, 0);
    pool.wait();
  }
  CHECK(pool.num_parks() == 0, pool.num_parks() << " parks");
}

// What one of 16 workers goes through with the default policy: each `every` it is late by `late` and has lost `lost` of
// its CPU since the last time. Milliseconds; returns how often it was parked, and for how long at most, within 10 s.
struct Parks {
  int count = 0;
  int64_t longest_ns = 0, total_ns = 0;
};
Parks parks_in_10s(double every, double late, double lost, double excused = 0, double until = 10'000) {
  const auto ns = [](double ms) { return static_cast<int64_t>(ms * 1e6); };
  const ParkPolicy policy;
  LostCpu account;
  Parks parks;
  int64_t now = ns(1000), delay = ns(500);
  account.look(now, delay);
  for (const int64_t end = now + ns(until); now < end;) {
    now += ns(every);
    delay += ns(lost);
    if (account.wants_look(now - ns(late))) account.look(now - ns(late), delay - ns(std::min(late, lost)));
    if (!account.look_late(now, delay, ns(late), ns(excused), 16, policy)) continue;
    const int64_t park_ns = account.park(now, 16, policy);
    parks.longest_ns = std::max(parks.longest_ns, park_ns);
    parks.total_ns += park_ns;
    ++parks.count;
    account.resume(now += park_ns, delay);
  }
  return parks;
}

TEST(only_a_sustained_competitor_is_reason_to_park) {
  const Parks competitor = parks_in_10s(6, 3, 3);  // half of the CPU, in slices of 3 ms
  CHECK(competitor.total_ns > 9'000'000'000, competitor.total_ns << " ns of 10 s parked beside a competitor");
  CHECK(competitor.longest_ns == ParkPolicy().park_ns, "parked for " << competitor.longest_ns << " ns at most");
  // Gone after a moment: parked for no longer than the parking costs what was lost.
  const Parks moment = parks_in_10s(6, 3, 3, 0, 40);
  CHECK(moment.count == 1 && moment.longest_ns == 16 * ParkPolicy().park_at_ns, moment.count << " parks");
  struct {
    const char* what;
    Parks parks;
  } const innocent[] = {
      {"a slice lost now and then", parks_in_10s(60, 3, 3)},
      {"long losses, seldom", parks_in_10s(500, 200, 200)},
      {"the host takes the CPU, which is no run delay", parks_in_10s(10, 3, 0)},
      {"long work items", parks_in_10s(100, 50, 0.2)},
      {"the caller runs there", parks_in_10s(6, 3, 3, 2.9)},
  };
  for (const auto& [what, parks] : innocent) CHECK(parks.count == 0, parks.count << " parks: " << what);
}

TEST(an_idle_pool_sleeps_and_wakes_at_once) {
  ThreadPool pool(some_cpus(2));
  Sharing job(pool, 4);
  const auto call_ns = [&] {
    const int64_t start = now_ns();
    pool.start(&job, 0);
    pool.wait();
    return now_ns() - start;
  };
  const auto cpu_ns = [] {
    rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1'000'000'000 +
           (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1000;
  };
  int64_t best_excess = std::numeric_limits<int64_t>::max();
  int64_t slept_ns = 0, used_ns = 0;
  for (int i = 0; i < 5; ++i) {  // a busy machine may spoil some
    call_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const int64_t start = now_ns(), used = cpu_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    used_ns += cpu_ns() - used;
    slept_ns += now_ns() - start;
    const int64_t first = call_ns();
    std::vector<int64_t> next(9);
    for (int64_t& ns : next) ns = call_ns();
    std::sort(next.begin(), next.end());
    best_excess = std::min(best_excess, first - next[next.size() / 2]);
  }
  CHECK(used_ns < slept_ns / 100, used_ns << " ns of CPU in " << slept_ns << " ns asleep");
  CHECK(best_excess < 1'000'000, "the first job after a sleep takes " << best_excess << " ns more");
}

}  // namespace
}  // namespace kt
