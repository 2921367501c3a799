// Reads expert weights from files into memory, as the kernels want them, with all workers of a pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "executor/row_range.h"
#include "moe_params.h"
#include "numa/thread_pool.h"

namespace kt {

// add() everything, then start it as a job of the pool. Each byte is read once, and each page of the destination is
// first touched by a worker of the group it is for. Counters may be read by any thread while the job runs.
class ExpertLoader : public ThreadPool::Job {
 public:
  explicit ExpertLoader(const ThreadPool& pool) : pool_(pool), queues_(pool.num_nodes()) {}
  ~ExpertLoader();  // closes the files; the job must be over
  ExpertLoader(const ExpertLoader&) = delete;
  ExpertLoader& operator=(const ExpertLoader&) = delete;

  // The given rows of every expert, read by the workers of `group`. Opens files unless they are open.
  // panel_rows 1: rows as they are in the file; otherwise panels as pack_panel() makes them, an expert's last one
  // padded when its rows are no whole number of panels. destination: the experts one after another, not owned. Throws
  // kt::Error.
  void add(const ExpertTensor& tensor, RowRange rows, int panel_rows, int group, uint8_t* destination);

  void cancel() { stop_.store(true, std::memory_order_relaxed); }

  uint64_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }  // of the files
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
  struct Span {
    size_t file;      // in files_
    uint64_t offset;  // in the file
    uint64_t begin;   // of its bytes among the tensor's
    uint64_t bytes;
  };
  struct Slice {
    GgmlType type;
    int k;
    size_t row_bytes;
    int num_rows;  // of an expert in the file
    RowRange rows;
    int panel_rows;
    size_t panels;  // of an expert
    uint8_t* destination;
    std::vector<Span> spans;
  };
  struct Chunk {
    const Slice* slice;
    size_t first_panel, end_panel;  // counted through all experts
  };
  struct Queue {
    std::vector<Chunk> chunks;
    alignas(64) std::atomic<size_t> next{0};
  };
  class Staging;

  size_t open_file(const std::string& path);
  void load(const Chunk& chunk, Staging& staging);
  bool pack(const Slice& slice, uint64_t first_row, int num_rows, uint8_t* destination, Staging& staging);
  bool read_rows(const Slice& slice, uint64_t first_row, uint64_t num_rows, uint8_t* destination);
  bool read(const File& file, uint64_t offset, uint64_t bytes, uint8_t* destination);
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }
  void set_error(const std::string& text);

  const ThreadPool& pool_;
  std::vector<File> files_;
  std::map<std::string, size_t> file_of_path_;
  std::vector<std::unique_ptr<Slice>> slices_;
  std::vector<Queue> queues_;  // one a group
  uint64_t bytes_total_ = 0;
  std::atomic<uint64_t> bytes_done_{0};
  std::atomic<bool> stop_{false};
  mutable std::mutex error_mutex_;
  std::string error_;
};

}  // namespace kt
