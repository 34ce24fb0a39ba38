#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace demo {

/// What one way to store the model costs and gives.
struct Result {
  std::string scheme;
  double accuracy = 0;  ///< percent
  std::uintmax_t file_bytes = 0;
  double ms_per_batch = 0;
};

/// Makes `folder` and checks that files can be written there: better now than after the training.
/// std::runtime_error that names it otherwise.
void prepare_folder(const std::filesystem::path& folder);

/// A list of {scheme, accuracy, file_bytes, ms_per_batch}. std::runtime_error naming `path`.
void write_json(const std::vector<Result>& results, const std::filesystem::path& path);

/// Writes `text` to `path` as a whole or not at all. std::runtime_error naming `path`.
void write_file(const std::filesystem::path& path, const std::string& text);

}  // namespace demo
