// Which way of prefetching weights is faster here.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "executor/moe_executor.h"

namespace kt {

// Of fewer weights, caches would be timed.
inline constexpr size_t kLeastTrialBytes = size_t{512} << 20;

struct TrialLayer {
  int hidden_size;
  int num_experts;
};

// Calls of one token. Each goes to the experts that follow those of the last, through all layers, so that it reads
// weights from memory.
class SingleTokens {
 public:
  // layers: those of the executor, all loaded
  SingleTokens(MoEExecutor& executor, const std::vector<TrialLayer>& layers, int top_k);

  double seconds();  // of the next call. Throws kt::Error.

 private:
  MoEExecutor& executor_;
  std::vector<TrialLayer> layers_;
  std::vector<float> hidden_states_, output_, weights_;
  std::vector<int32_t> ids_;
  int layer_ = 0, expert_ = 0;
};

struct PrefetchChoice {
  Prefetch prefetch = Prefetch::kFar;
  std::string reason;
};

// seconds: of a call with that way, each time another.
PrefetchChoice faster_prefetch(const std::function<double(Prefetch)>& seconds);

}  // namespace kt
