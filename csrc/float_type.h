// What hidden states and dense weights are made of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// torch.float32, torch.float16, torch.bfloat16
enum class FloatType : int32_t { F32, F16, BF16 };

inline size_t float_bytes(FloatType type) { return type == FloatType::F32 ? 4 : 2; }

}  // namespace kt
