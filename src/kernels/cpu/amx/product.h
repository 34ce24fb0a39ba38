#pragma once

// Included by this folder's files only, below their target pragma: the loops of every linear of
// this folder.

#include "kernels/cpu/amx/panels.h"
#include "kernels/cpu/amx/streams.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kMostStripTokens = 512;           ///< that are multiplied at once
constexpr std::int64_t kStreamTokens = 2 * kTileTokens;  ///< that streams take

/// Calls body(first, count) for tokens [0, tokens) in parts of about the same size.
template <typename Body>
void for_strips(std::int64_t tokens, const Body& body) {
  const std::int64_t strips = (tokens + kMostStripTokens - 1) / kMostStripTokens;
  for (std::int64_t i = 0; i < strips; ++i) {
    const std::int64_t first = tokens * i / strips;
    body(first, tokens * (i + 1) / strips - first);
  }
}

/// At most kMostStripTokens.
template <typename Product, int parts, typename Source>
void multiply(const TileJob& job, const Source& source, const ParallelFor& parallel_for) {
  if constexpr (!kIsScaled<typename Source::Line>) {
    if (job.tokens <= kTileTokens) return few_tokens<Product, parts, 1>(job, source, parallel_for);
    if (job.tokens <= kStreamTokens)
      return few_tokens<Product, parts, 2>(job, source, parallel_for);
  }
  many_tokens<Product, parts>(job, source, parallel_for);
}

}  // namespace
}  // namespace quantal::kernels
