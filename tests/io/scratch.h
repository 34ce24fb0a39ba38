#pragma once

#include <stdlib.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <quantal/safetensors.h>

namespace quantal::io {

/// A folder that lives as long as its object.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "quantal-io-XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::permissions(folder_, std::filesystem::perms::owner_all, ignored);
    std::filesystem::remove_all(folder_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::string path(const std::string& name = "model.safetensors") const {
    return (folder_ / name).string();
  }
  const std::filesystem::path& folder() const { return folder_; }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

 private:
  std::filesystem::path folder_;
};

inline void spit(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// `text` as bytes of the caller's: exactly that long, so that a sanitizer sees any overrun.
inline safetensors::Bytes to_bytes(const std::string& text) {
  std::shared_ptr<std::byte[]> owner(new std::byte[text.size()]);
  std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), owner.get());
  return {std::shared_ptr<const std::byte>(owner, owner.get()), text.size()};
}

inline std::string to_string(const safetensors::Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data.get()), bytes.size};
}

/// The first error that reading every tensor gives.
inline Status read_all(const safetensors::Reader& reader) {
  for (const safetensors::TensorInfo& info : reader.tensors()) {
    const Result<safetensors::Bytes> bytes = reader.data(info);
    if (!bytes.ok()) return bytes.status();
    EXPECT_EQ(bytes.value().size, info.size());
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.value().data.get());
    EXPECT_EQ(address % std::max(1, safetensors::dtype_bits(info.dtype) / 8), 0u);
    unsigned sum = 0;  // touches every byte, for the sanitizers
    for (std::uint64_t i = 0; i < info.size(); ++i) {
      sum += std::to_integer<unsigned>(bytes.value().data.get()[i]);
    }
    EXPECT_LE(sum, 255u * info.size());
  }
  return {};
}

/// A byte tensor; `data` must outlive it.
inline safetensors::TensorView bytes_tensor(std::string name, const std::string& data) {
  return {.name = std::move(name),
          .dtype = safetensors::Dtype::kU8,
          .shape = {data.size()},
          .data = data.data(),
          .size = data.size()};
}

#define ASSERT_OK(expression)                             \
  do {                                                    \
    const ::quantal::Status ok_status_ = expression;      \
    ASSERT_TRUE(ok_status_.ok()) << ok_status_.message(); \
  } while (false)

}  // namespace quantal::io
