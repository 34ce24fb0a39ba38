#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <quantal/status.h>

namespace quantal::corpus {

/// A safetensors file, most often malformed, and what the reader must say of it.
struct Case {
  std::string id;
  std::string bytes;
  Errc open;                 // of Reader::open
  Errc data = Errc::kOk;     // the first error over all tensors' data, where it opens
  std::string message = {};  // a part of the error's message
};

std::vector<Case> cases();

/// Well-formed files of different kinds, to truncate and to flip bits of.
std::vector<Case> seeds();

/// Length, header and data; the header's length is that of `json`.
std::string file(std::string_view json, std::string_view data = {});
/// The same with a length of its own.
std::string file_of_length(std::uint64_t length, std::string_view rest);

}  // namespace quantal::corpus
