// Every table: SiLU, the weighted sum, and conversions of float types.
#include "random_data.h"
#include "tolerances.h"

namespace kt::test {
namespace {

void check_silu(const KernelTable& table, const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<float> out(gate.size());
  table.silu_mul(gate.data(), up.data(), out.data(), static_cast<int>(gate.size()));
  Worst worst;
  for (size_t i = 0; i < gate.size(); ++i) {
    const double g = gate[i], want = g / (1 + std::exp(-g)) * up[i];
    const double limit = g < kSiluUnderflow ? kSiluTiny : std::fabs(want) * kSiluError + 0x1p-148;
    worst.compare(out[i], want, limit, static_cast<int64_t>(i));
  }
  CHECK_WORST(worst, table.isa << " silu_mul");
}

TEST(silu_is_accurate_everywhere) {
  for (const KernelTable* table : runnable_tables()) {
    for (float scale : {1e-6f, 0.1f, 1.0f, 5.0f, 30.0f}) {
      auto gate = random_floats(20000, scale);
      for (float& g : gate) g = std::fmin(std::fmax(g, -200.0f), 200.0f);
      check_silu(*table, gate, random_floats(gate.size()));
    }
    // Every exponent, both signs, every 2^9th mantissa.
    std::vector<float> gate;
    for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 0x4000 + 0x1fff * (rng()() & 1))
      if (std::isfinite(bits_to_float(static_cast<uint32_t>(bits))))
        gate.push_back(bits_to_float(static_cast<uint32_t>(bits)));
    check_silu(*table, gate, std::vector<float>(gate.size(), 1.0f));
  }
}

TEST(silu_at_the_ends) {
  for (const KernelTable* table : runnable_tables()) {
    const float gate[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -1e30f, 1e30f, 1.0f, INFINITY};
    const float up[] = {2.0f, 2.0f, 2.0f, 2.0f, 2.0f, 2.0f, 2.0f, NAN, 0.0f};
    // silu(-infinity) is -infinity / infinity: NaN, as in torch; whatever made it was broken already.
    const double want[] = {0, 0, INFINITY, NAN, NAN, 0, 2e30, NAN, NAN};
    float out[9];
    table->silu_mul(gate, up, out, 9);
    Worst worst;
    for (int i = 0; i < 9; ++i) worst.compare(out[i], want[i], std::fabs(want[i]) * kSiluError + 1e-300, i);
    CHECK_WORST(worst, table->isa);
  }
}

// Lengths with tails: nothing is written past the end, and no value depends on where a row was cut.
TEST(tails) {
  for (const KernelTable* table : runnable_tables()) {
    const int n = 67;
    const auto x = random_floats(n), up = random_floats(n), y = random_floats(n);
    auto silu_whole = x, sum_whole = y;
    table->silu_mul(x.data(), up.data(), silu_whole.data(), n);
    table->add_scaled(0.3f, x.data(), sum_whole.data(), n);
    for (int cut = 0; cut <= n; ++cut) {
      auto silu = x, sum = y;
      table->silu_mul(silu.data(), up.data(), silu.data(), cut);  // in place
      table->add_scaled(0.3f, x.data(), sum.data(), cut);
      for (int i = cut; i < n; ++i) CHECK(silu[i] == x[i] && sum[i] == y[i], table->isa << " wrote past " << cut);
      table->silu_mul(silu.data() + cut, up.data() + cut, silu.data() + cut, n - cut);
      table->add_scaled(0.3f, x.data() + cut, sum.data() + cut, n - cut);
      CHECK(silu == silu_whole && sum == sum_whole, table->isa << " cut at " << cut);
    }
  }
}

TEST(weighted_sum) {
  for (const KernelTable* table : runnable_tables()) {
    const int n = 4099;
    const float a = random_normal();
    const auto x = random_floats(n), y = random_floats(n);
    auto out = y;
    table->add_scaled(a, x.data(), out.data(), n);
    Worst worst;
    for (int i = 0; i < n; ++i) {
      const double product = static_cast<double>(a) * x[i];
      // One or two roundings: of the product, of the sum.
      worst.compare(out[i], product + y[i], (2 * std::fabs(product) + std::fabs(y[i])) * kUnit, i);
    }
    CHECK_WORST(worst, table->isa);
  }
}

bool is_nan_16(uint16_t bits, FloatType type) {
  return std::isnan(type == FloatType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits));
}

TEST(all_16_bit_patterns_load_and_come_back) {
  for (const KernelTable* table : runnable_tables()) {
    for (FloatType type : {FloatType::F16, FloatType::BF16}) {
      const int n = 65536 + 5;  // a tail too
      std::vector<uint16_t> bits(n), back(n);
      for (int i = 0; i < n; ++i) bits[i] = static_cast<uint16_t>(i);
      std::vector<float> values(n);
      table->load_floats(bits.data(), type, values.data(), n);
      table->store_floats(values.data(), type, back.data(), n);
      for (int i = 0; i < n; ++i) {
        const float want = type == FloatType::F16 ? f16_to_f32(bits[i]) : bf16_to_f32(bits[i]);
        if (is_nan_16(bits[i], type))
          CHECK(std::isnan(values[i]) && is_nan_16(back[i], type), table->isa << " NaN " << bits[i]);
        else
          CHECK(float_to_bits(values[i]) == float_to_bits(want) && back[i] == bits[i], table->isa << " " << bits[i]);
      }
    }
  }
}

TEST(stores_round_to_nearest_even) {
  for (const KernelTable* table : runnable_tables()) {
    for (FloatType type : {FloatType::F16, FloatType::BF16}) {
      std::vector<float> values;
      for (int i = 0; i < 200000; ++i) values.push_back(bits_to_float(static_cast<uint32_t>(rng()())));
      // Half way between neighbours, and one bit to either side.
      for (uint32_t i = 0; i < 0x7c00; ++i) {
        const uint32_t middle =
            type == FloatType::BF16
                ? (i << 16) + 0x8000
                : float_to_bits((f16_to_f32(static_cast<uint16_t>(i)) + f16_to_f32(static_cast<uint16_t>(i + 1))) / 2);
        for (uint32_t bits : {middle - 1, middle, middle + 1}) values.push_back(bits_to_float(bits));
      }
      const int n = static_cast<int>(values.size());
      std::vector<uint16_t> got(values.size() + 1);
      auto* unaligned = reinterpret_cast<uint8_t*>(got.data()) + 1;
      table->store_floats(values.data(), type, unaligned, n);
      for (int i = 0; i < n; ++i) {
        const uint16_t stored = load_u16(unaligned + 2 * i);
        const uint16_t want = type == FloatType::F16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
        CHECK(std::isnan(values[i]) ? is_nan_16(stored, type) : stored == want,
              table->isa << " " << values[i] << " gave " << stored << " want " << want);
      }
    }
  }
}

TEST(float32_is_copied) {
  for (const KernelTable* table : runnable_tables()) {
    const auto x = random_floats(37);
    std::vector<float> loaded(38, kUntouched), stored(38, kUntouched);
    table->load_floats(x.data(), FloatType::F32, loaded.data(), 37);
    table->store_floats(x.data(), FloatType::F32, stored.data(), 37);
    CHECK(std::equal(x.begin(), x.end(), loaded.begin()) && loaded[37] == kUntouched, table->isa);
    CHECK(std::equal(x.begin(), x.end(), stored.begin()) && stored[37] == kUntouched, table->isa);
    table->load_floats(nullptr, FloatType::F32, nullptr, 0);
    table->store_floats(nullptr, FloatType::BF16, nullptr, 0);
  }
}

// The scalar rounding every table is held to, against the definition: the nearest of two neighbours, ties to even.
TEST(scalar_float16_rounding_is_right) {
  for (uint32_t i = 0; i < 0x7bff; ++i) {
    const float low = f16_to_f32(static_cast<uint16_t>(i)), high = f16_to_f32(static_cast<uint16_t>(i + 1));
    const float middle = (low + high) / 2;  // exact: 11 bits and one more
    CHECK(f32_to_f16(middle) == (i % 2 ? i + 1 : i), i);
    CHECK(f32_to_f16(std::nextafter(middle, 0.0f)) == i && f32_to_f16(std::nextafter(middle, high)) == i + 1, i);
  }
}

}  // namespace
}  // namespace kt::test
