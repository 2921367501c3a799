#include "numa/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cfenv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <sstream>
#include <system_error>

#include "check.h"

namespace kt {
namespace {

constexpr int kMpolDefault = 0;     // linux/mempolicy.h; libnuma is not a dependency
constexpr int kMaxCpus = 1 << 16;   // far above any kernel's NR_CPUS (8192)
constexpr int kMaxNodes = 1 << 16;  // and MAX_NUMNODES (1024)

// gate_: bits 0-15 workers inside, 16-30 returns that count, 31 open, 32-63 the phase as phase_starts_ counts them.
constexpr uint64_t kInside = 1, kCovered = 1 << 16, kOpen = uint64_t{1} << 31;
constexpr int kMaxWorkers = (1 << 15) - 1;
constexpr uint64_t inside(uint64_t gate) { return gate & 0xffff; }
constexpr uint64_t covered(uint64_t gate) { return (gate & (kOpen - 1)) >> 16; }
constexpr uint32_t phase_of(uint64_t gate) { return static_cast<uint32_t>(gate >> 32); }

// The mask type of the C library stops at CPU 1023; the kernel takes any length.
int set_affinity(const std::vector<unsigned long>& mask) {
  return syscall(SYS_sched_setaffinity, 0, mask.size() * sizeof(unsigned long), mask.data()) == 0 ? 0 : errno;
}

int pin_to(int cpu) {
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(cpu / kBits + 1, 0);
  mask[cpu / kBits] = 1UL << (cpu % kBits);
  const int error = set_affinity(mask);
  // Not there, or not ours: run wherever this process may, rather than on the one CPU the creator is bound to.
  if (error != 0) set_affinity(std::vector<unsigned long>(kMaxCpus / kBits, ~0UL));
  return error;
}

// "1-3,8"
std::string cpu_list(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  std::ostringstream text;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    text << (i == 0 ? "" : ",") << cpus[i];
    if (last > i) text << '-' << cpus[last];
    i = last + 1;
  }
  return text.str();
}

std::vector<int> cpus_of(const std::vector<WorkerPlace>& places) {
  std::vector<int> cpus;
  for (const WorkerPlace& place : places) cpus.push_back(place.cpu);
  return cpus;
}

bool repeats(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  return std::adjacent_find(cpus.begin(), cpus.end()) != cpus.end();
}

}  // namespace

ThreadPool::ThreadPool(const std::vector<WorkerPlace>& places, const ParkPolicy& park_policy, int64_t spin_ns,
                       Caller caller)
    : places_(places),
      num_threads_(static_cast<int>(places.size()) - (caller == Caller::kWorks ? 1 : 0)),
      // Two workers on one CPU: who spins keeps the other from running.
      spin_ns_(repeats(cpus_of(places)) ? 0 : spin_ns),
      park_policy_(park_policy),
      // Workers of one CPU keep each other from it: none is to blame.
      max_parked_(repeats(cpus_of(places)) || park_policy.all_take_part()
                      ? 0
                      : std::max(1, static_cast<int>(places.size()) / 4)),
      workers_(places.size()),
      placements_(places.size()),
      num_active_(num_threads_) {
  KT_CHECK(!places.empty(), "cpus is empty, expected the logical CPU of each worker thread, at least one");
  KT_CHECK(places.size() <= kMaxWorkers, "cpus has ", places.size(), " entries, expected at most ", kMaxWorkers);
  KT_CHECK(num_threads_ > 0, "cpus has one entry, expected one for the caller and at least one more");
  KT_CHECK(!caller_works() || !park_policy.all_take_part(), "the caller cannot be counted on in every phase");
  for (const auto& [cpu, numa_node] : places) {
    KT_CHECK(cpu >= 0 && cpu < kMaxCpus, "cpus has ", cpu, ", expected logical CPU numbers (see /proc/cpuinfo)");
    KT_CHECK(numa_node >= -1 && numa_node < kMaxNodes, "nodes has ", numa_node,
             ", expected NUMA node numbers (see /sys/devices/system/node), or -1 for none");
    const bool has_thread = static_cast<int>(group_of_.size()) < num_threads_;
    auto group = std::find_if(groups_.begin(), groups_.end(),
                              [node = numa_node](const Group& g) { return g.numa_node == node; });
    if (group == groups_.end() && !has_thread) group = groups_.begin();
    group_of_.push_back(static_cast<int>(group - groups_.begin()));
    place_on_node_.push_back(group == groups_.end() ? 0 : group->num_workers);
    if (group == groups_.end()) {
      groups_.push_back({numa_node, 1, 1});
      continue;
    }
    ++group->num_workers;
    group->num_active += has_thread ? 1 : 0;
  }

  needed_ = park_policy_.all_take_part() ? num_workers() : num_nodes();
  covered_ = std::vector<Covered>(groups_.size());

  sigset_t blocked, before;  // inherited, so that no signal of the process is ever handled on a worker
  sigfillset(&blocked);
  // A fault of the worker itself: blocked, it would end the process without the handlers that say where.
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&blocked, fault);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  started_ = 1;  // being placed counts as the first job
  threads_.reserve(places.size());
  try {
    for (int worker = 0; worker < num_threads_; ++worker) threads_.emplace_back(&ThreadPool::main, this, worker);
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    fail("worker thread ", threads_.size() + 1, " of ", num_threads_, " could not be created (", error.what(),
         "); ask for fewer threads or raise the limit (ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  wait();
  placement_report_ = describe_placement();
}

ThreadPool::~ThreadPool() {
  while (!done()) finished_.wait_change(started_ - 1, 0);
  stop();
}

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  phase_starts_.advance();
  resumes_.advance();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::start(Job* job, int first_phase) {
  KT_CHECK(done(), "a job is started while another is running");
  job_ = job;
  phase_ = first_phase;
  ++started_;
  start_ns_ = now_ns();
  wait_ns_.store(0, std::memory_order_relaxed);
  caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  if (num_active_ < num_threads_) resume_workers();
  phases_before_job_ = phase_starts_.value();
  open_phase();
}

void ThreadPool::wait() {
  if (!done()) {
    caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    wait_ns_.store(now_ns(), std::memory_order_relaxed);
    // A caller that spins on a worker's CPU waits for the very thread it keeps from running.
    const int64_t spin_ns = on_worker_cpu() ? 0 : spin_ns_;
    while (!done()) finished_.wait_change(started_ - 1, spin_ns);
  }
  report_failure();
}

void ThreadPool::work_until_done() {
  for (uint32_t seen = phases_before_job_; !done();) {
    const uint32_t phase = phase_starts_.value();
    if (phase == seen) {
      __builtin_ia32_pause();
      continue;
    }
    seen = phase;
    const int worker = num_workers() - 1;
    if (!enter_phase(phase)) continue;
    run_phase(worker);
    leave_phase(phase, worker);
  }
  report_failure();
}

std::vector<int> ThreadPool::workers_on_nodes() const {
  std::vector<int> workers;
  for (const Group& group : groups_) workers.push_back(group.num_workers);
  return workers;
}

void ThreadPool::adopt_calling_thread() { settle_in(num_workers() - 1); }

void ThreadPool::report_failure() {
  if (!failed_.load(std::memory_order_relaxed)) return;
  failed_.store(false, std::memory_order_relaxed);
  fail("a worker thread failed: ", error_);
}

bool ThreadPool::on_worker_cpu() const {
  const int own = sched_getcpu();
  return std::any_of(places_.begin(), places_.end(), [own](const WorkerPlace& place) { return place.cpu == own; });
}

void ThreadPool::main(int worker) {
  char name[16];  // the kernel's limit
  std::snprintf(name, sizeof(name), "kt-worker-%d", worker);
  pthread_setname_np(pthread_self(), name);
  settle_in(worker);

  if (num_placed_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) finished_.advance();
  Worker& me = workers_[worker];
  for (uint32_t seen = 0;;) {
    seen = phase_starts_.wait_change(seen, spin_ns_);
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (me.parked.load(std::memory_order_acquire)) {
      if (!sleep_while_parked(worker)) return;
    } else if (enter_phase(seen)) {
      run_phase(worker);
      leave_phase(seen, worker);
    }
  }
}

void ThreadPool::settle_in(int worker) {
  std::fesetenv(FE_DFL_ENV);  // rounding to nearest, subnormals kept: a thread inherits its creator's
  placements_[worker].pin_error = pin_to(places_[worker].cpu);
  placements_[worker].policy_error = syscall(SYS_set_mempolicy, kMpolDefault, nullptr, 0) == 0 ? 0 : errno;
}

void ThreadPool::run_phase(int worker) {
  try {
    job_->run(phase_, worker);
  } catch (const std::exception& error) {
    record_error(error.what());
  } catch (...) {
    record_error("unknown exception");
  }
}

// False when the phase is over already.
bool ThreadPool::enter_phase(uint32_t phase) {
  const auto open = [phase](uint64_t gate) { return (gate & kOpen) != 0 && phase_of(gate) == phase; };
  if (!open(gate_.load(std::memory_order_relaxed))) return false;
  if (open(gate_.fetch_add(kInside, std::memory_order_acq_rel))) return true;
  if (leave(0)) finish_phase();  // a later one, which could not end while we were counted
  return false;
}

void ThreadPool::leave_phase(uint32_t phase, int worker) {
  bool counts = park_policy_.all_take_part();
  if (!counts) {
    std::atomic<uint32_t>& covered = covered_[group_of_[worker]].phase;
    counts =
        covered.load(std::memory_order_relaxed) != phase && covered.exchange(phase, std::memory_order_relaxed) != phase;
  }
  const int64_t now = max_parked_ > 0 ? now_ns() : 0;
  if (leave(counts ? kCovered : 0)) {
    if (max_parked_ > 0 && keeps_others_waiting(worker, now)) park(worker, now);
    finish_phase();
  }
  LostCpu& account = workers_[worker].lost_cpu;
  if (max_parked_ > 0 && worker < num_threads_ && account.wants_look(now)) account.look(now, run_delay_ns());
}

// True for the last one to leave: the phase is closed, and until the next one is open all is the calling thread's.
bool ThreadPool::leave(uint64_t counts) {
  uint64_t gate = gate_.fetch_add(counts - kInside, std::memory_order_acq_rel) + counts - kInside;
  // Meets the next phase when it comes late: somebody then looks for nothing, or does not look, no more.
  if (max_parked_ > 0 && inside(gate) == 1) but_one_left_ns_.store(now_ns(), std::memory_order_relaxed);
  while ((gate & kOpen) != 0 && inside(gate) == 0 && covered(gate) == static_cast<uint64_t>(needed_))
    if (gate_.compare_exchange_weak(gate, gate - kOpen, std::memory_order_acq_rel, std::memory_order_acquire))
      return true;
  return false;
}

// Runs on the worker that closed the phase.
void ThreadPool::finish_phase() {
  int next = kDone;
  try {
    if (!failed_.load(std::memory_order_relaxed)) next = job_->next_phase(phase_);
  } catch (const std::exception& error) {
    record_error(error.what());
  } catch (...) {
    record_error("unknown exception");
  }
  phase_ = next;
  if (next == kDone)
    finished_.advance();
  else
    open_phase();
}

// No phase is open.
void ThreadPool::open_phase() {
  but_one_left_ns_.store(0, std::memory_order_relaxed);
  // Added rather than stored: a worker that came too late may still be counted inside.
  const uint64_t before = gate_.load(std::memory_order_relaxed) & ~uint64_t{0xffff};
  gate_.fetch_add((uint64_t{phase_starts_.value() + 1} << 32 | kOpen) - before, std::memory_order_release);
  phase_starts_.advance();
}

// Of the last one to leave: whether all would be faster without it. What the others waited for it alone is its doing.
bool ThreadPool::keeps_others_waiting(int worker, int64_t now) {
  const int64_t but_one_left = but_one_left_ns_.load(std::memory_order_relaxed);
  const int num_active = groups_[group_of_[worker]].num_active;
  if (but_one_left == 0 || now - but_one_left <= park_policy_.late_ns || num_active == 1 || worker >= num_threads_)
    return false;
  // The caller runs, until it waits, on some worker's CPU: it is part of the work, and parking would not end it.
  int64_t excused = 0;
  if (caller_cpu_.load(std::memory_order_relaxed) == places_[worker].cpu) {
    const int64_t wait = wait_ns_.load(std::memory_order_relaxed);
    excused = (wait == 0 ? now : wait) - start_ns_;
  }
  return workers_[worker].lost_cpu.look_late(now, run_delay_ns(), now - but_one_left, excused, num_active,
                                             park_policy_) &&
         num_threads_ - num_active_ < max_parked_;
}

void ThreadPool::park(int worker, int64_t now) {
  Worker& me = workers_[worker];
  me.parked_until_ns = now + me.lost_cpu.park(now, groups_[group_of_[worker]].num_active, park_policy_);
  --groups_[group_of_[worker]].num_active;
  --num_active_;
  me.parked.store(true, std::memory_order_relaxed);
  num_parks_.fetch_add(1, std::memory_order_relaxed);
}

// Before a job starts.
void ThreadPool::resume_workers() {
  const int64_t now = now_ns();
  const int before = num_active_;
  for (int worker = 0; worker < num_threads_; ++worker) {
    Worker& it = workers_[worker];
    if (!it.parked.load(std::memory_order_relaxed) || now < it.parked_until_ns) continue;
    ++groups_[group_of_[worker]].num_active;
    ++num_active_;
    it.parked.store(false, std::memory_order_release);
  }
  if (num_active_ != before) resumes_.advance();
}

// False when the pool stops.
bool ThreadPool::sleep_while_parked(int worker) {
  Worker& me = workers_[worker];
  uint32_t seen = resumes_.value();
  while (me.parked.load(std::memory_order_acquire)) {
    if (stopping_.load(std::memory_order_relaxed)) return false;
    seen = resumes_.wait_change(seen, 0);
  }
  me.lost_cpu.resume(now_ns(), run_delay_ns());
  return true;
}

void ThreadPool::record_error(const char* what) {
  if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = what;
}

std::string ThreadPool::describe_placement() const {
  std::vector<int> pinned;
  std::map<int, std::vector<int>> refused;  // errno -> CPUs
  int policy_error = 0;
  for (int worker = 0; worker < num_workers(); ++worker) {
    const Placement& placement = placements_[worker];
    if (placement.pin_error == 0)
      pinned.push_back(places_[worker].cpu);
    else
      refused[placement.pin_error].push_back(places_[worker].cpu);
    if (placement.policy_error != 0) policy_error = placement.policy_error;
  }
  std::ostringstream text;
  text << "pinned " << pinned.size() << (pinned.size() == 1 ? " thread" : " threads");
  if (!pinned.empty()) text << (repeats(pinned) || pinned.size() > 1 ? " to CPUs " : " to CPU ") << cpu_list(pinned);
  for (const auto& [error, cpus] : refused)
    text << "; " << cpus.size() << " not pinned to CPUs " << cpu_list(cpus) << " (" << std::strerror(error)
         << "): the scheduler places them";
  if (num_nodes() > 1)
    for (int group = 0; group < num_nodes(); ++group)
      text << (group == 0 ? "; threads of NUMA node " : ", ") << numa_node(group) << ": " << workers_on(group);
  if (max_parked_ > 0 && run_delay_ns() < 0)
    text << "; no /proc/thread-self/schedstat: a thread that loses its CPU to others is waited for";
  if (policy_error != 0)
    text << "; memory policy not reset (" << std::strerror(policy_error)
         << "): pages go where the creator's policy says";
  return text.str();
}

}  // namespace kt
