#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "io/message.h"

namespace quantal::io {

enum class JsonKind { kNull, kBool, kUnsigned, kOtherNumber, kString, kArray, kObject };

/// A value that is neither array nor object.
struct JsonScalar {
  JsonKind kind;
  std::uint64_t number = 0;     // kUnsigned
  std::string* text = nullptr;  // kString: decoded, may be moved from; kOtherNumber: as written
};

/// What a container of the text is to the visitor.
enum class JsonEnter { kVisit, kSkip };

/// Told of a JSON text piece by piece. An error ends the walk.
class JsonVisitor {
 public:
  virtual ~JsonVisitor() = default;
  virtual Status on_key(std::string& key) = 0;
  virtual Status on_scalar(const JsonScalar& scalar) = 0;
  /// An array or object begins. The inside of a skipped one is checked, but not told.
  virtual Result<JsonEnter> on_begin(JsonKind kind) = 0;
  virtual Status on_end() = 0;
};

/// Walks one JSON value, without recursion and without building it.
///
/// kInvalidUtf8; kDepthExceeded past kMaxDepth, even inside a container that the visitor refused;
/// kDuplicateKey inside skipped objects (a visitor looks for its own); kInvalidJson for all that
/// RFC 8259 forbids, byte order marks, NUL bytes and text after the value among it.
Status walk_json(std::string_view text, std::string_view source, JsonVisitor& visitor);

/// Appends `text` as a JSON string. Precondition: is_valid_utf8(text).
void append_json_string(std::string& out, std::string_view text);

const char* json_kind_name(JsonKind kind);

}  // namespace quantal::io
