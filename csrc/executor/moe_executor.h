// The routed experts of every layer of this process, one set of worker threads, one call in flight.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"
#include "moe_params.h"
#include "numa/thread_pool.h"

namespace kt {

struct ExecutorOptions {
  std::string isa = "auto";  // "auto" or the name of a kernel table
  // One worker thread an entry, pinned to that logical CPU; an entry may repeat. Weights are shared out to the memory
  // nodes in proportion to their workers.
  std::vector<WorkerPlace> workers;
  int max_num_tokens = 0;              // workspace is sized for this; longer calls are cut into pieces of it
  const KernelTable* table = nullptr;  // instead of what isa names; must outlive the executor
  int64_t spin_ns = kSpinNanoseconds;  // for how long idle workers spin before they sleep
  bool caller_works = false;           // the last of workers is the thread that calls submit() and wait()
};

struct LoadProgress {
  uint64_t bytes_done;
  uint64_t bytes_total;
  bool finished;
};

// Threads: one caller at a time (the thread that runs the model), but where it says any. No method needs the GIL.
class MoEExecutor {
 public:
  explicit MoEExecutor(const ExecutorOptions& options);
  ~MoEExecutor();  // cancels loading, waits for a call in flight, joins the workers

  const char* isa() const;
  const std::string& isa_reason() const;
  const std::string& placement_report() const;  // one line: which CPUs the workers are pinned to, and why not where not

  // Checks shapes, types and file sizes; reads nothing yet. Returns the layer's index. Throws kt::Error.
  int add_layer(const MoELayerSpec& spec);

  // Reads all layers not loaded yet with all worker threads, each byte once, into its final place.
  // Returns at once; load_progress() throws the first error, also that loading was cancelled. cancel_loading() returns
  // when no worker reads any more. After an error or a cancel start_loading() begins again.
  void start_loading();
  LoadProgress load_progress();
  void cancel_loading();

  // Times 36 calls of one token on the loaded weights, half with each way of prefetching, and keeps the faster one.
  // Results do not depend on it. Returns a line about it.
  std::string choose_prefetch(int top_k);

  // One line: how much memory the weights take, how much of it in huge pages, on which nodes.
  std::string memory_report() const;

  // What calls of this layer take beside the weights, with up to top_k experts a token: scratch of all workers, which
  // all layers share. The largest of the layers is what the executor takes.
  size_t workspace_bytes(int top_k, int layer) const;

  // submit() returns once the work is handed to the workers; wait() returns when output is complete.
  // Exactly one wait() after each submit().
  void submit(int layer, const MoEForwardParams& params);
  void wait();

  // With caller_works, once, by the thread that will call submit() and wait(): pins it. False without.
  bool adopt_calling_thread();

  // Expert ids outside [0, num_experts) other than -1 seen so far: the router gave garbage, usually after a NaN. Of
  // which layer the first of them was, -1 where there was none, is known once its call is waited for. Any thread.
  uint64_t num_invalid_ids() const;
  int first_layer_with_invalid_ids() const;
  // How often a worker was left out for a while because others took its CPU.
  uint64_t num_parks() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kt
