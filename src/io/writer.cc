#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include <quantal/safetensors.h>

#include "io/atomic_file.h"
#include "io/dtype.h"
#include "io/header.h"
#include "io/json_walk.h"
#include "io/limits.h"
#include "io/message.h"

namespace quantal::safetensors {
namespace {

Status check_tensor(const TensorView& tensor, const io::Site& site) {
  if (tensor.name == io::kMetadataKey) {
    return io::failure(Errc::kInvalidArgument, site, "another name", "the metadata's key");
  }
  if (tensor.name.size() > io::kMaxName) {
    return io::failure(Errc::kLimitExceeded, site,
                       "a name of at most " + std::to_string(io::kMaxName) + " bytes",
                       std::to_string(tensor.name.size()));
  }
  if (!io::is_valid_utf8(tensor.name)) {
    return io::failure(Errc::kInvalidUtf8, site, "a name in UTF-8", "other bytes");
  }
  if (static_cast<int>(tensor.dtype) >= kNumDtypes) {
    return io::failure(Errc::kUnsupportedDtype, site, "a dtype of safetensors",
                       std::to_string(static_cast<int>(tensor.dtype)));
  }
  Result<std::uint64_t> bytes = io::byte_size(tensor.dtype, tensor.shape, site);
  if (!bytes.ok()) return bytes.status();
  if (tensor.size != bytes.value()) {
    return io::failure(Errc::kSizeMismatch, site,
                       std::to_string(bytes.value()) + " bytes (" + io::list_text(tensor.shape) +
                           " of " + dtype_name(tensor.dtype) + ")",
                       std::to_string(tensor.size));
  }
  if (tensor.data == nullptr && tensor.size > 0) {
    return io::failure(Errc::kInvalidArgument, site, "data", "a null pointer");
  }
  return io::check_values(tensor.dtype, {static_cast<const std::byte*>(tensor.data), tensor.size},
                          site);
}

Status check_tensors(std::span<const TensorView> tensors, const std::string& path) {
  std::vector<std::string_view> names;
  for (const TensorView& tensor : tensors) {
    const io::Site site{.source = path, .tensor = tensor.name};
    if (Status status = check_tensor(tensor, site); !status.ok()) return status;
    names.push_back(tensor.name);
  }
  std::sort(names.begin(), names.end());
  const auto twin = std::adjacent_find(names.begin(), names.end());
  if (twin == names.end()) return {};
  return io::failure(Errc::kDuplicateKey, {.source = path, .tensor = *twin}, "each tensor once",
                     "it twice");
}

Status check_metadata(const Metadata& metadata, const std::string& path) {
  const io::Site site{.source = path};
  if (metadata.size() > io::kMaxMetadata) {
    return io::failure(Errc::kLimitExceeded, site,
                       "at most " + std::to_string(io::kMaxMetadata) + " entries of metadata",
                       std::to_string(metadata.size()));
  }
  for (const auto& [key, value] : metadata) {
    if (!io::is_valid_utf8(key) || !io::is_valid_utf8(value)) {
      return io::failure(Errc::kInvalidUtf8, site, "metadata in UTF-8",
                         "other bytes at key " + io::quote(key));
    }
  }
  return {};
}

// Large elements first: every tensor is then aligned for its dtype without holes between them.
std::vector<const TensorView*> file_order(std::span<const TensorView> tensors) {
  std::vector<const TensorView*> order;
  for (const TensorView& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    const auto x = io::dtype_alignment(a->dtype);
    const auto y = io::dtype_alignment(b->dtype);
    return std::tie(y, a->name) < std::tie(x, b->name);
  });
  return order;
}

void append_metadata(std::string& json, const Metadata& metadata) {
  if (metadata.empty()) return;
  io::append_json_string(json, io::kMetadataKey);
  json += ":{";
  for (const auto& [key, value] : metadata) {
    if (json.back() != '{') json += ',';
    io::append_json_string(json, key);
    json += ':';
    io::append_json_string(json, value);
  }
  json += '}';
}

void append_tensor(std::string& json, const TensorView& tensor, std::uint64_t begin) {
  if (json.size() > 1) json += ',';
  io::append_json_string(json, tensor.name);
  json += ":{\"dtype\":\"";
  json += dtype_name(tensor.dtype);
  json += "\",\"shape\":[";
  for (const std::uint64_t dim : tensor.shape) {
    if (json.back() != '[') json += ',';
    json += std::to_string(dim);
  }
  json += "],\"data_offsets\":[" + std::to_string(begin) + ',' +
          std::to_string(begin + tensor.size) + "]}";
}

// The length, the JSON and the spaces that bring the data to a multiple of kDataAlignment.
Result<std::string> make_header(std::span<const TensorView* const> order, const Metadata& metadata,
                                const std::string& path) {
  std::string json = "{";
  append_metadata(json, metadata);
  std::uint64_t begin = 0;
  for (const TensorView* tensor : order) {
    append_tensor(json, *tensor, begin);
    if (__builtin_add_overflow(begin, tensor->size, &begin) || begin > io::kMaxDim) {
      return io::failure(Errc::kInvalidArgument, {.source = path, .tensor = tensor->name},
                         "tensors of less than 2^62 bytes together", "more");
    }
    if (json.size() > io::kMaxHeader) break;
  }
  json += '}';
  const std::uint64_t tail = (io::kLengthBytes + json.size()) % io::kDataAlignment;
  if (tail != 0) json.append(io::kDataAlignment - tail, ' ');
  if (json.size() > io::kMaxHeader) {
    return io::failure(Errc::kHeaderTooLarge, {.source = path},
                       "a header of at most " + std::to_string(io::kMaxHeader) + " bytes", "more");
  }
  const std::uint64_t length = json.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + json;
}

}  // namespace

Status write(const std::string& path, std::span<const TensorView> tensors,
             const Metadata& metadata) {
  return io::without_bad_alloc({.source = path}, [&]() -> Status {
    if (Status status = check_tensors(tensors, path); !status.ok()) return status;
    if (Status status = check_metadata(metadata, path); !status.ok()) return status;
    const std::vector<const TensorView*> order = file_order(tensors);
    Result<std::string> header = make_header(order, metadata, path);
    if (!header.ok()) return header.status();
    std::vector<io::Chunk> chunks = {{header.value().data(), header.value().size()}};
    for (const TensorView* tensor : order) chunks.push_back({tensor->data, tensor->size});
    return io::write_file_atomic(path, chunks);
  });
}

}  // namespace quantal::safetensors
