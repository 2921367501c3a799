// A test is TEST(name) { ... }; main() is here too. CHECK counts, prints what failed, and lets the test go on.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace kt::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct State {
  uint64_t seed = 0;
  int64_t num_checks = 0;
  int64_t num_failures = 0;
};

inline State& state() {
  static State s;
  return s;
}

// Random numbers of the running test; each test starts from the run's seed.
inline std::mt19937_64& rng() {
  static std::mt19937_64 generator;
  return generator;
}

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng()); }
inline float random_normal() { return std::normal_distribution<float>()(rng()); }

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

constexpr int64_t kMaxPrinted = 20;  // failures printed a program

inline bool check(bool ok, const char* file, int line, const std::string& text) {
  ++state().num_checks;
  if (ok) return true;
  if (++state().num_failures <= kMaxPrinted) std::cerr << file << ":" << line << ": " << text << "\n";
  return false;
}

// Keeps the worst |got - want| / limit of many comparisons, and where it was.
class Worst {
 public:
  // limit: the largest difference allowed, > 0. NaN equals NaN and an infinity itself; neither equals anything else.
  void compare(double got, double want, double limit, int64_t position) {
    ++count_;
    double ratio;
    if (got != got || want != want)
      ratio = (got != got) == (want != want) ? 0 : kNever;
    else if (got == want)
      ratio = 0;
    else
      ratio = (got > want ? got - want : want - got) / limit;
    if (!(ratio <= ratio_)) *this = Worst(ratio, got, want, limit, position, count_);
  }

  bool ok() const { return ratio_ <= 1; }
  double ratio() const { return ratio_; }

  std::string text() const {
    std::ostringstream out;
    out.precision(9);
    out << "worst of " << count_ << " at position " << position_ << ": got " << got_ << ", want " << want_ << " +- "
        << limit_ << " (" << ratio_ << " of the limit)";
    return out.str();
  }

  Worst() = default;

 private:
  static constexpr double kNever = 1e300;
  Worst(double ratio, double got, double want, double limit, int64_t position, int64_t count)
      : ratio_(ratio), got_(got), want_(want), limit_(limit), position_(position), count_(count) {}

  double ratio_ = 0, got_ = 0, want_ = 0, limit_ = 1;
  int64_t position_ = -1, count_ = 0;
};

// Usage: program [seed] [part of a test's name]. Without a seed, or with 0, a fresh one is drawn.
inline int run_all(int argc, char** argv) {
  state().seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  if (state().seed == 0) state().seed = std::random_device{}() | 1u;
  const std::string filter = argc > 2 ? argv[2] : "";
  int num_run = 0, num_failed = 0;
  for (const Case& test : cases()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    const int64_t failures_before = state().num_failures;
    rng().seed(state().seed);
    try {
      test.run();
    } catch (const std::exception& error) {
      check(false, test.name, 0, std::string("uncaught: ") + error.what());
    }
    ++num_run;
    const int64_t failures = state().num_failures - failures_before;
    if (failures == 0) continue;
    ++num_failed;
    std::cerr << "FAILED " << test.name << ": " << failures << " checks; again with: " << argv[0] << " " << state().seed
              << " " << test.name << "\n";
  }
  std::cout << num_run - num_failed << " of " << num_run << " tests passed, " << state().num_checks << " checks, seed "
            << state().seed << "\n";
  return num_failed == 0 && num_run > 0 ? 0 : 1;
}

}  // namespace kt::test

#define TEST(name)                                                       \
  static void test_##name();                                             \
  static const ::kt::test::Register register_##name(#name, test_##name); \
  static void test_##name()

// CHECK(a == b, "a is " << a)
#define CHECK(condition, message)                                                                 \
  do {                                                                                            \
    std::ostringstream check_text;                                                                \
    const bool check_ok = static_cast<bool>(condition);                                           \
    if (!check_ok) check_text << #condition << ": " << message;                                   \
    ::kt::test::check(check_ok, __FILE__, __LINE__, check_ok ? std::string() : check_text.str()); \
  } while (0)

// The worst of a Worst is within its limit.
#define CHECK_WORST(worst, message) CHECK((worst).ok(), message << ": " << (worst).text())

// The statement throws kt::Error whose text contains each of the given parts.
#define CHECK_ERROR(statement, ...)                                                                        \
  do {                                                                                                     \
    std::string error_text = "nothing thrown";                                                             \
    try {                                                                                                  \
      statement;                                                                                           \
    } catch (const ::kt::Error& error) {                                                                   \
      error_text = error.what();                                                                           \
    }                                                                                                      \
    for (const char* part : {__VA_ARGS__})                                                                 \
      CHECK(error_text.find(part) != std::string::npos, "'" << part << "' not in '" << error_text << "'"); \
  } while (0)

int main(int argc, char** argv) { return ::kt::test::run_all(argc, argv); }
