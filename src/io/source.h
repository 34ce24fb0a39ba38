#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <quantal/safetensors.h>

#include "io/file_ops.h"

namespace quantal::io {

/// Where a file's bytes come from: a mapping, a descriptor read by pread, or memory.
class Source {
 public:
  /// kIo unless `path` is a regular file; never blocks on one that is not.
  static Result<Source> open(const std::string& path, safetensors::Access access, FileOps& ops);
  static Source from_memory(safetensors::Bytes bytes);

  const std::string& name() const { return name_; }
  std::uint64_t size() const { return size_; }

  /// `size` bytes from `offset`, at an address that is a multiple of `alignment`: shared where
  /// possible, else a copy. Precondition: the range lies in the file as it was when opened.
  Result<safetensors::Bytes> bytes(std::uint64_t offset, std::uint64_t size,
                                   std::uint64_t alignment) const;

  /// The same, always a copy of what the file holds now: safe while others change the file.
  Result<safetensors::Bytes> copy(std::uint64_t offset, std::uint64_t size) const;

 private:
  Status check_not_shrunk() const;

  std::string name_;
  std::uint64_t size_ = 0;
  FileOps* ops_ = nullptr;
  Descriptor file_;                          // none for memory
  std::shared_ptr<const std::byte> shared_;  // the mapping or memory; null: read with pread
};

/// Reader::open() with system calls of the caller's choice, which must outlive the reader.
QUANTAL_API Result<safetensors::Reader> open_reader(const std::string& path,
                                                    const safetensors::ReadOptions& options,
                                                    FileOps& ops);

}  // namespace quantal::io
