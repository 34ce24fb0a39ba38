// The tensors here are tiny: threads would only wait for each other. Tests of threads start their
// own.
#include <ATen/Parallel.h>

#include <gtest/gtest.h>

namespace {

class OneThread : public ::testing::Environment {
 public:
  void SetUp() override { at::set_num_threads(1); }
};

[[maybe_unused]] auto* const one_thread = ::testing::AddGlobalTestEnvironment(new OneThread);

}  // namespace
