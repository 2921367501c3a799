#include "executor/moe_executor.h"

#include <atomic>
#include <deque>
#include <optional>

#include "check.h"
#include "executor/expert_loader.h"
#include "executor/memory_report.h"
#include "executor/moe_call.h"
#include "executor/moe_layer.h"
#include "executor/prefetch_trial.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "numa/thread_pool.h"

namespace kt {
namespace {

constexpr int kMaxTopK = 1 << 16;  // with kMaxPieceTokens, slot numbers fit an int

KernelChoice choose(const ExecutorOptions& options) {
  if (options.table != nullptr) return {options.table, std::string(options.table->isa) + ": given"};
  return choose_kernel_table(options.isa, detect_cpu_features());
}

void check_top_k(int top_k) {
  KT_CHECK(top_k >= 1 && top_k <= kMaxTopK, "top_k is ", top_k, ", expected 1 to ", kMaxTopK);
}

}  // namespace

struct MoEExecutor::Impl {
  Impl(const ExecutorOptions& options, KernelChoice chosen)
      : choice(std::move(chosen)),
        pool(std::in_place, options.workers, ParkPolicy{}, options.spin_ns,
             options.caller_works ? ThreadPool::Caller::kWorks : ThreadPool::Caller::kWaits),
        call(options.max_num_tokens, *pool) {}

  ~Impl() {
    if (loader) loader->cancel();
    pool.reset();  // its threads end before what they work on
  }

  void check_index(int layer) const {
    KT_CHECK(layer >= 0 && layer < static_cast<int>(layers.size()), "layer is ", layer, ", expected 0 to ",
             static_cast<int>(layers.size()) - 1, " as add_layer() returned");
  }

  // True when no worker reads any more; what they read is then taken over.
  bool settle_loading() {
    if (!loading) return true;
    if (!pool->done()) return false;
    loading = false;
    pool->wait();
    if (loader->bytes_done() == loader->bytes_total())
      for (size_t i = 0; i < num_layers_to_load; ++i) layers[i].loaded = true;
    return true;
  }

  KernelChoice choice;
  std::optional<ThreadPool> pool;
  std::deque<MoELayer> layers;  // addresses stay
  std::optional<ExpertLoader> loader;
  size_t num_layers_to_load = 0;  // layers below this are loaded once the loader is through
  bool loading = false;           // the pool's job is the loader
  bool in_flight = false;         // submit() without its wait() yet
  int last_layer = -1;            // of submit()
  std::atomic<int> first_layer_with_invalid_ids{-1};
  MoECall call;
};

MoEExecutor::MoEExecutor(const ExecutorOptions& options) {
  KT_CHECK(options.max_num_tokens >= 1, "max_num_tokens is ", options.max_num_tokens, ", expected at least 1");
  impl_ = std::make_unique<Impl>(options, choose(options));
}

MoEExecutor::~MoEExecutor() = default;

const char* MoEExecutor::isa() const { return impl_->choice.table->isa; }
const std::string& MoEExecutor::isa_reason() const { return impl_->choice.reason; }
const std::string& MoEExecutor::placement_report() const { return impl_->pool->placement_report(); }
uint64_t MoEExecutor::num_invalid_ids() const { return impl_->call.num_invalid_ids(); }
int MoEExecutor::first_layer_with_invalid_ids() const {
  return impl_->first_layer_with_invalid_ids.load(std::memory_order_relaxed);
}
uint64_t MoEExecutor::num_parks() const { return impl_->pool->num_parks(); }

std::string MoEExecutor::memory_report() const {
  std::vector<ReportedMemory> parts;
  for (const MoELayer& layer : impl_->layers)
    for (const ExpertWeights* weights : {&layer.gate(), &layer.up(), &layer.down()})
      for (size_t slice = 0; slice < weights->memory().size(); ++slice)
        parts.push_back({&weights->memory()[slice], impl_->pool->numa_node(static_cast<int>(slice))});
  return describe_memory(parts);
}

size_t MoEExecutor::workspace_bytes(int top_k, int layer) const {
  impl_->check_index(layer);
  check_top_k(top_k);
  return impl_->call.workspace_bytes(impl_->layers[layer], top_k);
}

int MoEExecutor::add_layer(const MoELayerSpec& spec) {
  const int index = static_cast<int>(impl_->layers.size());
  impl_->layers.emplace_back(spec, *impl_->choice.table, *impl_->pool, index);
  return index;
}

void MoEExecutor::start_loading() {
  Impl& my = *impl_;
  KT_CHECK(my.settle_loading(), "start_loading() is called while loading is running; wait until it is finished");
  KT_CHECK(!my.in_flight, "start_loading() is called between submit() and wait(); call wait() first");
  my.loader.emplace(*my.pool);
  for (MoELayer& layer : my.layers)
    if (!layer.loaded) layer.prepare_loading(*my.loader);
  my.num_layers_to_load = my.layers.size();
  my.pool->start(&*my.loader, 0);
  my.loading = true;
}

LoadProgress MoEExecutor::load_progress() {
  Impl& my = *impl_;
  const bool settled = my.settle_loading();
  if (!my.loader) return {0, 0, my.layers.empty()};
  const std::string error = my.loader->error();
  // Only once no worker reads any more: whoever sees the error may begin again at once.
  KT_CHECK(!settled || error.empty(), error);
  const LoadProgress progress{my.loader->bytes_done(), my.loader->bytes_total(), settled};
  KT_CHECK(!settled || progress.bytes_done == progress.bytes_total, "loading was cancelled after ", progress.bytes_done,
           " of ", progress.bytes_total, " bytes; start_loading() begins again");
  return progress;
}

void MoEExecutor::cancel_loading() {
  Impl& my = *impl_;
  if (!my.loading) return;
  my.loader->cancel();
  my.pool->wait();
  my.settle_loading();
}

std::string MoEExecutor::choose_prefetch(int top_k) {
  Impl& my = *impl_;
  check_top_k(top_k);
  std::vector<TrialLayer> layers;
  size_t bytes = 0;
  for (const MoELayer& layer : my.layers) {
    layers.push_back({layer.hidden_size(), layer.num_experts()});
    for (const ExpertWeights* weights : {&layer.gate(), &layer.up(), &layer.down()})
      bytes += weights->row_bytes() * weights->num_rows() * layer.num_experts();
  }
  if (bytes < kLeastTrialBytes) return "weights are prefetched far ahead: there are too few to time it";
  SingleTokens calls(*this, layers, top_k);
  const PrefetchChoice choice = faster_prefetch([&](Prefetch way) {
    my.call.set_prefetch(way);
    return calls.seconds();
  });
  my.call.set_prefetch(choice.prefetch);
  return choice.reason;
}

void MoEExecutor::submit(int layer, const MoEForwardParams& params) {
  Impl& my = *impl_;
  KT_CHECK(!my.in_flight, "submit() is called twice without a wait() between");
  my.check_index(layer);
  KT_CHECK(my.settle_loading() && my.layers[layer].loaded, "layer ", layer,
           " is not loaded; call start_loading() and wait until load_progress() is finished");
  KT_CHECK(params.num_tokens >= 0, "num_tokens is ", params.num_tokens, ", expected at least 0");
  if (params.num_tokens > 0) {
    check_top_k(params.top_k);
    KT_CHECK(params.hidden_states && params.topk_ids && params.topk_weights && params.output,
             "an address is null, expected host memory for hidden_states, topk_ids, topk_weights and output");
    const int first_phase = my.call.prepare(&my.layers[layer], params);
    my.pool->start(&my.call, first_phase);
  }
  my.last_layer = layer;
  my.in_flight = true;
}

void MoEExecutor::wait() {
  KT_CHECK(impl_->in_flight, "wait() is called without a submit() before");
  impl_->in_flight = false;
  if (impl_->pool->caller_works())
    impl_->pool->work_until_done();
  else
    impl_->pool->wait();
  if (impl_->call.num_invalid_ids() != 0 && first_layer_with_invalid_ids() < 0)
    impl_->first_layer_with_invalid_ids.store(impl_->last_layer, std::memory_order_relaxed);
}

bool MoEExecutor::adopt_calling_thread() {
  if (!impl_->pool->caller_works()) return false;
  impl_->pool->adopt_calling_thread();
  return true;
}

}  // namespace kt
