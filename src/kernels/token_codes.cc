#include "kernels/token_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/activation_codes.h"
#include "kernels/conv_patches.h"

namespace quantal::kernels {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Not a multiple of 4096, where tokens would compete for the same lines of the cache.
std::int64_t stride_for(std::int64_t columns) {
  return ceil_div(columns, 64) * 64 + TokenCodes::kSlack;
}

}  // namespace

TokenCodes::TokenCodes(const PackedLayout& layout, std::int64_t tokens)
    : tokens_(tokens),
      stride_(stride_for(layout.padded_columns())),
      blocks_per_group_(std::max<std::int64_t>(
          1, ceil_div(layout.group_lines(0) * layout.depth(), kBlockColumns))),
      blocks_(layout.groups() * blocks_per_group_),
      codes_(ceil_div(tokens * stride_, 4)),
      sums_(tokens * blocks_),
      scales_(tokens) {}

TokenCodes::~TokenCodes() = default;

std::int32_t sum_codes__portable(const std::int8_t* codes, std::int64_t count) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += codes[i];
  return sum;
}

void TokenCodes::finish(const PackedLayout& layout, std::int64_t token, SumCodes sum_codes) const {
  std::int8_t* out = codes(token);
  std::int32_t* sum = sums(token);
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    std::int8_t* from = out + layout.padded_begin(group);
    const std::int64_t columns = layout.group_columns(group);
    std::memset(from + columns, 0, layout.group_lines(group) * layout.depth() - columns);
    for (std::int64_t block = 0; block < blocks_per_group_; ++block) {
      const std::int64_t begin = std::min(columns, block * kBlockColumns);
      const std::int64_t end = std::min(columns, begin + kBlockColumns);
      *sum++ = sum_codes(from + begin, end - begin);
    }
  }
}

void copy_tokens(const PackedLayout& layout, const TokenSource& source, std::int64_t begin,
                 std::int64_t end, const TokenCodes& out, SumCodes sum) {
  if (source.patches != nullptr) {
    source.patches->write(layout, begin, end, out);
  } else {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t group = 0; group < layout.groups(); ++group) {
        std::memcpy(out.codes(t) + layout.padded_begin(group),
                    source.codes + t * source.stride + layout.group_begin(group),
                    layout.group_columns(group));
      }
    }
  }
  for (std::int64_t t = begin; t < end; ++t) {
    out.scale(t) = source.scale;
    out.finish(layout, t, sum);
  }
}

void quantize_tokens(const PackedLayout& layout, const TokenSource& source, std::int64_t begin,
                     std::int64_t end, const TokenCodes& out, const TokenFunctions& functions) {
  if (source.has_codes()) return copy_tokens(layout, source, begin, end, out, functions.sum);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t from = t * source.stride;
    const float scale =
        scale_for(functions.magnitude(source.x, source.type, from, from + layout.spec().columns));
    out.scale(t) = scale;
    for (std::int64_t group = 0; group < layout.groups(); ++group) {
      std::int8_t* codes = out.codes(t) + layout.padded_begin(group);
      const std::int64_t columns = layout.group_columns(group);
      const std::int64_t first = from + layout.group_begin(group);
      if (std::isnan(scale)) {
        std::memset(codes, 0, columns);
      } else {
        functions.quantize(source.x, source.type, first, first + columns, scale, codes - first);
      }
    }
    out.finish(layout, t, functions.sum);
  }
}

void quantize_tokens__portable(const PackedLayout& layout, const TokenSource& source,
                               std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out,
                  {max_magnitude__portable, quantize_codes__portable, sum_codes__portable});
}

}  // namespace quantal::kernels
