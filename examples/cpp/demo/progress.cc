#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <utility>

namespace demo {
namespace {

constexpr int kWidth = 30;
constexpr auto kRedraw = std::chrono::milliseconds(100);

}  // namespace

ProgressBar::ProgressBar(std::string label, std::int64_t total)
    : label_(std::move(label)),
      total_(std::max<std::int64_t>(total, 1)),
      terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
  draw();
  std::cerr << std::endl;
}

void ProgressBar::advance(std::int64_t count, std::string note) {
  done_ += count;
  note_ = std::move(note);
  if (terminal_ && Clock::now() - drawn_ > kRedraw) draw();
}

void ProgressBar::draw() {
  drawn_ = Clock::now();
  const double part = std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
  const int full = static_cast<int>(part * kWidth);
  const std::chrono::duration<double> seconds = drawn_ - start_;
  std::ostringstream line;
  line << "  " << std::left << std::setw(20) << label_ << " [" << std::string(full, '#')
       << std::string(kWidth - full, '.') << "] " << std::right << std::setw(3)
       << static_cast<int>(part * 100) << " % " << std::fixed << std::setprecision(1)
       << std::setw(5) << seconds.count() << " s  " << note_;
  std::cerr << (terminal_ ? "\r\033[K" : "") << line.str() << std::flush;
}

}  // namespace demo
