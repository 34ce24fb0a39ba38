#pragma once

#include <cstdint>
#include <map>
#include <string>

#include <ATen/core/dispatch/Dispatcher.h>

namespace quantal {

/// Counts an operation that ran on dequantized values. `weight`: the frozen weight that was
/// dequantized whole for it, or undefined: warned of once an operation.
/// QUANTAL_VERBOSE=dispatch writes every one to stderr.
void log_fallback(const c10::OperatorName& op, const at::Tensor& weight);

/// True where QUANTAL_VERBOSE names "dispatch".
bool verbose_dispatch();

std::map<std::string, std::int64_t> logged_fallbacks();
void clear_logged_fallbacks();

}  // namespace quantal
