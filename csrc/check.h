// One way to refuse: an exception whose text a user can act on.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kt {

// Raised for everything a caller can cause. The text says what was seen, what was expected, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace kt

// KT_CHECK(rows > 0, "rows is ", rows, ", expected at least 1")
#define KT_CHECK(condition, ...)               \
  do {                                         \
    if (!(condition)) ::kt::fail(__VA_ARGS__); \
  } while (0)
