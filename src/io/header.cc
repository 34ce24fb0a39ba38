#include "io/header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "io/header_visitor.h"
#include "io/limits.h"
#include "io/message.h"

namespace quantal::io {
namespace {

using safetensors::TensorInfo;

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

// Indices in the order of the names. Sorted, not hashed: no choice of names makes it slow.
Result<std::vector<std::uint32_t>> index_names(const std::vector<TensorInfo>& tensors,
                                               std::string_view source) {
  std::vector<std::uint32_t> order(tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](std::uint32_t a, std::uint32_t b) { return tensors[a].name < tensors[b].name; });
  const auto twin = std::adjacent_find(order.begin(), order.end(), [&](auto a, auto b) {
    return tensors[a].name == tensors[b].name;
  });
  if (twin == order.end()) return order;
  return failure(Errc::kDuplicateKey, {.source = source, .tensor = tensors[*twin].name},
                 "each tensor once", "it twice");
}

// The tensors must tile the data: bytes that nobody owns can hide another file.
Status check_coverage(const std::vector<TensorInfo>& tensors, std::uint64_t data_size,
                      std::string_view source) {
  std::uint64_t covered = 0;
  for (const TensorInfo& info : tensors) {
    if (info.begin != covered) {
      return failure(
          Errc::kInvalidOffset, {.source = source, .tensor = info.name},
          "to begin at offset " + std::to_string(covered),
          std::to_string(info.begin) + (info.begin < covered ? " (tensors overlap)" : " (a hole)"));
    }
    covered = info.end;
  }
  if (covered == data_size) return {};
  return failure(Errc::kInvalidOffset, {.source = source},
                 "tensors that cover all " + std::to_string(data_size) + " bytes of data",
                 std::to_string(covered) + " covered");
}

}  // namespace

const TensorInfo* Header::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name.begin(), by_name.end(), name,
      [&](std::uint32_t i, std::string_view wanted) { return tensors[i].name < wanted; });
  if (found == by_name.end() || tensors[*found].name != name) return nullptr;
  return &tensors[*found];
}

Result<std::uint64_t> header_length(std::span<const std::byte> first_bytes, std::uint64_t file_size,
                                    std::string_view source) {
  const Site site{.source = source};
  if (first_bytes.size() < kLengthBytes || file_size < kLengthBytes) {
    return failure(Errc::kHeaderTooSmall, site, "at least 8 bytes",
                   std::to_string(std::min<std::uint64_t>(first_bytes.size(), file_size)));
  }
  std::uint64_t length = 0;
  std::memcpy(&length, first_bytes.data(), sizeof(length));
  if (length == 0) {
    return failure(Errc::kHeaderTooSmall, site, "a header of at least 2 bytes", "0");
  }
  if (length > kMaxHeader) {
    return failure(Errc::kHeaderTooLarge, site,
                   "a header of at most " + std::to_string(kMaxHeader) + " bytes",
                   std::to_string(length));
  }
  if (length > file_size - kLengthBytes) {
    return failure(Errc::kInvalidHeaderLength, site,
                   "a header of at most " + std::to_string(file_size - kLengthBytes) +
                       " bytes, which is all that follows its length",
                   std::to_string(length));
  }
  return length;
}

Result<Header> parse_header(std::string_view json, std::uint64_t data_size, std::string_view source,
                            bool strict) {
  HeaderVisitor visitor(data_size, source, strict);
  if (Status status = walk_json(json, source, visitor); !status.ok()) return status;
  Header header = visitor.take_header();

  const auto by_offset = [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  };
  if (!std::is_sorted(header.tensors.begin(), header.tensors.end(), by_offset)) {
    std::sort(header.tensors.begin(), header.tensors.end(), by_offset);
  }
  Result<std::vector<std::uint32_t>> by_name = index_names(header.tensors, source);
  if (!by_name.ok()) return by_name.status();
  header.by_name = std::move(by_name).value();
  if (Status status = check_coverage(header.tensors, data_size, source); !status.ok()) {
    return status;
  }
  return header;
}

}  // namespace quantal::io
