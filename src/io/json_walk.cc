#include "io/json_walk.h"

#include <algorithm>
#include <array>
#include <deque>
#include <utility>

#include <nlohmann/json.hpp>

#include "io/limits.h"

namespace quantal::io {
namespace {

// nlohmann's SAX interface on one side, a JsonVisitor on the other.
class Walker {
 public:
  Walker(std::string_view source, JsonVisitor& visitor) : source_(source), visitor_(visitor) {}

  Status take_status() { return std::move(status_); }

  bool null() { return scalar({.kind = JsonKind::kNull}); }
  bool boolean(bool) { return scalar({.kind = JsonKind::kBool}); }
  bool number_unsigned(std::uint64_t value) {
    return scalar({.kind = JsonKind::kUnsigned, .number = value});
  }
  // nlohmann calls this for what has a minus sign, -0 too.
  bool number_integer(std::int64_t value) {
    std::string text = std::to_string(value);
    return scalar({.kind = JsonKind::kOtherNumber, .text = &text});
  }
  bool number_float(double, const std::string& written) {
    std::string text = written;
    return scalar({.kind = JsonKind::kOtherNumber, .text = &text});
  }
  bool string(std::string& text) { return scalar({.kind = JsonKind::kString, .text = &text}); }
  bool binary(nlohmann::json::binary_t&) { return false; }  // not in JSON text

  bool start_object(std::size_t) { return begin(JsonKind::kObject); }
  bool start_array(std::size_t) { return begin(JsonKind::kArray); }
  bool end_object() { return end(JsonKind::kObject); }
  bool end_array() { return end(JsonKind::kArray); }

  bool key(std::string& key) {
    if (skipped_from_ == 0) return go_on(visitor_.on_key(key));
    skipped_keys_[depth_].push_back(std::move(key));
    return true;
  }

  bool parse_error(std::size_t position, const std::string& token, const std::exception&) {
    status_ = failure(Errc::kInvalidJson, {.source = source_, .offset = position}, "valid JSON",
                      quote(token));
    return false;
  }

 private:
  bool go_on(Status status) {
    if (status.ok()) return true;
    status_ = std::move(status);
    return false;
  }

  bool scalar(const JsonScalar& scalar) {
    return skipped_from_ != 0 || go_on(visitor_.on_scalar(scalar));
  }

  bool begin(JsonKind kind) {
    if (++depth_ > kMaxDepth) {
      return go_on(failure(Errc::kDepthExceeded, {.source = source_},
                           "JSON nested at most " + std::to_string(kMaxDepth) + " deep",
                           std::to_string(depth_) + " levels"));
    }
    if (skipped_from_ == 0) {
      Result<JsonEnter> enter = visitor_.on_begin(kind);
      if (enter.ok() && enter.value() == JsonEnter::kVisit) return true;
      // A refusal waits for the end, so that a bomb of brackets is called what it is.
      refusal_ = enter.status();
      skipped_from_ = depth_;
    }
    skipped_keys_[depth_].clear();
    return true;
  }

  bool end(JsonKind kind) {
    const std::size_t depth = depth_--;
    if (skipped_from_ == 0) return go_on(visitor_.on_end());
    if (kind == JsonKind::kObject && !check_skipped_keys(skipped_keys_[depth])) return false;
    if (depth > skipped_from_) return true;
    skipped_from_ = 0;
    return go_on(std::exchange(refusal_, Status()));
  }

  bool check_skipped_keys(std::deque<std::string>& keys) {
    std::sort(keys.begin(), keys.end());
    const auto twin = std::adjacent_find(keys.begin(), keys.end());
    if (twin == keys.end()) return true;
    return go_on(failure(Errc::kDuplicateKey, {.source = source_}, "each key once",
                         quote(*twin) + " twice"));
  }

  std::string_view source_;
  JsonVisitor& visitor_;
  Status status_;
  Status refusal_;
  std::size_t depth_ = 0;
  std::size_t skipped_from_ = 0;  // depth of the outermost skipped container; 0: none
  // Deques: a vector that doubles would cost more than the limit of 8 bytes a byte of header.
  std::array<std::deque<std::string>, kMaxDepth + 1> skipped_keys_;
};

// What nlohmann lets pass: it drops a byte order mark, and takes NUL for the end of the text.
Status check_bytes(std::string_view text, std::string_view source) {
  if (!is_valid_utf8(text)) {
    return failure(Errc::kInvalidUtf8, {.source = source}, "JSON in UTF-8", "other bytes");
  }
  if (text.starts_with("\xEF\xBB\xBF")) {
    return failure(Errc::kInvalidJson, {.source = source, .offset = 0}, "'{'", "a byte order mark");
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos) {
    return failure(Errc::kInvalidJson, {.source = source, .offset = nul},
                   "JSON without NUL bytes (pad with spaces)", "a NUL byte");
  }
  return {};
}

}  // namespace

Status walk_json(std::string_view text, std::string_view source, JsonVisitor& visitor) {
  if (Status status = check_bytes(text, source); !status.ok()) return status;
  // Padding may be long; find_last_not_of is far quicker at it than the lexer.
  const std::size_t last = text.find_last_not_of(" \t\n\r");
  text = text.substr(0, last == std::string_view::npos ? 0 : last + 1);
  Walker walker(source, visitor);
  const bool whole = nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &walker);
  Status status = walker.take_status();
  if (!whole && status.ok()) {
    return failure(Errc::kInvalidJson, {.source = source}, "valid JSON", "a parse that stopped");
  }
  return status;
}

void append_json_string(std::string& out, std::string_view text) {
  out += nlohmann::json(text).dump();
}

const char* json_kind_name(JsonKind kind) {
  switch (kind) {
    case JsonKind::kNull:
      return "null";
    case JsonKind::kBool:
      return "a boolean";
    case JsonKind::kUnsigned:
      return "an unsigned integer";
    case JsonKind::kOtherNumber:
      return "a signed or fractional number";
    case JsonKind::kString:
      return "a string";
    case JsonKind::kArray:
      return "an array";
    case JsonKind::kObject:
      return "an object";
  }
  return "unknown";
}

}  // namespace quantal::io
