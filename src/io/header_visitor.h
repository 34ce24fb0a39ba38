#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "io/header.h"
#include "io/json_walk.h"

namespace quantal::io {

/// Builds a Header from the events of its JSON text. What concerns one tensor is checked here;
/// what concerns several (names, overlaps) in parse_header().
class HeaderVisitor : public JsonVisitor {
 public:
  HeaderVisitor(std::uint64_t data_size, std::string_view source, bool strict)
      : data_size_(data_size), source_(source), strict_(strict) {}

  Header take_header() { return std::move(header_); }

  Status on_key(std::string& key) override;
  Status on_scalar(const JsonScalar& scalar) override;
  Result<JsonEnter> on_begin(JsonKind kind) override;
  Status on_end() override;

 private:
  enum class Place { kOutside, kTop, kMetadata, kTensor, kShape, kOffsets };
  enum Field : unsigned { kDtype = 1, kShape = 2, kOffsets = 4, kUnknown = 8 };

  Status top_key(std::string& key);
  Status field_key(std::string& key);
  Status unknown_field(std::string& key);
  Status metadata_value(const JsonScalar& scalar);
  Status field_value(const JsonScalar& scalar);
  Status number(const JsonScalar& scalar);
  Status finish_tensor();
  Status check_unknown_fields();
  Status wrong(std::string_view expected, JsonKind got) const;
  Site site() const { return {.source = source_, .tensor = info_.name}; }

  std::uint64_t data_size_;
  std::string_view source_;
  bool strict_;
  Header header_;

  Place place_ = Place::kOutside;
  bool metadata_seen_ = false;
  bool metadata_next_ = false;  // the value of the top key read last is __metadata__
  std::string metadata_key_;

  // The tensor being read.
  safetensors::TensorInfo info_;
  Field field_ = kUnknown;
  unsigned fields_seen_ = 0;
  std::deque<std::string> unknown_fields_;
  std::vector<std::uint64_t> numbers_;  // of its shape or offsets
};

}  // namespace quantal::io
