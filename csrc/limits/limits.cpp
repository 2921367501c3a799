#include "limits/limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>

#include "check.h"
#include "kernels/cpu_features.h"
#include "limits/loops.h"
#include "numa/node_memory.h"
#include "numa/thread_pool.h"

namespace kt {
namespace {

constexpr int kBursts = 5;
constexpr int kCountEvery = 16;             // loops between two looks at the clock, so that looking costs nothing
constexpr int kRoundsPerLoop = 1024;        // some microseconds
constexpr size_t kChunk = size_t{1} << 20;  // what a worker of the executor reads at a time, within a factor

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// One burst a phase: the workers start together, each counts what it did in its own time.
class Bursts final : public ThreadPool::Job {
 public:
  // work(worker): does something once, and returns how much it was.
  Bursts(int num_workers, double seconds, std::function<double(int)> work)
      : seconds_(seconds), work_(std::move(work)), worker_rates_(num_workers) {}

  // The median over the bursts of the sum over the workers, a second.
  double rate(ThreadPool& pool) {
    pool.start(this, 0);
    pool.wait();
    std::sort(rates_.begin(), rates_.end());
    return rates_[rates_.size() / 2];
  }

  void run(int phase, int worker) override {
    const double start = now(), length = phase == 0 ? seconds_ / 2 : seconds_;
    double done = 0, elapsed = 0;
    while (elapsed < length) {
      done += work_(worker);
      elapsed = now() - start;
    }
    worker_rates_[worker] = done / elapsed;
  }

  int next_phase(int phase) override {
    double sum = 0;
    for (double rate : worker_rates_) sum += rate;
    if (phase > 0) rates_.push_back(sum);  // the first brings the clocks up
    return phase < kBursts ? phase + 1 : ThreadPool::kDone;
  }

 private:
  const double seconds_;
  const std::function<double(int)> work_;
  std::vector<double> worker_rates_, rates_;
};

// Every worker touches its own chunks first: the pages are then on its memory node.
class FirstTouch final : public ThreadPool::Job {
 public:
  FirstTouch(uint8_t* data, size_t num_chunks, int num_workers)
      : data_(data), num_chunks_(num_chunks), num_workers_(num_workers) {}
  void run(int, int worker) override {
    for (size_t chunk = worker; chunk < num_chunks_; chunk += num_workers_)
      std::memset(data_ + chunk * kChunk, worker + 1, kChunk);
  }
  int next_phase(int) override { return ThreadPool::kDone; }

 private:
  uint8_t* const data_;
  const size_t num_chunks_;
  const int num_workers_;
};

void check_seconds(double seconds) {
  KT_CHECK(seconds > 0 && seconds <= 3600, "seconds is ", seconds, ", expected more than 0 and at most 3600");
}

// Every worker counts: one that lost its CPU for a while is part of what is measured.
constexpr ParkPolicy kNeverPark = {.late_ns = INT64_MAX};

std::vector<WorkerPlace> places_of(const std::vector<int>& cpus) {
  std::vector<WorkerPlace> places;
  for (int cpu : cpus) places.push_back({cpu, -1});
  return places;
}

}  // namespace

double measure_dram_read(const std::vector<int>& cpus, size_t bytes, double seconds) {
  check_seconds(seconds);
  const size_t num_workers = cpus.size(), num_chunks = bytes / kChunk;
  KT_CHECK(num_chunks >= num_workers, "bytes is ", bytes, ", expected at least 1 MiB for each of the ", num_workers,
           " threads, and much more than the caches hold");
  const uint32_t features = detect_cpu_features();
  ThreadPool pool(places_of(cpus), kNeverPark);
  const NodeMemory memory(num_chunks * kChunk, "the bandwidth measurement");
  FirstTouch touch(memory.data(), num_chunks, static_cast<int>(num_workers));
  pool.start(&touch, 0);
  pool.wait();

  struct alignas(64) Cursor {
    size_t chunk;
    uint64_t sum = 0;
  };
  std::vector<Cursor> cursors(num_workers);
  for (size_t worker = 0; worker < num_workers; ++worker) cursors[worker].chunk = worker;
  Bursts bursts(static_cast<int>(num_workers), seconds / kBursts, [&](int worker) {
    Cursor& cursor = cursors[worker];
    cursor.sum += read_bytes(memory.data() + cursor.chunk * kChunk, kChunk, features);
    cursor.chunk += num_workers;
    if (cursor.chunk >= num_chunks) cursor.chunk = worker;
    return static_cast<double>(kChunk);
  });
  return bursts.rate(pool) / 1e9;
}

std::vector<std::string> peak_kinds() {
  const uint32_t features = detect_cpu_features();
  std::vector<std::string> kinds;
  for (int i = 0; i < kNumPeakLoops; ++i)
    if ((kPeakLoops[i].required_features & ~features) == 0) kinds.emplace_back(kPeakLoops[i].kind);
  return kinds;
}

double measure_peak(const std::string& kind, const std::vector<int>& cpus, double seconds) {
  check_seconds(seconds);
  const PeakLoop* const end = kPeakLoops + kNumPeakLoops;
  const PeakLoop* const loop = std::find_if(kPeakLoops, end, [&](const PeakLoop& l) { return l.kind == kind; });
  KT_CHECK(loop != end, "kind is \"", kind, "\", expected one that peak_kinds() lists");
  const uint32_t missing = loop->required_features & ~detect_cpu_features();
  KT_CHECK(missing == 0, "the peak of \"", kind, "\" needs ", cpu_feature_names(missing),
           ", which this CPU or its operating system lacks; choose one that peak_kinds() lists");
  // After detect_cpu_features(): its threads inherit the permission to use tiles.
  ThreadPool pool(places_of(cpus), kNeverPark);
  Bursts bursts(pool.num_workers(), seconds / kBursts, [&](int) {
    for (int i = 0; i < kCountEvery; ++i) loop->run(kRoundsPerLoop);
    return loop->ops_per_round * kRoundsPerLoop * kCountEvery;
  });
  return bursts.rate(pool);
}

}  // namespace kt
