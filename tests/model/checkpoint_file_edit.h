#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include <quantal/safetensors.h>

namespace quantal {

/// A safetensors file in memory, for tests that change one thing of it.
struct EditableFile {
  struct Entry {
    safetensors::Dtype dtype;
    std::vector<std::uint64_t> shape;
    std::string bytes;
  };
  std::map<std::string, Entry> tensors;
  safetensors::Metadata metadata;

  static EditableFile read(const std::string& path) {
    auto reader = safetensors::Reader::open(path);
    TORCH_CHECK(reader.ok(), reader.status().message());
    EditableFile file;
    file.metadata = reader.value().metadata();
    for (const auto& info : reader.value().tensors()) {
      const auto bytes = reader.value().data(info).value();
      file.tensors[info.name] = {
          info.dtype, info.shape,
          std::string(reinterpret_cast<const char*>(bytes.data.get()), bytes.size)};
    }
    return file;
  }

  void write(const std::string& path) const {
    std::vector<safetensors::TensorView> views;
    for (const auto& [name, e] : tensors) {
      views.push_back({name, e.dtype, e.shape, e.bytes.data(), e.bytes.size()});
    }
    const Status status = safetensors::write(path, views, metadata);
    TORCH_CHECK(status.ok(), status.message());
  }

  /// Replaces a tensor by fp32 values.
  void set(const std::string& name, const std::vector<std::uint64_t>& shape,
           const std::vector<float>& values) {
    std::string bytes(values.size() * sizeof(float), '\0');
    std::memcpy(bytes.data(), values.data(), bytes.size());
    tensors[name] = {safetensors::Dtype::kF32, shape, std::move(bytes)};
  }

  void rename(const std::string& from, const std::string& to) {
    auto node = tensors.extract(from);
    node.key() = to;
    tensors.insert(std::move(node));
  }
};

}  // namespace quantal
