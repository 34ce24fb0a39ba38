#include <filesystem>
#include <set>
#include <utility>

#include <quantal/safetensors.h>

#include "io/json_walk.h"
#include "io/limits.h"
#include "io/message.h"
#include "io/source.h"

namespace quantal::safetensors {
namespace {

using io::JsonEnter;
using io::JsonKind;
using io::JsonScalar;

// Takes weight_map; the other keys ("metadata") are checked as JSON and dropped.
class IndexVisitor : public io::JsonVisitor {
 public:
  explicit IndexVisitor(std::string_view source) : source_(source) {}

  bool found() const { return found_; }
  ShardIndex take_index() { return std::move(index_); }

  Status on_key(std::string& key) override {
    if (place_ == Place::kMap) {
      key_ = std::move(key);
      return {};
    }
    map_next_ = key == "weight_map";
    found_ |= map_next_;
    if (top_keys_.insert(key).second) return {};
    return io::failure(Errc::kDuplicateKey, {.source = source_}, "each key once",
                       io::quote(key) + " twice");
  }

  Status on_scalar(const JsonScalar& scalar) override {
    if (place_ == Place::kTop && !map_next_) return {};
    if (place_ != Place::kMap || scalar.kind != JsonKind::kString) return wrong(scalar.kind);
    if (Status status = verify_shard_name(*scalar.text); !status.ok()) {
      return Status(status.code(), status.message() + ", for tensor " + io::quote(key_) + " of " +
                                       io::quote(source_));
    }
    if (index_.weight_map.try_emplace(key_, std::move(*scalar.text)).second) return {};
    return io::failure(Errc::kDuplicateKey, {.source = source_, .tensor = key_}, "each tensor once",
                       "it twice");
  }

  Result<JsonEnter> on_begin(JsonKind kind) override {
    if (place_ == Place::kTop && !map_next_) return JsonEnter::kSkip;
    if (place_ == Place::kMap || kind != JsonKind::kObject) return wrong(kind);
    place_ = place_ == Place::kOutside ? Place::kTop : Place::kMap;
    return JsonEnter::kVisit;
  }

  Status on_end() override {
    place_ = place_ == Place::kMap ? Place::kTop : Place::kOutside;
    return {};
  }

 private:
  enum class Place { kOutside, kTop, kMap };

  Status wrong(JsonKind got) const {
    return io::failure(Errc::kInvalidJson, {.source = source_},
                       "an object whose weight_map maps tensors to file names",
                       io::json_kind_name(got));
  }

  std::string_view source_;
  ShardIndex index_;
  Place place_ = Place::kOutside;
  bool map_next_ = false;
  bool found_ = false;
  std::string key_;
  std::set<std::string> top_keys_;
};

Result<ShardIndex> parse_index(const std::string& path) {
  Result<io::Source> source = io::Source::open(path, Access::kRead, io::os_file_ops());
  if (!source.ok()) return source.status();
  const std::uint64_t size = source.value().size();
  if (size > io::kMaxIndex) {
    return io::failure(Errc::kLimitExceeded, {.source = path},
                       "an index of at most " + std::to_string(io::kMaxIndex) + " bytes",
                       std::to_string(size));
  }
  Result<Bytes> bytes = source.value().copy(0, size);
  if (!bytes.ok()) return bytes.status();
  IndexVisitor visitor(path);
  const std::string_view text(reinterpret_cast<const char*>(bytes.value().data.get()), size);
  if (Status status = io::walk_json(text, path, visitor); !status.ok()) return status;
  if (!visitor.found()) {
    return io::failure(Errc::kInvalidJson, {.source = path}, "a weight_map", "none");
  }
  return visitor.take_index();
}

// Each tensor of a shard must be listed, and listed there.
Status check_shard(const Shard& shard, const ShardIndex& index, const std::vector<Shard>& shards,
                   const std::string& path) {
  for (const TensorInfo& info : shard.reader.tensors()) {
    const io::Site site{.source = path, .tensor = info.name};
    const auto entry = index.weight_map.find(info.name);
    if (entry == index.weight_map.end()) {
      return io::failure(Errc::kOrphanTensor, site, "an entry for each tensor of its shards",
                         "none, though " + io::quote(shard.name) + " holds it");
    }
    if (entry->second == shard.name) continue;
    for (const Shard& other : shards) {
      if (other.name != entry->second || other.reader.find(info.name) == nullptr) continue;
      return io::failure(Errc::kDuplicateKey, site, "each tensor in one shard",
                         io::quote(other.name) + " and " + io::quote(shard.name));
    }
  }
  return {};
}

Result<std::vector<Shard>> open_all(const std::string& path, const ReadOptions& options) {
  Result<ShardIndex> index = parse_index(path);
  if (!index.ok()) return index.status();
  std::set<std::string_view> names;
  for (const auto& [tensor, shard] : index.value().weight_map) names.insert(shard);

  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::vector<Shard> shards;
  for (const std::string_view name : names) {
    Result<Reader> reader = Reader::open((folder / name).string(), options);
    if (!reader.ok()) return reader.status();
    shards.push_back({std::string(name), std::move(reader).value()});
  }
  for (const Shard& shard : shards) {
    if (Status s = check_shard(shard, index.value(), shards, path); !s.ok()) return s;
  }
  for (const auto& [tensor, name] : index.value().weight_map) {
    for (const Shard& shard : shards) {
      if (shard.name != name || shard.reader.find(tensor) != nullptr) continue;
      return io::failure(Errc::kMissingTensor, {.source = path, .tensor = tensor},
                         "it in shard " + io::quote(name), "no such tensor there");
    }
  }
  return shards;
}

}  // namespace

Status verify_shard_name(std::string_view name) {
  constexpr std::size_t kMaxFileName = 255;
  const bool plain = !name.empty() && name != "." && name != ".." && name.size() <= kMaxFileName &&
                     name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
  if (plain) return {};
  return Status(
      Errc::kPathEscape,
      "[quantal::safetensors] expected a plain file name as shard: got " + io::quote(name));
}

Result<ShardIndex> read_shard_index(const std::string& path) {
  return io::without_bad_alloc({.source = path}, [&] { return parse_index(path); });
}

Result<std::vector<Shard>> open_shards(const std::string& index_path, const ReadOptions& options) {
  return io::without_bad_alloc({.source = index_path},
                               [&] { return open_all(index_path, options); });
}

}  // namespace quantal::safetensors
