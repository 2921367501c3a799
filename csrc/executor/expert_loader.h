// Reads runs of bytes from files into memory with all workers of a pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "moe_params.h"
#include "numa/thread_pool.h"

namespace kt {

// add() everything, then start it as a job of the pool. Each byte is read once, by the worker that thereby touches its
// page first, and put where it stays. Counters may be read by any thread while the job runs.
class ExpertLoader : public ThreadPool::Job {
 public:
  ExpertLoader() = default;
  ~ExpertLoader();  // closes the files; the job must be over
  ExpertLoader(const ExpertLoader&) = delete;
  ExpertLoader& operator=(const ExpertLoader&) = delete;

  // Opens the file unless it is open. destination: [span.bytes], not owned. Throws kt::Error.
  void add(const FileSpan& span, uint8_t* destination);

  void cancel() { stop_.store(true, std::memory_order_relaxed); }

  uint64_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }
  uint64_t bytes_total() const { return bytes_total_; }
  // The first thing that went wrong, "" so far. What came later is not kept.
  std::string error() const;

  void run(int phase, int worker) override;
  int next_phase(int) override { return ThreadPool::kDone; }

 private:
  struct File {
    std::string path;
    int descriptor;
  };
  struct Chunk {
    size_t file;  // in files_
    uint64_t offset;
    uint64_t bytes;
    uint8_t* destination;
  };

  size_t open_file(const std::string& path);
  void read(const Chunk& chunk);
  void set_error(const std::string& text);

  std::vector<File> files_;
  std::map<std::string, size_t> file_of_path_;
  std::vector<Chunk> chunks_;
  uint64_t bytes_total_ = 0;
  std::atomic<uint64_t> bytes_done_{0};
  std::atomic<size_t> next_chunk_{0};
  std::atomic<bool> stop_{false};
  mutable std::mutex error_mutex_;
  std::string error_;
};

}  // namespace kt
