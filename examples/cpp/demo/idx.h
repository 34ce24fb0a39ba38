#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace demo {

/// An array of unsigned bytes, as the files of MNIST and its kin hold it.
struct Idx {
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;  ///< row-major
};

/// Reads an IDX file, plain or gzipped. `dims`: how many dimensions it is to have.
/// std::runtime_error that names the file: cannot be read, another magic number, other dimensions,
/// shorter or longer than its header says, damaged gzip data.
Idx read_idx(const std::filesystem::path& path, int dims);

/// The file of this name in `folder`, plain or with ".gz". std::runtime_error where neither is
/// there.
std::filesystem::path find_idx(const std::filesystem::path& folder, const std::string& name);

}  // namespace demo
