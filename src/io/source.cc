#include "io/source.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/statfs.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

#include "io/limits.h"
#include "io/message.h"

namespace quantal::io {
namespace {

using safetensors::Access;
using safetensors::Bytes;

const char* file_kind(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "another kind of file";
}

bool mmap_forbidden() {
  const char* value = std::getenv("QUANTAL_NO_MMAP");
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

// On these another host can cut a mapped file short, which ends the process with SIGBUS.
bool is_network_file(int fd) {
  struct statfs info;
  if (::fstatfs(fd, &info) != 0) return true;
  constexpr std::uint32_t kCifs = 0xFF534D42, kSmb2 = 0xFE534D42, kLustre = 0x0BD00BD0;
  constexpr std::uint32_t kNetwork[] = {NFS_SUPER_MAGIC,  SMB_SUPER_MAGIC, CODA_SUPER_MAGIC,
                                        AFS_SUPER_MAGIC,  V9FS_MAGIC,      CEPH_SUPER_MAGIC,
                                        FUSE_SUPER_MAGIC, kCifs,           kSmb2,
                                        kLustre};
  const auto type = static_cast<std::uint32_t>(info.f_type);
  return std::find(std::begin(kNetwork), std::end(kNetwork), type) != std::end(kNetwork);
}

std::shared_ptr<std::byte> allocate(std::uint64_t size) {
  constexpr std::align_val_t kAlign{kDataAlignment};
  auto* data = static_cast<std::byte*>(::operator new(std::max<std::uint64_t>(size, 1), kAlign));
  return {data, [](std::byte* p) { ::operator delete(p, kAlign); }};
}

std::shared_ptr<const std::byte> map_file(FileOps& ops, int fd, std::uint64_t size) {
  void* address = ops.map(fd, size);
  if (address == MAP_FAILED) return nullptr;
  const auto unmap = [size](const std::byte* p) { ::munmap(const_cast<std::byte*>(p), size); };
  return {static_cast<const std::byte*>(address), unmap};
}

bool is_aligned(const std::byte* p, std::uint64_t alignment) {
  return reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
}

}  // namespace

Result<Source> Source::open(const std::string& path, Access access, FileOps& ops) {
  const Site site{.source = path};
  if (path.find('\0') != std::string::npos) {
    return failure(Errc::kInvalidArgument, site, "a path without NUL bytes", "one");
  }
  Source source;
  source.name_ = path;
  source.ops_ = &ops;
  // Non-blocking, so that a FIFO without a writer does not hang; without effect on regular files.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  const int fd = retry_interrupted([&] { return ops.open(path.c_str(), kFlags, 0); });
  if (fd < 0) return io_failure(site, "to open it", errno);
  source.file_ = Descriptor(ops, fd);
  struct stat info;
  if (ops.fstat(fd, &info) != 0) return io_failure(site, "to read its size", errno);
  if (!S_ISREG(info.st_mode)) {
    return failure(Errc::kIo, site, "a regular file", file_kind(info.st_mode));
  }
  source.size_ = static_cast<std::uint64_t>(info.st_size);
  const bool map = access == Access::kMap ||
                   (access == Access::kAuto && !mmap_forbidden() && !is_network_file(fd));
  if (map && source.size_ > 0) source.shared_ = map_file(ops, fd, source.size_);
  return source;
}

Source Source::from_memory(Bytes bytes) {
  Source source;
  source.name_ = "memory";
  source.size_ = bytes.size;
  source.shared_ = std::move(bytes.data);
  return source;
}

Status Source::check_not_shrunk() const {
  if (file_.get() < 0) return {};
  struct stat info;
  const Site site{.source = name_};
  if (ops_->fstat(file_.get(), &info) != 0) return io_failure(site, "to read its size", errno);
  if (static_cast<std::uint64_t>(info.st_size) >= size_) return {};
  return failure(Errc::kIo, site, "a file of " + std::to_string(size_) + " bytes, as when opened",
                 std::to_string(info.st_size));
}

Result<Bytes> Source::bytes(std::uint64_t offset, std::uint64_t size,
                            std::uint64_t alignment) const {
  if (shared_ == nullptr) return copy(offset, size);
  if (Status status = check_not_shrunk(); !status.ok()) return status;
  const std::byte* begin = shared_.get() + offset;
  if (!is_aligned(begin, alignment)) return copy(offset, size);
  return Bytes{std::shared_ptr<const std::byte>(shared_, begin), size};
}

Result<Bytes> Source::copy(std::uint64_t offset, std::uint64_t size) const {
  std::shared_ptr<std::byte> buffer = allocate(size);
  if (file_.get() < 0) {
    if (size > 0) std::memcpy(buffer.get(), shared_.get() + offset, size);
    return Bytes{std::move(buffer), size};
  }
  const Site site{.source = name_, .offset = offset};
  for (std::uint64_t done = 0; done < size;) {
    const ssize_t got = retry_interrupted([&] {
      return ops_->pread(file_.get(), buffer.get() + done, size - done,
                         static_cast<off_t>(offset + done));
    });
    const int error = errno;
    if (got < 0) return io_failure(site, "to read " + std::to_string(size) + " bytes", error);
    if (got == 0) {
      return failure(Errc::kIo, site, std::to_string(size) + " bytes",
                     "the end of the file after " + std::to_string(done));
    }
    done += static_cast<std::uint64_t>(got);
  }
  return Bytes{std::move(buffer), size};
}

}  // namespace quantal::io
