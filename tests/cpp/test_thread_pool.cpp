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
#include "pool_jobs.h"
#include "test_harness.h"

namespace kt {
namespace {

using test::Sharing;
using test::some_cpus;

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

// With and without its help, and with workers that come and go.
TEST(the_caller_works) {
  using Caller = ThreadPool::Caller;
  for (const bool parks : {false, true}) {
    const ParkPolicy policy = parks ? ParkPolicy{.late_ns = 0, .park_at_ns = 0, .park_ns = 20'000} : ParkPolicy{};
    for (const auto& nodes : {std::vector<int>{0, 0}, {0, 1}, {0, 0, 1}, {0, 1, 1}, {0, 1, 2, 2}, {3, 3, 3, 3, 3, 3}}) {
      std::vector<WorkerPlace> places;  // CPUs that are not there, so that the scheduler places all
      for (int node : nodes) places.push_back({4000 + static_cast<int>(places.size()), node});
      ThreadPool pool(places, policy, kSpinNanoseconds, Caller::kWorks);
      const int caller = pool.num_workers() - 1;
      CHECK(pool.caller_works() && pool.num_workers() == static_cast<int>(nodes.size()), "no caller");
      int in_groups = 0;
      for (int group = 0; group < pool.num_nodes(); ++group) in_groups += pool.workers_on(group);
      CHECK(in_groups == pool.num_workers(), in_groups << " workers in groups");
      test::Sharing job(pool, 3);
      bool helped = false;
      for (int call = 0; call < 200; ++call) {
        pool.start(&job, 0);
        if (call % 3 == 2) {
          pool.wait();
        } else {
          pool.work_until_done();
          helped |= job.ran[caller] != 0;
        }
        CHECK(pool.done(), "not done");
      }
      CHECK(helped, "the caller never ran a phase");
      CHECK(job.items_done >= job.items_expected, job.items_done << " items of " << job.items_expected);
      CHECK(job.idle_groups == 0, job.idle_groups << " groups were left out");
    }
  }
}

TEST(an_exception_of_the_caller_is_reported) {
  std::vector<WorkerPlace> places = some_cpus(2);
  ThreadPool pool(places, {}, kSpinNanoseconds, ThreadPool::Caller::kWorks);
  int reported = 0;
  for (int call = 0; call < 200; ++call) {
    Calling job([&](int, int worker) {
      if (worker == 1) throw std::logic_error("the caller is lost");
      std::this_thread::sleep_for(std::chrono::microseconds(200));  // so that the caller is in time
    });
    pool.start(&job, 2);
    try {
      pool.work_until_done();
    } catch (const Error& error) {
      reported += std::string(error.what()).find("the caller is lost") != std::string::npos;
    }
  }
  CHECK(reported > 0, "never reported");
}

TEST(misuse_and_bad_options) {
  CHECK_ERROR(ThreadPool({}), "cpus is empty");
  CHECK_ERROR(ThreadPool({{-1, 0}}), "cpus has -1");
  CHECK_ERROR(ThreadPool({{0, -2}}), "nodes has -2");
  CHECK_ERROR(ThreadPool({{0, 0}}, {}, 0, ThreadPool::Caller::kWorks), "at least one more");
  CHECK_ERROR(ThreadPool({{0, 0}, {1, 0}}, kNeverPark, 0, ThreadPool::Caller::kWorks), "counted on");
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
