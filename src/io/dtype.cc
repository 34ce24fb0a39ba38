#include "io/dtype.h"

#include <algorithm>
#include <array>
#include <limits>

#include "io/limits.h"

namespace quantal::safetensors {
namespace {

struct DtypeRow {
  const char* name;
  int bits;
};

// In the order of the enum.
constexpr std::array<DtypeRow, kNumDtypes> kDtypes = {{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};
static_assert(kDtypes[static_cast<std::size_t>(Dtype::kU64)].bits == 64);

const DtypeRow& row(Dtype dtype) { return kDtypes.at(static_cast<std::size_t>(dtype)); }

}  // namespace

const char* dtype_name(Dtype dtype) { return row(dtype).name; }

int dtype_bits(Dtype dtype) { return row(dtype).bits; }

std::optional<Dtype> dtype_from_name(std::string_view name) {
  for (int i = 0; i < kNumDtypes; ++i) {
    if (kDtypes[static_cast<std::size_t>(i)].name == name) return static_cast<Dtype>(i);
  }
  return std::nullopt;
}

}  // namespace quantal::safetensors

namespace quantal::io {

using safetensors::Dtype;

std::uint64_t dtype_alignment(Dtype dtype) {
  return static_cast<std::uint64_t>(std::max(1, safetensors::dtype_bits(dtype) / 8));
}

std::string list_text(std::span<const std::uint64_t> numbers) {
  std::string text = "[";
  for (const std::uint64_t number : numbers) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(number);
  }
  return text += ']';
}

Result<std::uint64_t> byte_size(Dtype dtype, std::span<const std::uint64_t> shape,
                                const Site& site) {
  if (shape.size() > kMaxRank) {
    return failure(Errc::kInvalidShape, site, "at most " + std::to_string(kMaxRank) + " dimensions",
                   std::to_string(shape.size()));
  }
  std::uint64_t count = 1;  // of elements, with zero dimensions left out
  bool empty = false;
  bool overflow = false;
  for (const std::uint64_t dim : shape) {
    if (dim > kMaxDim) {
      return failure(Errc::kInvalidShape, site, "dimensions of at most " + std::to_string(kMaxDim),
                     list_text(shape));
    }
    empty |= dim == 0;
    overflow |= dim != 0 && __builtin_mul_overflow(count, dim, &count);
  }
  const auto bits = static_cast<std::uint64_t>(safetensors::dtype_bits(dtype));
  const std::uint64_t tail_bits = count % 8 * bits;
  std::uint64_t bytes = 0;
  overflow |= __builtin_mul_overflow(count / 8, bits, &bytes);
  overflow |= __builtin_add_overflow(bytes, tail_bits / 8, &bytes);
  overflow |= bytes > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (overflow) {
    return failure(Errc::kInvalidShape, site, "a size below 2^63 bytes",
                   list_text(shape) + " of " + safetensors::dtype_name(dtype));
  }
  if (empty) return std::uint64_t{0};
  if (tail_bits % 8 != 0) {
    return failure(Errc::kSizeMismatch, site, "elements that fill whole bytes",
                   list_text(shape) + " of " + safetensors::dtype_name(dtype));
  }
  return bytes;
}

Status check_values(Dtype dtype, std::span<const std::byte> bytes, const Site& site) {
  if (dtype != Dtype::kBool) return {};
  const auto wrong =
      std::find_if(bytes.begin(), bytes.end(), [](std::byte b) { return b > std::byte{1}; });
  if (wrong == bytes.end()) return {};
  Site at = site;
  at.offset = static_cast<std::uint64_t>(wrong - bytes.begin());
  return failure(Errc::kInvalidData, at, "BOOL bytes of 0 or 1",
                 std::to_string(std::to_integer<int>(*wrong)));
}

}  // namespace quantal::io
