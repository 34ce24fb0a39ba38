#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include <quantal/api.h>

namespace quantal::io {

/// The system calls of the library, so that tests can make each of them fail. Returns and errno as
/// the calls themselves.
class QUANTAL_API FileOps {
 public:
  virtual ~FileOps() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual int close(int fd);
  virtual int fstat(int fd, struct stat* out);
  virtual ssize_t pread(int fd, void* out, std::size_t size, off_t offset);
  virtual void* map(int fd, std::size_t size);
  virtual int fchmod(int fd, mode_t mode);
  virtual int allocate(int fd, off_t size);
  virtual ssize_t write(int fd, const void* data, std::size_t size);
  virtual int fsync(int fd);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);
};

/// The operating system's.
QUANTAL_API FileOps& os_file_ops();

/// Repeats a call that a signal interrupted.
template <typename Call>
auto retry_interrupted(Call call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

/// Owns a descriptor.
class QUANTAL_API Descriptor {
 public:
  Descriptor() = default;
  Descriptor(FileOps& ops, int fd) : ops_(&ops), fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();

  int get() const { return fd_; }
  /// As ::close(), but a signal is no error: Linux has closed the descriptor by then.
  int close();

 private:
  FileOps* ops_ = nullptr;
  int fd_ = -1;
};

}  // namespace quantal::io
