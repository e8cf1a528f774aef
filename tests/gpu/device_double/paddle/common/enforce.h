// As much of Paddle's header as custom_ops/paddle_op.h needs.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace common {

struct ErrorMessage {
  template <class... Args>
  explicit ErrorMessage(const Args&... args) {
    (words << ... << args);
  }
  std::string to_string() const { return words.str(); }
  std::ostringstream words;
};

namespace errors {
inline std::invalid_argument InvalidArgument(const char*, const std::string& words) {
  return std::invalid_argument(words);
}
}  // namespace errors

}  // namespace common

#define PADDLE_THROW(error) throw error
