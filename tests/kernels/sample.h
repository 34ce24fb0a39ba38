#pragma once

#include <cstdlib>

namespace quantal::kernels {

/// Every case of a test, or every n-th where QUANTAL_TEST_SAMPLE is n: an emulated processor takes
/// some ten times as long. A prime n that divides no number of values of a parameter still meets
/// every value of each.
class Sample {
 public:
  bool takes_next() { return next_++ % step() == 0; }

 private:
  static int step() {
    const char* value = std::getenv("QUANTAL_TEST_SAMPLE");
    return value != nullptr && std::atoi(value) > 0 ? std::atoi(value) : 1;
  }
  int next_ = 0;
};

}  // namespace quantal::kernels
