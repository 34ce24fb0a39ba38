#include "idx.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

namespace demo {
namespace {

// Far above any data set of this kind; a damaged header must not ask for all the memory.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 32;
constexpr std::size_t kChunk = std::size_t{1} << 20;

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

// zlib reads plain files as they are, so one reader serves both.
class Stream {
 public:
  explicit Stream(const std::filesystem::path& path)
      : path_(path), file_(gzopen(path.c_str(), "rb"), gzclose) {
    if (!file_) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  }

  /// Reads up to `size` bytes; fewer only at the end.
  std::size_t read(std::uint8_t* to, std::size_t size) {
    const int got = gzread(file_.get(), to, static_cast<unsigned>(size));
    int code = Z_OK;
    const char* message = gzerror(file_.get(), &code);
    if (code == Z_BUF_ERROR) fail(path_, "truncated: its gzip data end too early");
    if (code == Z_ERRNO) fail(path_, std::string("cannot be read: ") + std::strerror(errno));
    if (got < 0) fail(path_, std::string("damaged gzip data: ") + message);
    return static_cast<std::size_t>(got);
  }

 private:
  const std::filesystem::path& path_;
  std::unique_ptr<gzFile_s, decltype(&gzclose)> file_;
};

// Magic number: two zeros, the element type (8: unsigned byte), the number of dimensions.
void check_magic(const std::filesystem::path& path, const std::array<std::uint8_t, 4>& magic,
                 int dims) {
  const std::array<std::uint8_t, 4> expected = {0, 0, 8, static_cast<std::uint8_t>(dims)};
  if (magic == expected) return;
  std::array<char, 80> text{};
  std::snprintf(text.data(), text.size(),
                "wrong magic number: expected 000008%02x, got %02x%02x%02x%02x", dims, magic[0],
                magic[1], magic[2], magic[3]);
  fail(path, text.data());
}

std::int64_t element_count(const std::filesystem::path& path,
                           const std::vector<std::int64_t>& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    if (size != 0 && count > kMostBytes / size) fail(path, "its header asks for over 4 GiB");
    count *= size;
  }
  return count;
}

void read_elements(Stream& stream, const std::filesystem::path& path, std::int64_t count,
                   std::vector<std::uint8_t>& bytes) {
  const auto wanted = static_cast<std::size_t>(count);
  while (bytes.size() < wanted) {
    const std::size_t have = bytes.size();
    const std::size_t chunk = std::min(kChunk, wanted - have);
    bytes.resize(have + chunk);
    const std::size_t got = stream.read(bytes.data() + have, chunk);
    if (got < chunk) {
      fail(path, "truncated: its header says " + std::to_string(count) + " elements, it has " +
                     std::to_string(have + got));
    }
  }
  std::uint8_t extra = 0;
  if (stream.read(&extra, 1) != 0) {
    fail(path, "longer than the " + std::to_string(count) + " elements that its header says");
  }
}

}  // namespace

Idx read_idx(const std::filesystem::path& path, int dims) {
  Stream stream(path);
  std::array<std::uint8_t, 4> word{};
  if (stream.read(word.data(), word.size()) < word.size()) fail(path, "truncated: no IDX header");
  check_magic(path, word, dims);
  Idx idx;
  for (int i = 0; i < dims; ++i) {
    if (stream.read(word.data(), word.size()) < word.size()) {
      fail(path, "truncated: its header ends too early");
    }
    idx.shape.push_back(std::int64_t{word[0]} << 24 | word[1] << 16 | word[2] << 8 | word[3]);
  }
  read_elements(stream, path, element_count(path, idx.shape), idx.bytes);
  return idx;
}

std::filesystem::path find_idx(const std::filesystem::path& folder, const std::string& name) {
  for (const char* suffix : {"", ".gz"}) {
    const std::filesystem::path path = folder / (name + suffix);
    if (std::filesystem::exists(path)) return path;
  }
  fail(folder / name, "no such file, nor with .gz");
}

}  // namespace demo
