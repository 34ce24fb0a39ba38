#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/activation_codes.h"
#include "kernels/packed_layout.h"
#include "kernels/scratch.h"

/// int8 activations of a linear.
namespace quantal::kernels {

struct CodePatches;

/// Columns whose products of codes an int32 always holds: 2^15 · 255 · 127 < 2^31. Groups are
/// summed in blocks of so many columns.
constexpr std::int64_t kBlockColumns = 1 << 15;

/// Σ of `count` codes, of which there are at most kBlockColumns.
using SumCodes = std::int32_t (*)(const std::int8_t* codes, std::int64_t count);
std::int32_t sum_codes__portable(const std::int8_t* codes, std::int64_t count);
std::int32_t sum_codes__avx2(const std::int8_t* codes, std::int64_t count);

/// Tokens as int8 codes and one scale each, laid out for a weight: every group of columns is padded
/// with zeros to whole lines. value = scale · code.
class TokenCodes {
 public:
  /// Bytes behind the columns of a token that may be written before finish().
  static constexpr std::int64_t kSlack = 64;

  TokenCodes(const PackedLayout& layout, std::int64_t tokens);
  // Not inline: it would be compiled for whatever instructions the file that uses it is.
  ~TokenCodes();
  TokenCodes(const TokenCodes&) = delete;
  TokenCodes& operator=(const TokenCodes&) = delete;

  std::int64_t tokens() const { return tokens_; }
  std::int8_t* codes(std::int64_t token) const {
    return reinterpret_cast<std::int8_t*>(codes_.data()) + token * stride_;
  }
  /// Elements from one token to the next.
  std::int64_t stride() const { return stride_; }
  /// The scale of a token. NaN: the token had a NaN or infinity, and so has every output.
  float& scale(std::int64_t token) const { return scales_.data()[token]; }
  /// Σ codes of each block of a token: group by group, block by block.
  std::int32_t* sums(std::int64_t token) const {
    return reinterpret_cast<std::int32_t*>(sums_.data()) + token * blocks_;
  }
  std::int64_t blocks_per_group() const { return blocks_per_group_; }

  /// Pads codes(token), whose columns of each group are there, and sums them up.
  void finish(const PackedLayout& layout, std::int64_t token, SumCodes sum_codes) const;

 private:
  std::int64_t tokens_;
  std::int64_t stride_;
  std::int64_t blocks_per_group_;
  std::int64_t blocks_;
  Scratch codes_;
  Scratch sums_;
  Scratch scales_;
};

/// Where the activations of an integer linear come from.
struct TokenSource {
  std::int64_t tokens = 0;
  /// Floats (tokens, columns), quantized with scale = max|x| / 127 a token, code = round half to
  /// even of x / scale. Elements of a token are contiguous.
  const void* x = nullptr;
  FloatType type = FloatType::kF32;
  std::int64_t stride = 0;  ///< elements from one token to the next
  /// Or codes that are there already, with one scale for all.
  const std::int8_t* codes = nullptr;
  float scale = 1;
  /// Or patches of a convolution, with that scale.
  const CodePatches* patches = nullptr;

  bool has_codes() const { return codes != nullptr || patches != nullptr; }
};

/// Quantizes tokens [begin, end) of `source`.
using QuantizeTokens = void (*)(const PackedLayout& layout, const TokenSource& source,
                                std::int64_t begin, std::int64_t end, const TokenCodes& out);

/// What an instruction set has for them. quantize() is called with a token's scale_for(magnitude)
/// that is not NaN.
struct TokenFunctions {
  MaxMagnitude magnitude;
  QuantizeCodes quantize;
  SumCodes sum;
};

/// What each of them does.
void quantize_tokens(const PackedLayout& layout, const TokenSource& source, std::int64_t begin,
                     std::int64_t end, const TokenCodes& out, const TokenFunctions& functions);

void quantize_tokens__portable(const PackedLayout& layout, const TokenSource& source,
                               std::int64_t begin, std::int64_t end, const TokenCodes& out);
void quantize_tokens__avx2(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out);
void quantize_tokens__avx512(const PackedLayout& layout, const TokenSource& source,
                             std::int64_t begin, std::int64_t end, const TokenCodes& out);
void quantize_tokens__neon(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out);

}  // namespace quantal::kernels
