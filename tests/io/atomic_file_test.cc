#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>

#include <gmock/gmock.h>

#include "io/scratch.h"

namespace quantal::io {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

enum class Op { kOpen, kClose, kStat, kChmod, kAllocate, kWrite, kSync, kRename };
constexpr Op kOps[] = {Op::kOpen,     Op::kClose, Op::kStat, Op::kChmod,
                       Op::kAllocate, Op::kWrite, Op::kSync, Op::kRename};

// Fails the n-th call of one kind.
class FailingOps : public FileOps {
 public:
  FailingOps(Op op, int call, int error) : op_(op), call_(call), error_(error) {}

  bool failed() const { return calls_ >= call_; }

  int open(const char* path, int flags, mode_t mode) override {
    return fails(Op::kOpen) ? -1 : FileOps::open(path, flags, mode);
  }
  int close(int fd) override {
    const int result = FileOps::close(fd);  // Linux closes even where it reports an error
    return fails(Op::kClose) ? -1 : result;
  }
  int fstat(int fd, struct stat* out) override {
    return fails(Op::kStat) ? -1 : FileOps::fstat(fd, out);
  }
  int fchmod(int fd, mode_t mode) override {
    return fails(Op::kChmod) ? -1 : FileOps::fchmod(fd, mode);
  }
  int allocate(int fd, off_t size) override {
    return fails(Op::kAllocate) ? -1 : FileOps::allocate(fd, size);
  }
  ssize_t write(int fd, const void* data, std::size_t size) override {
    return fails(Op::kWrite) ? -1 : FileOps::write(fd, data, std::min<std::size_t>(size, 5));
  }
  int fsync(int fd) override { return fails(Op::kSync) ? -1 : FileOps::fsync(fd); }
  int rename(const char* from, const char* to) override {
    return fails(Op::kRename) ? -1 : FileOps::rename(from, to);
  }

 private:
  bool fails(Op op) {
    if (op != op_ || ++calls_ != call_) return false;
    errno = error_;
    return true;
  }

  Op op_;
  int call_;
  int error_;
  int calls_ = 0;
};

class AtomicFile : public testing::Test {
 protected:
  Status save(FileOps& ops = os_file_ops()) { return save_to(scratch_.path("f"), ops); }
  Status save_to(const std::string& path, FileOps& ops = os_file_ops()) {
    const Chunk chunks[] = {{"hello ", 6}, {"", 0}, {"new world", 9}};
    return write_file_atomic(path, chunks, ops);
  }
  static mode_t mode_of(const std::string& path) {
    struct stat info = {};
    EXPECT_EQ(::stat(path.c_str(), &info), 0);
    return info.st_mode & 07777;
  }

  Scratch scratch_;
};

TEST_F(AtomicFile, creates_and_replaces) {
  ASSERT_OK(save());
  EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
  spit(scratch_.path("f"), std::string(1000, 'o'));
  ASSERT_OK(save());
  EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
  EXPECT_THAT(scratch_.names(), ElementsAre("f"));
  ASSERT_OK(write_file_atomic(scratch_.path("f"), {}));
  EXPECT_EQ(slurp(scratch_.path("f")), "");
}

// Every call in turn fails; the last round of a kind has none left to fail.
TEST_F(AtomicFile, any_failing_call_leaves_the_old_file) {
  for (const Op op : kOps) {
    int call = 0;
    for (bool failed = true; failed;) {
      SCOPED_TRACE("op " + std::to_string(static_cast<int>(op)) + ", call " +
                   std::to_string(++call));
      spit(scratch_.path("f"), "old");
      FailingOps ops(op, call, EIO);
      const Status status = save(ops);
      failed = ops.failed();
      EXPECT_THAT(scratch_.names(), ElementsAre("f"));
      const bool folder_synced_last = op == Op::kSync && call == 2;
      const bool folder_closed_last = op == Op::kClose && call == 2;
      if (!failed || folder_closed_last) {
        EXPECT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
        continue;
      }
      EXPECT_EQ(status.code(), Errc::kIo);
      EXPECT_THAT(status.message(), HasSubstr("errno 5"));
      EXPECT_THAT(status.message(), HasSubstr("/f'"));
      EXPECT_EQ(slurp(scratch_.path("f")), folder_synced_last ? "hello new world" : "old");
    }
    EXPECT_GT(call, 1) << "the operation was never called";
  }
}

TEST_F(AtomicFile, a_full_disk_is_an_error) {
  for (const Op op : {Op::kAllocate, Op::kWrite, Op::kSync}) {
    for (const int error : {ENOSPC, EDQUOT}) {
      spit(scratch_.path("f"), "old");
      FailingOps ops(op, 1, error);
      EXPECT_EQ(save(ops).code(), Errc::kIo);
      EXPECT_EQ(slurp(scratch_.path("f")), "old");
      EXPECT_THAT(scratch_.names(), ElementsAre("f"));
    }
  }
}

TEST_F(AtomicFile, interrupted_calls_are_repeated) {
  for (const Op op : {Op::kOpen, Op::kAllocate, Op::kWrite, Op::kSync, Op::kClose}) {
    FailingOps ops(op, 1, EINTR);
    ASSERT_OK(save(ops));
    EXPECT_TRUE(ops.failed());
    EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
  }
}

TEST_F(AtomicFile, file_systems_without_allocate_or_folder_sync_are_fine) {
  FailingOps no_allocate(Op::kAllocate, 1, EOPNOTSUPP);
  ASSERT_OK(save(no_allocate));
  FailingOps no_folder_sync(Op::kSync, 2, EINVAL);
  ASSERT_OK(save(no_folder_sync));
  EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
}

TEST_F(AtomicFile, a_taken_temporary_name_is_tried_anew) {
  FailingOps ops(Op::kOpen, 2, EEXIST);
  ASSERT_OK(save(ops));
  EXPECT_TRUE(ops.failed());
}

TEST_F(AtomicFile, a_write_of_nothing_is_an_error) {
  struct : FileOps {
    ssize_t write(int, const void*, std::size_t) override { return 0; }
  } ops;
  spit(scratch_.path("f"), "old");
  EXPECT_EQ(save(ops).code(), Errc::kIo);
  EXPECT_EQ(slurp(scratch_.path("f")), "old");
  EXPECT_THAT(scratch_.names(), ElementsAre("f"));
}

TEST_F(AtomicFile, lost_bytes_are_noticed) {
  struct : FileOps {
    ssize_t write(int, const void*, std::size_t size) override {
      return static_cast<ssize_t>(size);
    }
    int allocate(int, off_t) override { return 0; }
  } ops;
  EXPECT_EQ(save(ops).code(), Errc::kIo);
  EXPECT_THAT(scratch_.names(), ElementsAre());
}

TEST_F(AtomicFile, the_file_size_limit_is_an_error) {
  spit(scratch_.path("f"), "old");
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {10, 10};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::_exit(save().code() == Errc::kIo ? 0 : 1);
  }
  int result = 0;
  ASSERT_EQ(::waitpid(child, &result, 0), child);
  EXPECT_EQ(result, 0);
  EXPECT_EQ(slurp(scratch_.path("f")), "old");
  EXPECT_THAT(scratch_.names(), ElementsAre("f"));
}

TEST_F(AtomicFile, a_new_file_obeys_the_umask) {
  for (const mode_t mask : {022, 077, 027}) {
    const mode_t before = ::umask(mask);
    const std::string path = scratch_.path("f" + std::to_string(mask));
    const Status status = save_to(path);
    ::umask(before);
    ASSERT_OK(status);
    EXPECT_EQ(mode_of(path), 0666 & ~mask);
  }
}

TEST_F(AtomicFile, an_existing_file_keeps_its_mode) {
  for (const mode_t mode : {0640, 0600, 0666, 0444}) {
    spit(scratch_.path("f"), "old");
    ASSERT_EQ(::chmod(scratch_.path("f").c_str(), mode), 0);
    ASSERT_OK(save());
    EXPECT_EQ(mode_of(scratch_.path("f")), mode);
  }
}

TEST_F(AtomicFile, links_are_followed_and_kept) {
  std::filesystem::create_directory(scratch_.path("store"));
  spit(scratch_.path("store/blob"), "old");
  std::filesystem::create_symlink("store/blob", scratch_.path("inner"));
  std::filesystem::create_symlink(scratch_.path("inner"), scratch_.path("f"));
  ASSERT_OK(save());
  EXPECT_TRUE(std::filesystem::is_symlink(scratch_.path("f")));
  EXPECT_TRUE(std::filesystem::is_symlink(scratch_.path("inner")));
  EXPECT_EQ(slurp(scratch_.path("store/blob")), "hello new world");

  std::filesystem::create_symlink("store/new", scratch_.path("dangling"));
  ASSERT_OK(save_to(scratch_.path("dangling")));
  EXPECT_EQ(slurp(scratch_.path("store/new")), "hello new world");
}

TEST_F(AtomicFile, a_hard_link_is_cut) {
  spit(scratch_.path("other"), "old");
  std::filesystem::create_hard_link(scratch_.path("other"), scratch_.path("f"));
  ASSERT_OK(save());
  EXPECT_EQ(slurp(scratch_.path("other")), "old");
}

TEST_F(AtomicFile, a_relative_path_needs_no_folder) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(scratch_.folder());
  const Status status = save_to("f");
  std::filesystem::current_path(before);
  ASSERT_OK(status);
  EXPECT_EQ(slurp(scratch_.path("f")), "hello new world");
}

TEST_F(AtomicFile, names_as_long_as_the_system_takes) {
  const std::string name(255, 'n');
  ASSERT_OK(save_to(scratch_.path(name)));
  EXPECT_EQ(save_to(scratch_.path(name + "n")).code(), Errc::kIo);
  ASSERT_OK(save_to(scratch_.path("\xFF\xFE")));
}

TEST_F(AtomicFile, refuses_what_is_no_regular_file) {
  std::filesystem::create_directory(scratch_.path("folder"));
  ASSERT_EQ(::mkfifo(scratch_.path("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::symlink("loop", scratch_.path("loop").c_str()), 0);
  for (const char* name : {"folder", "folder/", "fifo", "loop", "no/folder/f", "new/"}) {
    EXPECT_EQ(save_to(scratch_.path(name)).code(), Errc::kIo) << name;
  }
  EXPECT_EQ(save_to("/dev/null").code(), Errc::kIo);
  EXPECT_EQ(save_to(std::string(5000, 'p')).code(), Errc::kIo);
  EXPECT_EQ(save_to("").code(), Errc::kInvalidArgument);
  EXPECT_EQ(save_to(std::string("a\0b", 3)).code(), Errc::kInvalidArgument);
  EXPECT_EQ(scratch_.names().size(), 3u);
}

TEST_F(AtomicFile, a_folder_without_permission_is_an_error) {
  spit(scratch_.path("f"), "old");
  ASSERT_EQ(::chmod(scratch_.folder().c_str(), 0555), 0);
  const bool root = ::geteuid() == 0;
  ASSERT_EQ(root ? ::seteuid(65534) : 0, 0);
  const Status status = save();
  ASSERT_EQ(root ? ::seteuid(0) : 0, 0);
  EXPECT_EQ(status.code(), Errc::kIo);
  EXPECT_THAT(status.message(), HasSubstr("errno 13"));
  EXPECT_EQ(slurp(scratch_.path("f")), "old");
}

}  // namespace
}  // namespace quantal::io
