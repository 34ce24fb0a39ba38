#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace demo {

/// A progress bar on stderr: redrawn in a terminal, one line at the end elsewhere.
class ProgressBar {
 public:
  ProgressBar(std::string label, std::int64_t total);
  /// Ends the line.
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// `note` stands behind the bar from now on.
  void advance(std::int64_t count, std::string note = "");

 private:
  using Clock = std::chrono::steady_clock;
  void draw();

  std::string label_;
  std::string note_;
  std::int64_t total_;
  std::int64_t done_ = 0;
  bool terminal_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_;
};

}  // namespace demo
