#include "io/header_visitor.h"

#include <algorithm>
#include <array>
#include <utility>

#include "io/dtype.h"
#include "io/limits.h"

namespace quantal::io {

using safetensors::TensorInfo;

Status HeaderVisitor::wrong(std::string_view expected, JsonKind got) const {
  Site where{.source = source_};
  if (!info_.name.empty()) where.tensor = info_.name;
  return failure(Errc::kInvalidJson, where, expected, json_kind_name(got));
}

Status HeaderVisitor::on_key(std::string& key) {
  switch (place_) {
    case Place::kTop:
      return top_key(key);
    case Place::kMetadata:
      metadata_key_ = std::move(key);
      return {};
    default:
      return field_key(key);
  }
}

Status HeaderVisitor::top_key(std::string& key) {
  metadata_next_ = key == kMetadataKey;
  if (metadata_next_ && std::exchange(metadata_seen_, true)) {
    return failure(Errc::kDuplicateKey, {.source = source_}, "each key once",
                   quote(key) + " twice");
  }
  if (key.size() > kMaxName) {
    return failure(Errc::kLimitExceeded, {.source = source_},
                   "names of at most " + std::to_string(kMaxName) + " bytes",
                   quote(key) + " of " + std::to_string(key.size()));
  }
  info_ = TensorInfo();
  info_.name = std::move(key);
  fields_seen_ = 0;
  unknown_fields_.clear();
  return {};
}

Status HeaderVisitor::field_key(std::string& key) {
  if (key == "dtype") {
    field_ = kDtype;
  } else if (key == "shape") {
    field_ = kShape;
  } else if (key == "data_offsets") {
    field_ = kOffsets;
  } else {
    return unknown_field(key);
  }
  if (fields_seen_ & field_) {
    return failure(Errc::kDuplicateKey, site(), "each field once", quote(key) + " twice");
  }
  fields_seen_ |= field_;
  return {};
}

Status HeaderVisitor::unknown_field(std::string& key) {
  field_ = kUnknown;
  if (strict_) {
    return failure(Errc::kUnknownField, site(), "only dtype, shape and data_offsets", quote(key));
  }
  if (header_.warnings.size() < kMaxWarnings) {
    header_.warnings.push_back("unknown field " + quote(key) + " of tensor " + quote(info_.name));
  }
  unknown_fields_.push_back(std::move(key));
  return {};
}

Status HeaderVisitor::on_scalar(const JsonScalar& scalar) {
  switch (place_) {
    case Place::kOutside:
      return wrong("an object as the header", scalar.kind);
    case Place::kTop:
      if (!metadata_next_) return wrong("an object for each tensor", scalar.kind);
      if (scalar.kind == JsonKind::kNull) return {};  // some writers put null for none
      return wrong("__metadata__ to be an object", scalar.kind);
    case Place::kMetadata:
      return metadata_value(scalar);
    case Place::kTensor:
      return field_value(scalar);
    case Place::kShape:
    case Place::kOffsets:
      return number(scalar);
  }
  return {};
}

Status HeaderVisitor::metadata_value(const JsonScalar& scalar) {
  if (scalar.kind != JsonKind::kString) {
    return wrong("strings as the values of __metadata__", scalar.kind);
  }
  if (header_.metadata.size() >= kMaxMetadata) {
    return failure(Errc::kLimitExceeded, {.source = source_},
                   "at most " + std::to_string(kMaxMetadata) + " entries of __metadata__", "more");
  }
  const auto [entry, added] =
      header_.metadata.try_emplace(std::move(metadata_key_), std::move(*scalar.text));
  if (added) return {};
  return failure(Errc::kDuplicateKey, {.source = source_}, "each key of __metadata__ once",
                 quote(entry->first) + " twice");
}

Status HeaderVisitor::field_value(const JsonScalar& scalar) {
  if (field_ == kUnknown) return {};
  if (field_ != kDtype) return wrong("arrays as shape and data_offsets", scalar.kind);
  if (scalar.kind != JsonKind::kString) {
    return failure(Errc::kUnsupportedDtype, site(), "a string as dtype",
                   json_kind_name(scalar.kind));
  }
  const auto dtype = safetensors::dtype_from_name(*scalar.text);
  if (!dtype) {
    return failure(Errc::kUnsupportedDtype, site(), "a dtype of safetensors", quote(*scalar.text));
  }
  info_.dtype = *dtype;
  return {};
}

Status HeaderVisitor::number(const JsonScalar& scalar) {
  const bool shape = place_ == Place::kShape;
  const char* expected = shape ? "unsigned integers below 2^64 in shape"
                               : "two unsigned integers below 2^64 in data_offsets";
  const Errc code = shape ? Errc::kInvalidShape : Errc::kInvalidOffset;
  if (scalar.kind == JsonKind::kOtherNumber) {
    return failure(code, site(), expected, quote(*scalar.text));
  }
  if (scalar.kind != JsonKind::kUnsigned) return wrong(expected, scalar.kind);
  if (numbers_.size() >= (shape ? kMaxRank : 2)) {
    return failure(code, site(),
                   shape ? "at most " + std::to_string(kMaxRank) + " dimensions" : expected,
                   "more");
  }
  numbers_.push_back(scalar.number);
  return {};
}

Result<JsonEnter> HeaderVisitor::on_begin(JsonKind kind) {
  const auto enter = [&](Place place) {
    place_ = place;
    numbers_.clear();
    return JsonEnter::kVisit;
  };
  switch (place_) {
    case Place::kOutside:
      if (kind == JsonKind::kObject) return enter(Place::kTop);
      return wrong("an object as the header", kind);
    case Place::kTop:
      if (kind == JsonKind::kObject) {
        return enter(metadata_next_ ? Place::kMetadata : Place::kTensor);
      }
      return wrong("objects in the header", kind);
    case Place::kMetadata:
      return wrong("strings as the values of __metadata__", kind);
    case Place::kTensor:
      if (field_ == kUnknown) return JsonEnter::kSkip;
      if (field_ == kDtype) {
        return failure(Errc::kUnsupportedDtype, site(), "a string as dtype", json_kind_name(kind));
      }
      if (kind == JsonKind::kArray) {
        return enter(field_ == kShape ? Place::kShape : Place::kOffsets);
      }
      return wrong("arrays as shape and data_offsets", kind);
    case Place::kShape:
    case Place::kOffsets:
      return wrong("unsigned integers in shape and data_offsets", kind);
  }
  return JsonEnter::kSkip;
}

Status HeaderVisitor::on_end() {
  switch (place_) {
    case Place::kShape:
      info_.shape.assign(numbers_.begin(), numbers_.end());
      place_ = Place::kTensor;
      return {};
    case Place::kOffsets:
      place_ = Place::kTensor;
      if (numbers_.size() != 2) {
        return failure(Errc::kInvalidOffset, site(), "two integers in data_offsets",
                       std::to_string(numbers_.size()));
      }
      info_.begin = numbers_[0];
      info_.end = numbers_[1];
      return {};
    case Place::kTensor:
      place_ = Place::kTop;
      return finish_tensor();
    case Place::kMetadata:
      place_ = Place::kTop;
      return {};
    default:
      place_ = Place::kOutside;
      return {};
  }
}

Status HeaderVisitor::finish_tensor() {
  if (fields_seen_ != (kDtype | kShape | kOffsets)) {
    return failure(Errc::kInvalidJson, site(), "dtype, shape and data_offsets", "fewer fields");
  }
  if (Status status = check_unknown_fields(); !status.ok()) return status;
  Result<std::uint64_t> bytes = byte_size(info_.dtype, info_.shape, site());
  if (!bytes.ok()) return bytes.status();
  if (info_.begin > info_.end || info_.end > data_size_) {
    return failure(Errc::kInvalidOffset, site(),
                   "begin <= end <= " + std::to_string(data_size_) + " (the data's size)",
                   list_text(std::array{info_.begin, info_.end}));
  }
  if (info_.size() != bytes.value()) {
    return failure(Errc::kSizeMismatch, site(),
                   std::to_string(bytes.value()) + " bytes (" + list_text(info_.shape) + " of " +
                       safetensors::dtype_name(info_.dtype) + ")",
                   std::to_string(info_.size()));
  }
  header_.tensors.push_back(std::move(info_));
  return {};
}

Status HeaderVisitor::check_unknown_fields() {
  std::sort(unknown_fields_.begin(), unknown_fields_.end());
  const auto twin = std::adjacent_find(unknown_fields_.begin(), unknown_fields_.end());
  if (twin == unknown_fields_.end()) return {};
  return failure(Errc::kDuplicateKey, site(), "each field once", quote(*twin) + " twice");
}

}  // namespace quantal::io
