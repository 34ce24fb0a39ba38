#include "io/file_ops.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

namespace quantal::io {

int FileOps::open(const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); }

int FileOps::close(int fd) { return ::close(fd); }

int FileOps::fstat(int fd, struct stat* out) { return ::fstat(fd, out); }

ssize_t FileOps::pread(int fd, void* out, std::size_t size, off_t offset) {
  return ::pread(fd, out, size, offset);
}

// Private and writable: a tensor on a mapping may be changed in place without changing the file.
void* FileOps::map(int fd, std::size_t size) {
  return ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
}

int FileOps::fchmod(int fd, mode_t mode) { return ::fchmod(fd, mode); }

// Not posix_fallocate: where the file system cannot, glibc writes to every block in its stead.
int FileOps::allocate(int fd, off_t size) { return ::fallocate(fd, 0, 0, size); }

ssize_t FileOps::write(int fd, const void* data, std::size_t size) {
  return ::write(fd, data, size);
}

int FileOps::fsync(int fd) { return ::fsync(fd); }

int FileOps::rename(const char* from, const char* to) { return ::rename(from, to); }

int FileOps::unlink(const char* path) { return ::unlink(path); }

FileOps& os_file_ops() {
  static FileOps ops;
  return ops;
}

Descriptor::Descriptor(Descriptor&& other) noexcept
    : ops_(other.ops_), fd_(std::exchange(other.fd_, -1)) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(ops_, other.ops_);
  std::swap(fd_, other.fd_);
  return *this;
}

Descriptor::~Descriptor() { close(); }

int Descriptor::close() {
  if (fd_ < 0) return 0;
  const int result = ops_->close(std::exchange(fd_, -1));
  return result == -1 && errno == EINTR ? 0 : result;
}

}  // namespace quantal::io
