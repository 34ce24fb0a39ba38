#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include <quantal/status.h>

namespace quantal::io {

/// Where a mistake was found.
struct Site {
  std::string_view source;  // the file, or "memory"
  std::optional<std::string_view> tensor = std::nullopt;
  std::optional<std::uint64_t> offset = std::nullopt;
};

/// `[quantal::safetensors] expected E in 'source', tensor 'name', offset N: got G`.
Status failure(Errc code, const Site& site, std::string_view expected, std::string_view got);

/// kIo with errno's text and number.
Status io_failure(const Site& site, std::string_view expected, int error);

/// `text` in single quotes: its first bytes, always valid UTF-8, no control characters.
std::string quote(std::string_view text, std::size_t limit = 120);

bool is_valid_utf8(std::string_view text);

/// Runs `body`; an allocation that fails becomes kOutOfMemory.
template <typename Body>
auto without_bad_alloc(const Site& site, Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return failure(Errc::kOutOfMemory, site, "enough memory", "std::bad_alloc");
  } catch (const std::length_error&) {
    return failure(Errc::kOutOfMemory, site, "enough memory", "std::length_error");
  }
}

}  // namespace quantal::io
