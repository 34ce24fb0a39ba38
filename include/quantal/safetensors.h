#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <quantal/api.h>
#include <quantal/status.h>

/// Reads and writes safetensors files (docs/formats.md, "The container"). No function throws,
/// prints or aborts, whatever the bytes of a file are: errors are a Status.
namespace quantal::safetensors {

/// The element types of safetensors 0.8.
enum class Dtype : std::uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3FNUZ,
  kF8E5M2FNUZ,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

/// How many dtypes there are; their values are 0 .. kNumDtypes - 1.
inline constexpr int kNumDtypes = 22;

/// The name in the file ("F8_E4M3").
QUANTAL_API const char* dtype_name(Dtype dtype);
/// The dtype of that name; names are case sensitive.
QUANTAL_API std::optional<Dtype> dtype_from_name(std::string_view name);
/// Bits an element: 4 and 6 for the packed floats, else a multiple of 8.
QUANTAL_API int dtype_bits(Dtype dtype);

/// One entry of a header. The offsets count from the first byte after the header.
struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::kU8;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  std::uint64_t size() const { return end - begin; }
};

/// The strings of `__metadata__`.
using Metadata = std::map<std::string, std::string, std::less<>>;

/// Bytes with their owner: a mapping, a buffer, or memory of the caller.
struct Bytes {
  std::shared_ptr<const std::byte> data;
  std::uint64_t size = 0;
};

/// How a file's bytes reach memory.
enum class Access {
  kAuto,  ///< kMap on a local file system, kRead on network ones or where QUANTAL_NO_MMAP=1
  kMap,   ///< mmap; pread where the system refuses. A file cut short while mapped raises SIGBUS
  kRead,  ///< pread into a buffer for each tensor
};

struct ReadOptions {
  Access access = Access::kAuto;
  bool strict = false;  ///< unknown fields are errors (kUnknownField), not warnings
};

/// A checked safetensors file. Copies share it; const use from several threads is safe.
class QUANTAL_API Reader {
 public:
  struct State;

  /// Opens a regular file and checks its whole header against the file's size. Reads no tensor.
  static Result<Reader> open(const std::string& path, const ReadOptions& options = {});

  /// The same for a file in memory, which stays alive while the reader or bytes from it do.
  static Result<Reader> from_memory(Bytes bytes, const ReadOptions& options = {});

  const Metadata& metadata() const;
  /// All tensors, in the order of their bytes in the file.
  const std::vector<TensorInfo>& tensors() const;
  /// The tensor of that name, or null. Lives as long as the reader.
  const TensorInfo* find(std::string_view name) const;
  /// Unknown fields met by a reader that is not strict (the first few).
  const std::vector<std::string>& warnings() const;

  /// The bytes of one tensor, aligned for its dtype: inside the mapping where they are aligned
  /// there, else a copy. They stay valid without the reader, and when the file is replaced by
  /// rename. A mapping is private to the process: a write into it never reaches the file.
  ///
  /// kIo where the file shrank or cannot be read, kInvalidData for a BOOL other than 0 or 1,
  /// kInvalidArgument for an `info` of another file that lies outside this one.
  Result<Bytes> data(const TensorInfo& info) const;
  /// The same by name; kMissingTensor.
  Result<Bytes> data(std::string_view name) const;

  explicit Reader(std::shared_ptr<const State> state) : state_(std::move(state)) {}

 private:
  std::shared_ptr<const State> state_;
};

/// A tensor to write: contiguous, row-major, little-endian.
struct TensorView {
  std::string name;
  Dtype dtype = Dtype::kU8;
  std::vector<std::uint64_t> shape;
  const void* data = nullptr;
  std::uint64_t size = 0;  ///< bytes; must be what dtype and shape give
};

/// Saves a file atomically: on any error the old file is as it was and nothing is left beside it;
/// on success the file is on disk. Symbolic links are followed and kept, so are the permission
/// bits of an existing file; a hard link is cut. The same tensors in any order give the same
/// bytes, and the data starts at a multiple of 64.
///
/// kDuplicateKey, kInvalidUtf8, kInvalidShape, kSizeMismatch, kInvalidData, kLimitExceeded,
/// kHeaderTooLarge and kInvalidArgument come before the disk is touched; kIo after.
QUANTAL_API Status write(const std::string& path, std::span<const TensorView> tensors,
                         const Metadata& metadata = {});

/// kPathEscape unless `name` is a plain file name: no separators, not `.` or `..`, not empty.
QUANTAL_API Status verify_shard_name(std::string_view name);

/// `model.safetensors.index.json`: which shard holds a tensor.
struct ShardIndex {
  std::map<std::string, std::string, std::less<>> weight_map;
};

/// Reads an index; every shard name passed verify_shard_name(). Same errors as Reader::open().
QUANTAL_API Result<ShardIndex> read_shard_index(const std::string& path);

/// A shard that an index names.
struct Shard {
  std::string name;
  Reader reader;
};

/// Opens all shards of an index, from the index's folder, in the order of their names.
/// kMissingTensor for a tensor that its shard lacks, kDuplicateKey for one in two shards,
/// kOrphanTensor for one that the index does not list, kIo for a shard that is not there.
QUANTAL_API Result<std::vector<Shard>> open_shards(const std::string& index_path,
                                                   const ReadOptions& options = {});

}  // namespace quantal::safetensors
