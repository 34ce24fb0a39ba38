#include "io/json_document.h"

#include <utility>

#include <nlohmann/json.hpp>

#include "io/json_walk.h"
#include "io/limits.h"
#include "io/source.h"

namespace quantal::io {
namespace {

// Skips the whole value: the walk itself checks depth, keys and syntax.
class Checker : public JsonVisitor {
 public:
  Status on_key(std::string&) override { return {}; }
  Status on_scalar(const JsonScalar&) override { return {}; }
  Result<JsonEnter> on_begin(JsonKind) override { return JsonEnter::kSkip; }
  Status on_end() override { return {}; }
};

Status check_size(std::uint64_t size, std::string_view source) {
  if (size <= kMaxDocument) return {};
  return failure(Errc::kLimitExceeded, {.source = source},
                 "JSON of at most " + std::to_string(kMaxDocument) + " bytes",
                 std::to_string(size));
}

Result<nlohmann::json> parse(std::string_view text, std::string_view source) {
  if (Status status = check_size(text.size(), source); !status.ok()) return status;
  Checker checker;
  if (Status status = walk_json(text, source, checker); !status.ok()) return status;
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

Result<nlohmann::json> read(const std::string& path) {
  Result<Source> file = Source::open(path, safetensors::Access::kRead, os_file_ops());
  if (!file.ok()) return file.status();
  const std::uint64_t size = file.value().size();
  if (Status status = check_size(size, path); !status.ok()) return status;
  Result<safetensors::Bytes> bytes = file.value().copy(0, size);
  if (!bytes.ok()) return bytes.status();
  return parse({reinterpret_cast<const char*>(bytes.value().data.get()), size}, path);
}

}  // namespace

Result<nlohmann::json> parse_json(std::string_view text, std::string_view source) {
  return without_bad_alloc({.source = source}, [&] { return parse(text, source); });
}

Result<nlohmann::json> read_json(const std::string& path) {
  return without_bad_alloc({.source = path}, [&] { return read(path); });
}

}  // namespace quantal::io
