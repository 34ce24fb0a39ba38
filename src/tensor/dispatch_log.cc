#include "tensor/dispatch_log.h"

#include <cstdlib>
#include <iostream>
#include <mutex>
#include <set>
#include <unordered_map>

#include <ATen/core/Tensor.h>

namespace quantal {
namespace {

struct Log {
  std::mutex mutex;
  std::unordered_map<c10::OperatorName, std::int64_t> counts;
  std::set<std::string> warned;
};

Log& the_log() {
  static auto* log = new Log;  // outlives every static that may still run an operation
  return *log;
}

std::string name_of(const c10::OperatorName& op) {
  return op.overload_name.empty() ? op.name : op.name + "." + op.overload_name;
}

}  // namespace

bool verbose_dispatch() {
  static const bool verbose = [] {
    const char* value = std::getenv("QUANTAL_VERBOSE");
    return value != nullptr && std::string(value).find("dispatch") != std::string::npos;
  }();
  return verbose;
}

void log_fallback(const c10::OperatorName& op, const at::Tensor& weight) {
  Log& log = the_log();
  bool warn = false;
  {
    std::lock_guard lock(log.mutex);
    ++log.counts[op];
    if (weight.defined()) warn = log.warned.insert(name_of(op)).second;
  }
  if (verbose_dispatch()) {
    std::cerr << "quantal: " << name_of(op) << " runs on dequantized values";
    if (weight.defined()) std::cerr << ", a weight of shape " << weight.sizes() << " among them";
    std::cerr << "\n";
  }
  if (warn) {
    TORCH_WARN("[quantal] ", name_of(op), " has no quantized kernel: a weight of shape ",
               weight.sizes(),
               " was dequantized for it. Shown once an operation; "
               "quantal::fallback_counts() has all, QUANTAL_VERBOSE=dispatch names each.");
  }
}

std::map<std::string, std::int64_t> logged_fallbacks() {
  Log& log = the_log();
  std::lock_guard lock(log.mutex);
  std::map<std::string, std::int64_t> counts;
  for (const auto& [op, count] : log.counts) counts[name_of(op)] = count;
  return counts;
}

void clear_logged_fallbacks() {
  Log& log = the_log();
  std::lock_guard lock(log.mutex);
  log.counts.clear();
}

}  // namespace quantal
