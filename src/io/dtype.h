#pragma once

#include <cstdint>
#include <span>

#include <quantal/safetensors.h>

#include "io/message.h"

namespace quantal::io {

/// What a pointer to elements must be a multiple of; 1 for the packed floats.
std::uint64_t dtype_alignment(safetensors::Dtype dtype);

/// Bytes of a tensor, or kInvalidShape: rank or dimension over the limit, or a size that passes
/// 2^63 - 1 even when zero dimensions are left out (they must not hide an overflow);
/// kSizeMismatch where sub-byte elements do not fill whole bytes.
Result<std::uint64_t> byte_size(safetensors::Dtype dtype, std::span<const std::uint64_t> shape,
                                const Site& site);

/// kInvalidData where a BOOL tensor holds a byte other than 0 and 1. Other dtypes pass.
Status check_values(safetensors::Dtype dtype, std::span<const std::byte> bytes, const Site& site);

/// `[2, 3]`, as messages show shapes and offsets.
std::string list_text(std::span<const std::uint64_t> numbers);

}  // namespace quantal::io
