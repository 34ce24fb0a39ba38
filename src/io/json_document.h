#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include <quantal/api.h>
#include <quantal/status.h>

namespace quantal::io {

/// Parses a JSON text that came from a file: bounded in size (kMaxDocument) and depth, no key
/// twice. `source` names it in errors. Errors as walk_json(), and kLimitExceeded.
QUANTAL_API Result<nlohmann::json> parse_json(std::string_view text, std::string_view source);

/// The same for a whole file; kIo where it cannot be read.
QUANTAL_API Result<nlohmann::json> read_json(const std::string& path);

}  // namespace quantal::io
