#include "executor/moe_executor.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <optional>

#include "check.h"
#include "executor/expert_loader.h"
#include "executor/moe_layer.h"
#include "executor/token_groups.h"
#include "executor/workspace.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "numa/thread_pool.h"

namespace kt {
namespace {

// Tokens computed at once, at most. A worker's float32 sums for 32 output rows are then 512 KiB and can stay in L2, and
// an expert of DeepSeek-R1 still sees 128 tokens, two GEMM calls' worth, for each time its weights are read.
constexpr int kMaxPieceTokens = 4096;

constexpr int kMaxTopK = 1 << 16;  // with the above, slot numbers fit an int

// The stages of one call, a phase each; a call longer than a piece goes through them again.
class MoECall final : public ThreadPool::Job {
 public:
  MoECall(int max_piece_tokens, int num_workers) : max_piece_tokens_(max_piece_tokens), workspace_(num_workers) {
    piece_.groups = &groups_;
    piece_.workspace = &workspace_;
    piece_.num_workers = num_workers;
  }

  // Returns the first phase. Allocates when this layer or top_k needs more than any before. Throws kt::Error.
  int prepare(const MoELayer* layer, const MoEForwardParams& params) {
    workspace_.reserve(layer->workspace_size(max_piece_tokens_, params.top_k));
    groups_.reserve(max_piece_tokens_, params.top_k, layer->num_experts());
    layer_ = layer;
    params_ = params;
    first_token_ = 0;
    return prepare_piece();
  }

  void run(int phase, int worker) override { layer_->run(static_cast<MoEStage>(phase), piece_, next_item_, worker); }

  int next_phase(int phase) override {
    next_item_.store(0, std::memory_order_relaxed);
    if (phase != static_cast<int>(MoEStage::kDown)) return phase + 1;
    first_token_ += piece_.num_tokens;
    return first_token_ < params_.num_tokens ? prepare_piece() : ThreadPool::kDone;
  }

  uint64_t num_invalid_ids() const { return num_invalid_ids_.load(std::memory_order_relaxed); }

 private:
  int prepare_piece() {
    const int64_t row = layer_->hidden_size() * static_cast<int64_t>(float_bytes(params_.float_type));
    piece_.hidden_states = static_cast<const uint8_t*>(params_.hidden_states) + first_token_ * row;
    piece_.output = static_cast<uint8_t*>(params_.output) + first_token_ * row;
    piece_.float_type = params_.float_type;
    piece_.num_tokens = std::min(params_.num_tokens - first_token_, max_piece_tokens_);
    const int64_t first_pair = int64_t{first_token_} * params_.top_k;
    groups_.assign(params_.topk_ids + first_pair, params_.topk_weights + first_pair, piece_.num_tokens, params_.top_k,
                   layer_->num_experts());
    num_invalid_ids_.fetch_add(groups_.num_invalid_ids(), std::memory_order_relaxed);
    next_item_.store(0, std::memory_order_relaxed);
    // Nothing but padding: the last stage alone writes its zeros.
    return static_cast<int>(groups_.num_slots() == 0 ? MoEStage::kDown : MoEStage::kQuantizeInput);
  }

  const int max_piece_tokens_;
  Workspace workspace_;
  TokenGroups groups_;
  const MoELayer* layer_ = nullptr;
  MoEForwardParams params_{};
  MoEPiece piece_{};
  int first_token_ = 0;
  std::atomic<uint64_t> num_invalid_ids_{0};
  alignas(64) std::atomic<int64_t> next_item_{0};
};

std::vector<WorkerPlace> places_of(const ExecutorOptions& options) {
  std::vector<WorkerPlace> places;
  for (int cpu : options.cpus) places.push_back({cpu, -1});
  return places;
}

}  // namespace

struct MoEExecutor::Impl {
  Impl(const ExecutorOptions& options, KernelChoice chosen)
      : choice(std::move(chosen)),
        call(std::min(options.max_num_tokens, kMaxPieceTokens), static_cast<int>(options.cpus.size())),
        pool(places_of(options)) {}

  ~Impl() {
    if (loader) loader->cancel();
  }

  // True when no worker reads any more; what they read is then taken over.
  bool settle_loading() {
    if (!loading) return true;
    if (!pool.done()) return false;
    loading = false;
    pool.wait();
    if (loader->bytes_done() == loader->bytes_total())
      for (size_t i = 0; i < num_layers_to_load; ++i) layers[i].loaded = true;
    return true;
  }

  KernelChoice choice;
  std::deque<MoELayer> layers;  // addresses stay
  std::optional<ExpertLoader> loader;
  size_t num_layers_to_load = 0;  // layers below this are loaded once the loader is through
  bool loading = false;           // the pool's job is the loader
  bool in_flight = false;         // submit() without its wait() yet
  MoECall call;
  ThreadPool pool;  // last: its threads end before what they work on
};

MoEExecutor::MoEExecutor(const ExecutorOptions& options) {
  KT_CHECK(options.max_num_tokens >= 1, "max_num_tokens is ", options.max_num_tokens, ", expected at least 1");
  impl_ = std::make_unique<Impl>(options, choose_kernel_table(options.isa, detect_cpu_features()));
}

MoEExecutor::~MoEExecutor() = default;

const char* MoEExecutor::isa() const { return impl_->choice.table->isa; }
const std::string& MoEExecutor::isa_reason() const { return impl_->choice.reason; }
const std::string& MoEExecutor::placement_report() const { return impl_->pool.placement_report(); }
uint64_t MoEExecutor::num_invalid_ids() const { return impl_->call.num_invalid_ids(); }

int MoEExecutor::add_layer(const MoELayerSpec& spec) {
  const int index = static_cast<int>(impl_->layers.size());
  impl_->layers.emplace_back(spec, *impl_->choice.table, index);
  return index;
}

void MoEExecutor::start_loading() {
  Impl& my = *impl_;
  KT_CHECK(my.settle_loading(), "start_loading() is called while loading is running; wait until it is finished");
  KT_CHECK(!my.in_flight, "start_loading() is called between submit() and wait(); call wait() first");
  my.loader.emplace();
  for (MoELayer& layer : my.layers) {
    if (layer.loaded) continue;
    for (LoadedTensor* tensor : {&layer.gate, &layer.up, &layer.down}) {
      if (tensor->memory.data() == nullptr) tensor->memory = NodeMemory(tensor->bytes(), "expert weights");
      uint8_t* destination = tensor->memory.data();
      for (const FileSpan& span : tensor->spec.spans) {
        my.loader->add(span, destination);
        destination += span.bytes;
      }
    }
  }
  my.num_layers_to_load = my.layers.size();
  my.pool.start(&*my.loader, 0);
  my.loading = true;
}

LoadProgress MoEExecutor::load_progress() {
  Impl& my = *impl_;
  const bool settled = my.settle_loading();
  if (!my.loader) return {0, 0, my.layers.empty()};
  const std::string error = my.loader->error();
  KT_CHECK(error.empty(), error);
  const LoadProgress progress{my.loader->bytes_done(), my.loader->bytes_total(), settled};
  KT_CHECK(!settled || progress.bytes_done == progress.bytes_total, "loading was cancelled after ", progress.bytes_done,
           " of ", progress.bytes_total, " bytes; start_loading() begins again");
  return progress;
}

void MoEExecutor::cancel_loading() {
  Impl& my = *impl_;
  if (!my.loading) return;
  my.loader->cancel();
  my.pool.wait();
  my.settle_loading();
}

void MoEExecutor::submit(int layer, const MoEForwardParams& params) {
  Impl& my = *impl_;
  KT_CHECK(!my.in_flight, "submit() is called twice without a wait() between");
  KT_CHECK(layer >= 0 && layer < static_cast<int>(my.layers.size()), "layer is ", layer, ", expected 0 to ",
           static_cast<int>(my.layers.size()) - 1, " as add_layer() returned");
  KT_CHECK(my.settle_loading() && my.layers[layer].loaded, "layer ", layer,
           " is not loaded; call start_loading() and wait until load_progress() is finished");
  KT_CHECK(params.num_tokens >= 0, "num_tokens is ", params.num_tokens, ", expected at least 0");
  if (params.num_tokens > 0) {
    KT_CHECK(params.top_k >= 1 && params.top_k <= kMaxTopK, "top_k is ", params.top_k, ", expected 1 to ", kMaxTopK);
    KT_CHECK(params.hidden_states && params.topk_ids && params.topk_weights && params.output,
             "an address is null, expected host memory for hidden_states, topk_ids, topk_weights and output");
    const int first_phase = my.call.prepare(&my.layers[layer], params);
    my.pool.start(&my.call, first_phase);
  }
  my.in_flight = true;
}

void MoEExecutor::wait() {
  KT_CHECK(impl_->in_flight, "wait() is called without a submit() before");
  impl_->in_flight = false;
  impl_->pool.wait();
}

}  // namespace kt
