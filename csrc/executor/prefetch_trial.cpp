#include "executor/prefetch_trial.h"

#include <algorithm>
#include <chrono>
#include <sstream>

namespace kt {
namespace {

constexpr int kRounds = 15;
constexpr int kWarmUp = 3;
// What timing varies by: less is no reason to leave what was measured on more machines.
constexpr double kWorthIt = 0.97;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

SingleTokens::SingleTokens(MoEExecutor& executor, const std::vector<TrialLayer>& layers, int top_k)
    : executor_(executor), layers_(layers), weights_(top_k, 1.0f), ids_(top_k) {
  int most = 0;
  for (const TrialLayer& layer : layers) most = std::max(most, layer.hidden_size);
  hidden_states_.resize(most, 1.0f);
  output_.resize(most);
}

double SingleTokens::seconds() {
  for (int32_t& id : ids_) id = expert_ == layers_[layer_].num_experts ? -1 : expert_++;
  const auto begin = std::chrono::steady_clock::now();
  executor_.submit(layer_, {.hidden_states = hidden_states_.data(),
                            .topk_ids = ids_.data(),
                            .topk_weights = weights_.data(),
                            .output = output_.data(),
                            .float_type = FloatType::F32,
                            .num_tokens = 1,
                            .top_k = static_cast<int>(ids_.size())});
  executor_.wait();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  if (expert_ == layers_[layer_].num_experts) expert_ = 0, layer_ = (layer_ + 1) % static_cast<int>(layers_.size());
  return taken.count();
}

PrefetchChoice faster_prefetch(const std::function<double(Prefetch)>& seconds) {
  std::vector<double> taken[2];
  for (int round = 0; round < kWarmUp + kRounds; ++round) {
    for (const Prefetch way : {Prefetch::kFar, Prefetch::kNear}) {
      const double one = seconds(way);
      if (round >= kWarmUp) taken[static_cast<int>(way)].push_back(one);
    }
  }
  const double far = median(taken[0]), near = median(taken[1]);
  const bool is_near = near < kWorthIt * far;
  std::ostringstream text;
  text.precision(3);
  text << "weights are prefetched " << (is_near ? "just" : "far") << " ahead (a token takes " << far * 1e3
       << " ms a layer far ahead, " << near * 1e3 << " ms just ahead)";
  return {is_near ? Prefetch::kNear : Prefetch::kFar, text.str()};
}

}  // namespace kt
