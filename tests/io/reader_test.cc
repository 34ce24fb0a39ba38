#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <gmock/gmock.h>

#include "corpus/corpus.h"
#include "io/scratch.h"
#include "io/source.h"

namespace quantal::io {
namespace {

using corpus::file;
using safetensors::Access;
using safetensors::Bytes;
using safetensors::Dtype;
using safetensors::Reader;
using safetensors::TensorInfo;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kTwoTensors[] = R"({"__metadata__":{"z":"1","a":"\u00e9"},)"
                               R"("later":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},)"
                               R"("first":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}  )";

std::string two_tensors() { return file(kTwoTensors, "\1\2\3\4\5\6\7\10abc"); }

Result<Reader> open_memory(const std::string& bytes) {
  return Reader::from_memory(to_bytes(bytes));
}

TEST(Reader, lists_tensors_in_file_order) {
  const Result<Reader> opened = open_memory(two_tensors());
  ASSERT_OK(opened.status());
  const Reader& reader = opened.value();
  ASSERT_EQ(reader.tensors().size(), 2u);
  const TensorInfo& first = reader.tensors()[0];
  EXPECT_EQ(first.name, "first");
  EXPECT_EQ(first.dtype, Dtype::kF32);
  EXPECT_THAT(first.shape, ElementsAre(1, 2));
  EXPECT_EQ(first.begin, 0u);
  EXPECT_EQ(first.end, 8u);
  EXPECT_EQ(reader.tensors()[1].name, "later");
  EXPECT_EQ(reader.find("later"), &reader.tensors()[1]);
  EXPECT_EQ(reader.find("Later"), nullptr);
  EXPECT_EQ(reader.find(""), nullptr);
  EXPECT_THAT(reader.metadata(), ElementsAre(std::pair("a", "\xC3\xA9"), std::pair("z", "1")));
}

TEST(Reader, gives_the_bytes_by_name_and_by_info) {
  const Result<Reader> reader = open_memory(two_tensors());
  ASSERT_OK(reader.status());
  const Result<Bytes> bytes = reader.value().data("later");
  ASSERT_OK(bytes.status());
  EXPECT_EQ(to_string(bytes.value()), "abc");
  const Status missing = reader.value().data("other").status();
  EXPECT_EQ(missing.code(), Errc::kMissingTensor);
  EXPECT_THAT(missing.message(), HasSubstr("tensor 'other'"));
}

TEST(Reader, refuses_a_tensor_of_another_file) {
  const Result<Reader> reader = open_memory(two_tensors());
  ASSERT_OK(reader.status());
  const auto code = [&](std::uint64_t begin, std::uint64_t end) {
    return reader.value().data(TensorInfo{"x", Dtype::kU8, {}, begin, end}).status().code();
  };
  EXPECT_EQ(code(0, 12), Errc::kInvalidArgument);
  EXPECT_EQ(code(2, 1), Errc::kInvalidArgument);
  EXPECT_EQ(code(~0ull - 1, ~0ull), Errc::kInvalidArgument);
  EXPECT_EQ(code(11, 11), Errc::kOk);
}

TEST(Reader, shares_aligned_memory_and_copies_the_rest) {
  for (const int shift : {0, 1}) {
    // Chosen so that `first` begins at a multiple of 8 from the file's start when shift is 0.
    std::string json = kTwoTensors;
    json.append((8 - json.size() % 8) % 8 + static_cast<std::size_t>(shift), ' ');
    const Bytes bytes = to_bytes(file(json, "\1\2\3\4\5\6\7\10abc"));
    const Result<Reader> reader = Reader::from_memory(bytes);
    ASSERT_OK(reader.status());
    const Result<Bytes> first = reader.value().data("first");
    ASSERT_OK(first.status());
    EXPECT_EQ(to_string(first.value()), "\1\2\3\4\5\6\7\10");
    const bool shared = first.value().data.get() == bytes.data.get() + 8 + json.size();
    EXPECT_EQ(shared, shift == 0);
  }
}

TEST(Reader, bytes_outlive_the_reader) {
  Scratch scratch;
  spit(scratch.path(), two_tensors());
  for (const Access access : {Access::kAuto, Access::kMap, Access::kRead}) {
    Bytes bytes;
    {
      const Result<Reader> reader = Reader::open(scratch.path(), {.access = access});
      ASSERT_OK(reader.status());
      bytes = reader.value().data("first").value();
    }
    EXPECT_EQ(to_string(bytes), "\1\2\3\4\5\6\7\10");
  }
}

TEST(Reader, writing_into_a_mapping_leaves_the_file) {
  Scratch scratch;
  std::string json = kTwoTensors;
  json.append((8 - json.size() % 8) % 8, ' ');
  spit(scratch.path(), file(json, "\1\2\3\4\5\6\7\10abc"));
  const Result<Reader> reader = Reader::open(scratch.path(), {.access = Access::kMap});
  ASSERT_OK(reader.status());
  const Bytes bytes = reader.value().data("first").value();
  const_cast<std::byte&>(*bytes.data) = std::byte{99};
  EXPECT_EQ(slurp(scratch.path()), file(json, "\1\2\3\4\5\6\7\10abc"));
}

TEST(Reader, strict_refuses_unknown_fields) {
  const std::string bytes =
      file(R"({"t":{"dtype":"U8","x":{"y":[1]},"shape":[1],"data_offsets":[0,1]}})", "x");
  const Result<Reader> lenient = open_memory(bytes);
  ASSERT_OK(lenient.status());
  EXPECT_THAT(lenient.value().warnings(), ElementsAre("unknown field 'x' of tensor 't'"));
  const Status strict = Reader::from_memory(to_bytes(bytes), {.strict = true}).status();
  EXPECT_EQ(strict.code(), Errc::kUnknownField);
  EXPECT_THAT(strict.message(), HasSubstr("'x'"));
}

TEST(Reader, warnings_are_few) {
  std::string json = R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1])";
  for (int i = 0; i < 1000; ++i) json += ",\"x" + std::to_string(i) + "\":0";
  const Result<Reader> reader = open_memory(file(json + "}}", "x"));
  ASSERT_OK(reader.status());
  EXPECT_EQ(reader.value().warnings().size(), 16u);
}

TEST(Reader, messages_have_no_raw_bytes) {
  const Status status = open_memory(file("{\"a\\u0007\\u0000" + std::string(3000, 'b') +
                                         "\":{\"dtype\":\"\\u001b[2J\"}}"))
                            .status();
  EXPECT_EQ(status.code(), Errc::kUnsupportedDtype);
  EXPECT_THAT(status.message(), HasSubstr("'a\\x07\\x00bbb"));
  EXPECT_THAT(status.message(), HasSubstr("'\\x1b[2J'"));
  EXPECT_LT(status.message().size(), 400u);
}

TEST(Reader, refuses_what_is_no_regular_file) {
  Scratch scratch;
  const auto status = [&](const std::string& path) { return Reader::open(path).status(); };
  ASSERT_EQ(::mkfifo(scratch.path("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::symlink("loop", scratch.path("loop").c_str()), 0);
  const std::string long_path(5000, 'p');
  for (const std::string& path :
       {scratch.folder().string(), scratch.path("fifo"), scratch.path("loop"),
        scratch.path("missing"), std::string("/dev/zero"), long_path, std::string(),
        scratch.path("\xFF\xFE")}) {
    EXPECT_EQ(status(path).code(), Errc::kIo) << path;
    EXPECT_FALSE(status(path).message().empty());
  }
  EXPECT_THAT(status(scratch.folder()).message(), HasSubstr("a directory"));
  EXPECT_THAT(status(scratch.path("fifo")).message(), HasSubstr("a FIFO"));
  EXPECT_THAT(status(scratch.path("missing")).message(), HasSubstr("errno 2"));
  EXPECT_EQ(status(std::string("a\0b", 3)).code(), Errc::kInvalidArgument);
}

TEST(Reader, refuses_a_file_without_permission) {
  Scratch scratch;
  spit(scratch.path(), two_tensors());
  ASSERT_EQ(::chmod(scratch.folder().c_str(), 0755), 0);
  ASSERT_EQ(::chmod(scratch.path().c_str(), 0), 0);
  const bool root = ::geteuid() == 0;
  ASSERT_EQ(root ? ::seteuid(65534) : 0, 0);
  const Status status = Reader::open(scratch.path()).status();
  ASSERT_EQ(root ? ::seteuid(0) : 0, 0);
  EXPECT_EQ(status.code(), Errc::kIo);
  EXPECT_THAT(status.message(), HasSubstr("errno 13"));
}

TEST(Reader, refuses_no_memory) {
  EXPECT_EQ(Reader::from_memory({}).status().code(), Errc::kHeaderTooSmall);
  EXPECT_EQ(Reader::from_memory({.size = 100}).status().code(), Errc::kInvalidArgument);
}

TEST(Reader, notices_a_file_that_shrank) {
  Scratch scratch;
  for (const Access access : {Access::kMap, Access::kRead}) {
    spit(scratch.path(), two_tensors());
    const Result<Reader> reader = Reader::open(scratch.path(), {.access = access});
    ASSERT_OK(reader.status());
    ASSERT_EQ(::truncate(scratch.path().c_str(), 20), 0);
    EXPECT_EQ(reader.value().data("later").status().code(), Errc::kIo);
  }
}

TEST(Reader, a_header_at_the_limit_is_read) {
  Scratch scratch;
  spit(scratch.path(), corpus::file_of_length(100'000'000, "{}"));
  ASSERT_EQ(::truncate(scratch.path().c_str(), 100'000'008), 0);
  const Status status = Reader::open(scratch.path()).status();
  EXPECT_EQ(status.code(), Errc::kInvalidJson);  // the hole reads as NUL bytes
  EXPECT_THAT(status.message(), HasSubstr("offset 2"));
}

TEST(Reader, many_tiny_tensors) {
  constexpr int kCount = 100'000;
  std::string json = "{";
  for (int i = 0; i < kCount; ++i) {
    json += (i == 0 ? "\"" : ",\"") + std::to_string(i * 7919 % kCount) +
            R"(":{"dtype":"U8","shape":[],"data_offsets":[)" + std::to_string(i) + "," +
            std::to_string(i + 1) + "]}";
  }
  const Result<Reader> reader = open_memory(file(json + "}", std::string(kCount, 'x')));
  ASSERT_OK(reader.status());
  ASSERT_EQ(reader.value().tensors().size(), static_cast<std::size_t>(kCount));
  EXPECT_EQ(reader.value().find("7919")->begin, 1u);
}

TEST(Reader, metadata_is_bounded) {
  std::string json = R"({"__metadata__":{)";
  for (int i = 0; i <= 1 << 18; ++i) json += (i ? ",\"" : "\"") + std::to_string(i) + "\":\"\"";
  EXPECT_EQ(open_memory(file(json + "}}")).status().code(), Errc::kLimitExceeded);
}

// Signals, short reads and an mmap that the system refuses.
class AwkwardOps : public FileOps {
 public:
  void* map(int, std::size_t) override {
    errno = ENODEV;
    return MAP_FAILED;
  }
  ssize_t pread(int fd, void* out, std::size_t size, off_t offset) override {
    if (++calls % 2 == 0) {
      errno = EINTR;
      return -1;
    }
    return FileOps::pread(fd, out, std::min<std::size_t>(size, 3), offset);
  }
  int calls = 0;
};

TEST(Reader, reads_where_the_system_is_awkward) {
  Scratch scratch;
  spit(scratch.path(), two_tensors());
  AwkwardOps ops;
  const Result<Reader> reader = open_reader(scratch.path(), {.access = Access::kMap}, ops);
  ASSERT_OK(reader.status());
  EXPECT_EQ(to_string(reader.value().data("first").value()), "\1\2\3\4\5\6\7\10");
  EXPECT_GT(ops.calls, 10);
}

class CountingOps : public FileOps {
 public:
  void* map(int fd, std::size_t size) override {
    ++maps;
    return FileOps::map(fd, size);
  }
  int fstat(int fd, struct stat* out) override {
    errno = EIO;
    return ++stats == failing_stat ? -1 : FileOps::fstat(fd, out);
  }
  ssize_t pread(int fd, void* out, std::size_t size, off_t offset) override {
    errno = EIO;
    return ++reads == failing_read ? -1 : FileOps::pread(fd, out, size, offset);
  }
  int maps = 0, stats = 0, reads = 0, failing_stat = 0, failing_read = 0;
};

TEST(Reader, every_failing_read_is_an_io_error) {
  Scratch scratch;
  spit(scratch.path(), two_tensors());
  const auto run = [&](Access access, int stat, int read) {
    CountingOps ops;
    ops.failing_stat = stat;
    ops.failing_read = read;
    const Result<Reader> reader = open_reader(scratch.path(), {.access = access}, ops);
    return reader.ok() ? read_all(reader.value()).code() : reader.status().code();
  };
  for (const int call : {1, 2, 3}) EXPECT_EQ(run(Access::kMap, call, 0), Errc::kIo) << call;
  for (const int call : {1, 2, 3, 4}) EXPECT_EQ(run(Access::kRead, 0, call), Errc::kIo) << call;
  EXPECT_EQ(run(Access::kRead, 0, 5), Errc::kOk);
}

TEST(Reader, the_environment_can_forbid_mmap) {
  Scratch scratch;
  spit(scratch.path(), two_tensors());
  const auto maps = [&](Access access, const char* value) {
    value == nullptr ? ::unsetenv("QUANTAL_NO_MMAP") : ::setenv("QUANTAL_NO_MMAP", value, 1);
    CountingOps ops;
    EXPECT_TRUE(open_reader(scratch.path(), {.access = access}, ops).ok());
    ::unsetenv("QUANTAL_NO_MMAP");
    return ops.maps;
  };
  EXPECT_EQ(maps(Access::kAuto, "1"), 0);
  EXPECT_EQ(maps(Access::kRead, nullptr), 0);
  EXPECT_EQ(maps(Access::kMap, "1"), 1);  // what the program asks for goes first
}

}  // namespace
}  // namespace quantal::io
