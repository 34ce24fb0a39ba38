#pragma once

#include <string>
#include <utility>
#include <variant>

#include <quantal/api.h>

namespace quantal {

/// Why a torch-free function failed. Each value is one class of mistake a caller can tell apart.
enum class Errc {
  kOk = 0,
  kInvalidArgument,      ///< a caller's argument is out of its documented range
  kIo,                   ///< the operating system refused: message holds path and errno text
  kHeaderTooSmall,       ///< fewer than 8 bytes, or an empty header
  kHeaderTooLarge,       ///< header length over 100,000,000 bytes
  kInvalidHeaderLength,  ///< header longer than the file
  kInvalidUtf8,          ///< header is not UTF-8
  kInvalidJson,          ///< header is not the JSON that the format asks for
  kDepthExceeded,        ///< JSON nested deeper than 8
  kDuplicateKey,         ///< a tensor, field or metadata key occurs twice
  kUnknownField,         ///< a tensor entry has a field that the format does not know
  kUnsupportedDtype,     ///< dtype name unknown
  kInvalidShape,         ///< rank over 64, dimension over 2^62, or a product that overflows
  kInvalidOffset,        ///< offsets out of the file, reversed, overlapping or leaving holes
  kSizeMismatch,         ///< shape x dtype does not give the bytes that the offsets span
  kMissingTensor,        ///< no tensor of that name
  kInvalidData,          ///< bytes that the dtype forbids (BOOL other than 0 and 1)
  kPathEscape,           ///< a shard name that leaves its folder
  kOrphanTensor,         ///< a shard holds a tensor that its index does not list
  kLimitExceeded,        ///< over a documented limit: length of a name, entries of the metadata
  kOutOfMemory,          ///< an allocation failed
};

/// The name of an error class, as tests and messages show it ("DuplicateKey").
QUANTAL_API const char* errc_name(Errc code);

/// Success, or an error class with a message that names the offending thing.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Errc code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Errc::kOk; }
  Errc code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Errc code_ = Errc::kOk;
  std::string message_;
};

/// A value, or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Status status) : state_(std::move(status)) {}

  bool ok() const { return std::holds_alternative<T>(state_); }
  /// The error; Ok where there is a value.
  Status status() const { return ok() ? Status() : std::get<Status>(state_); }
  /// Precondition: ok().
  T& value() & { return std::get<T>(state_); }
  const T& value() const& { return std::get<T>(state_); }
  T&& value() && { return std::get<T>(std::move(state_)); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace quantal
