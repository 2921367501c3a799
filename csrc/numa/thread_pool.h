// Persistent pinned worker threads that run one job at a time, phase by phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "numa/event_count.h"
#include "numa/lost_cpu.h"

namespace kt {

// Where a worker belongs: its logical CPU and the memory node of that, -1 when unknown or of no matter.
struct WorkerPlace {
  int cpu;
  int numa_node;
};

// start(), done() and wait() are for one thread at a time; they never allocate, and lock nothing.
// A phase ends when all workers in it have returned, at least one of each group: who is late to begin is not waited
// for. Waiting threads spin for spin_ns, then sleep: an idle pool uses no CPU.
//
// A worker that keeps losing its CPU to other processes amid its work is parked: it sleeps for a while. At most a
// quarter of the workers (of up to seven, one) are parked at a time, never the last of a group, and never where workers
// share a CPU.
//
// So a job must not count on any one worker, only on one of each group, and run() must return only once nothing is left
// for its group to begin. With kAllTakePart every worker runs every phase once.
//
// With Caller::kWorks the last place is the caller's: it has no thread here, and takes part in a job while it is in
// work_until_done(). It is never parked, and never the only one of a group.
class ThreadPool {
 public:
  static constexpr int kDone = -1;

  enum class Caller { kWaits, kWorks };

  class Job {
   public:
    // At most once a phase and worker. An exception ends the job after this phase; wait() reports it.
    virtual void run(int phase, int worker) = 0;
    // One worker, while no other is in a phase: the phase after `phase`, or kDone. Sees all that the phase wrote.
    virtual int next_phase(int phase) = 0;

   protected:
    ~Job() = default;
  };

  // One worker an entry of places, pinned to its CPU, with the default memory policy, the default floating point
  // environment, and all signals but its own faults blocked: nothing of the creating thread leaks in. Returns when all
  // are in place.
  // Throws kt::Error when places is empty or a thread cannot be created.
  explicit ThreadPool(const std::vector<WorkerPlace>& places, const ParkPolicy& park_policy = {},
                      int64_t spin_ns = kSpinNanoseconds, Caller caller = Caller::kWaits);
  ~ThreadPool();  // waits for the running job

  int num_workers() const { return static_cast<int>(places_.size()); }

  // Workers of one memory node are a group; groups are numbered in order of first appearance in places.
  int num_nodes() const { return static_cast<int>(groups_.size()); }
  int node_of(int worker) const { return group_of_[worker]; }
  int place_on_node(int worker) const { return place_on_node_[worker]; }  // its number among the workers there
  int numa_node(int group) const { return groups_[group].numa_node; }     // the system's number, or -1
  int workers_on(int group) const { return groups_[group].num_workers; }
  std::vector<int> workers_on_nodes() const;  // [num_nodes]

  // One line: where the workers run, and why not where they should.
  const std::string& placement_report() const { return placement_report_; }

  // How often a worker was parked so far. Any thread.
  uint64_t num_parks() const { return num_parks_.load(std::memory_order_relaxed); }

  // Wakes the workers and returns. The job must live until wait() returns. A job must not be running.
  void start(Job* job, int first_phase);
  bool done() const { return finished_.value() == started_; }
  // Returns when the job is done; throws kt::Error with the first exception of a worker. Without a job: at once.
  void wait();

  // With Caller::kWorks, instead of wait() where nothing else is to be done: spins when there is nothing to take.
  bool caller_works() const { return num_threads_ < num_workers(); }
  void work_until_done();
  // Before that, once: the calling thread becomes as a worker, pinned to the last place.
  void adopt_calling_thread();

 private:
  struct Group {
    int numa_node;
    int num_workers;
    int num_active;  // threads of ours that are not parked
  };
  // A line of its own each: both are written in every phase.
  struct alignas(64) Covered {
    std::atomic<uint32_t> phase{0};  // the last one from which a worker of the group has returned
  };
  struct alignas(64) Worker {
    std::atomic<bool> parked{false};
    int64_t parked_until_ns = 0;
    LostCpu lost_cpu;
  };
  struct Placement {
    int pin_error = 0;     // errno, 0 when pinned
    int policy_error = 0;  // errno, 0 when reset
  };

  void main(int worker);
  void settle_in(int worker);
  void report_failure();
  void run_phase(int worker);
  bool enter_phase(uint32_t phase);
  void leave_phase(uint32_t phase, int worker);
  bool leave(uint64_t covered);
  void finish_phase();
  void open_phase();
  bool keeps_others_waiting(int worker, int64_t now);
  void park(int worker, int64_t now);
  void resume_workers();
  bool sleep_while_parked(int worker);
  void record_error(const char* what);
  void stop();
  bool on_worker_cpu() const;
  std::string describe_placement() const;

  std::vector<WorkerPlace> places_;
  std::vector<Group> groups_;
  std::vector<int> group_of_;       // [num_workers]
  std::vector<int> place_on_node_;  // [num_workers]
  int num_threads_;                 // of ours
  int64_t spin_ns_;
  ParkPolicy park_policy_;
  int max_parked_;
  int needed_;  // returns that end a phase: of all workers, or one of each group
  std::vector<Worker> workers_;
  std::vector<Covered> covered_;  // [groups]
  std::vector<Placement> placements_;
  std::string placement_report_;

  // Written while no worker is in a phase, published by gate_.
  Job* job_ = nullptr;
  int phase_ = kDone;
  int num_active_;

  EventCount phase_starts_;
  EventCount finished_;  // jobs so far
  EventCount resumes_;   // parked workers wait on it
  uint32_t started_ = 0;
  uint32_t phases_before_job_ = 0;
  std::atomic<int> num_placed_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> num_parks_{0};

  // The caller, who takes a worker's CPU where there is no other.
  std::atomic<int> caller_cpu_{-1};
  int64_t start_ns_ = 0;
  std::atomic<int64_t> wait_ns_{0};  // 0: not yet

  // value of phase_starts_ | open | returns that count | workers inside; see thread_pool.cpp
  alignas(64) std::atomic<uint64_t> gate_{0};
  std::atomic<int64_t> but_one_left_ns_{0};  // when one worker was left inside; 0 so far
  std::atomic<bool> failed_{false};
  std::string error_;  // of the worker that set failed_

  std::vector<std::thread> threads_;
};

}  // namespace kt
