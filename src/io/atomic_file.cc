#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "io/message.h"

namespace quantal::io {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxLinks = 40;                    // as Linux follows
constexpr int kNameAttempts = 16;                // for a temporary name that is free
constexpr std::size_t kKeptOfName = 200;         // leaves room for our suffix within NAME_MAX
constexpr std::uint64_t kMaxWrite = 1ull << 30;  // Linux writes less than 2 GiB a call

struct Target {
  fs::path file;
  fs::path folder;
  std::optional<mode_t> mode;  // of the file that is there
};

// The file that `path` names in the end, which need not be there.
Result<Target> find_target(const std::string& path) {
  const Site site{.source = path};
  if (path.empty() || path.find('\0') != std::string::npos) {
    return failure(Errc::kInvalidArgument, site, "a path to a file", "an empty one or a NUL byte");
  }
  Target target;
  target.file = path;
  for (int links = 0;; ++links) {
    target.folder = target.file.has_parent_path() ? target.file.parent_path() : fs::path(".");
    struct stat info;
    if (::lstat(target.file.c_str(), &info) != 0) {
      if (errno == ENOENT && target.file.has_filename()) return target;
      return io_failure(site, "to write a file there", errno);
    }
    if (S_ISREG(info.st_mode)) {
      target.mode = info.st_mode & 0777;
      return target;
    }
    if (!S_ISLNK(info.st_mode)) {
      return io_failure(site, "a regular file to replace", S_ISDIR(info.st_mode) ? EISDIR : EINVAL);
    }
    if (links == kMaxLinks) return io_failure(site, "to follow its links", ELOOP);
    std::error_code error;
    const fs::path next = fs::read_symlink(target.file, error);
    if (error) return io_failure(site, "to follow its links", error.value());
    target.file = target.folder / next;  // an absolute `next` replaces the folder
  }
}

std::string temporary_name(const fs::path& file) {
  std::uint64_t random = 0;
  if (::getrandom(&random, sizeof(random), GRND_NONBLOCK) != sizeof(random)) {
    random =
        static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  std::string name = ".";
  name += std::string_view(file.filename().native()).substr(0, kKeptOfName);
  name += ".quantal-";
  name += std::to_string(::getpid());
  name += '-';
  name += std::to_string(random);
  return name += ".tmp";
}

// A file in the making, gone with its object unless it was moved to its place.
class TemporaryFile {
 public:
  TemporaryFile(FileOps& ops, const Site& site) : ops_(ops), site_(site) {}
  ~TemporaryFile() {
    file_.close();
    if (!path_.empty()) ops_.unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  Status create(const Target& target) {
    // The kernel applies the umask; reading it would race with other threads.
    constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
    const mode_t mode = target.mode ? 0600 : 0666;
    int fd = -1;
    int error = EEXIST;
    for (int i = 0; i < kNameAttempts && fd < 0 && error == EEXIST; ++i) {
      std::string path = (target.folder / temporary_name(target.file)).string();
      fd = retry_interrupted([&] { return ops_.open(path.c_str(), kFlags, mode); });
      error = errno;
      if (fd >= 0) path_ = std::move(path);
    }
    if (fd < 0) return io_failure(site_, "to create a temporary file beside it", error);
    file_ = Descriptor(ops_, fd);
    if (target.mode && ops_.fchmod(fd, *target.mode) != 0) {
      return io_failure(site_, "to keep its permissions", errno);
    }
    return {};
  }

  Status fill(std::span<const Chunk> chunks) {
    std::uint64_t total = 0;
    for (const Chunk& chunk : chunks) total += chunk.size;
    if (Status status = reserve(total); !status.ok()) return status;
    for (const Chunk& chunk : chunks) {
      if (Status status = write_all(chunk); !status.ok()) return status;
    }
    struct stat info;
    if (ops_.fstat(file_.get(), &info) != 0) return io_failure(site_, "to read its size", errno);
    if (static_cast<std::uint64_t>(info.st_size) == total) return {};
    return failure(Errc::kIo, site_, std::to_string(total) + " bytes written",
                   std::to_string(info.st_size));
  }

  Status move_to(const Target& target) {
    if (retry_interrupted([&] { return ops_.fsync(file_.get()); }) != 0) {
      return io_failure(site_, "to sync it", errno);
    }
    if (file_.close() != 0) return io_failure(site_, "to close it", errno);
    if (ops_.rename(path_.c_str(), target.file.c_str()) != 0) {
      return io_failure(site_, "to move the new file there", errno);
    }
    path_.clear();
    return {};
  }

 private:
  // Fails now where the disk is too small, not after gigabytes.
  Status reserve(std::uint64_t total) {
    if (total == 0) return {};
    const int result =
        retry_interrupted([&] { return ops_.allocate(file_.get(), static_cast<off_t>(total)); });
    const int error = errno;
    if (result == 0 || error == EOPNOTSUPP || error == ENOSYS) return {};
    return io_failure(site_, "room for " + std::to_string(total) + " bytes", error);
  }

  Status write_all(const Chunk& chunk) {
    const auto* data = static_cast<const std::byte*>(chunk.data);
    for (std::uint64_t done = 0; done < chunk.size;) {
      const std::uint64_t size = std::min(chunk.size - done, kMaxWrite);
      const ssize_t wrote =
          retry_interrupted([&] { return ops_.write(file_.get(), data + done, size); });
      // Zero says that no byte can be written, and sets no errno.
      const int error = wrote == 0 ? EIO : errno;
      if (wrote <= 0) {
        return io_failure(site_, "to write " + std::to_string(size) + " bytes", error);
      }
      done += static_cast<std::uint64_t>(wrote);
    }
    return {};
  }

  FileOps& ops_;
  Site site_;
  Descriptor file_;
  std::string path_;
};

}  // namespace

Status write_file_atomic(const std::string& path, std::span<const Chunk> chunks, FileOps& ops) {
  const Site site{.source = path};
  Result<Target> target = find_target(path);
  if (!target.ok()) return target.status();

  // Opened first: when this fails the old file is still there.
  const char* folder_path = target.value().folder.c_str();
  constexpr int kFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
  const int fd = retry_interrupted([&] { return ops.open(folder_path, kFlags, 0); });
  if (fd < 0) return io_failure(site, "to open its folder", errno);
  Descriptor folder(ops, fd);

  TemporaryFile file(ops, site);
  if (Status status = file.create(target.value()); !status.ok()) return status;
  if (Status status = file.fill(chunks); !status.ok()) return status;
  if (Status status = file.move_to(target.value()); !status.ok()) return status;

  // EINVAL: a file system that cannot sync folders.
  if (retry_interrupted([&] { return ops.fsync(folder.get()); }) != 0 && errno != EINVAL) {
    return io_failure(site, "to sync its folder (the new file is in place)", errno);
  }
  return {};
}

}  // namespace quantal::io
