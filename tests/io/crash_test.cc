#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>
#include <thread>

#include <gmock/gmock.h>

#include "io/scratch.h"

// Several saves to one path, and saves that end in the middle: a reader sees one file, whole.
namespace quantal::io {
namespace {

using safetensors::Access;
using safetensors::Bytes;
using safetensors::Reader;
using safetensors::TensorView;

constexpr std::size_t kSize = 1 << 20;

Status save(const std::string& path, char letter) {
  const std::string data(kSize, letter);
  return safetensors::write(path, std::vector<TensorView>{bytes_tensor("t", data)},
                            {{"letter", std::string(1, letter)}});
}

// The letter that the whole file says, or '?'.
char letter_of(const std::string& path) {
  const Result<Reader> reader = Reader::open(path);
  if (!reader.ok()) return '?';
  const std::string letter = reader.value().metadata().at("letter");
  const Result<Bytes> bytes = reader.value().data("t");
  if (!bytes.ok() || to_string(bytes.value()) != std::string(kSize, letter[0])) return '?';
  return letter[0];
}

TEST(Crash, a_killed_save_leaves_the_old_or_the_new_file) {
  Scratch scratch;
  std::mt19937 random(11);
  ASSERT_OK(save(scratch.path(), 'a'));
  for (int i = 0; i < 20; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (char letter = 'a';; letter = letter == 'a' ? 'b' : 'a') {
        if (!save(scratch.path(), letter).ok()) ::_exit(1);
      }
    }
    ::usleep(500 + random() % 20'000);
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int result = 0;
    ASSERT_EQ(::waitpid(child, &result, 0), child);
    ASSERT_TRUE(WIFSIGNALED(result));
    EXPECT_THAT(letter_of(scratch.path()), testing::AnyOf('a', 'b'));
  }
}

TEST(Crash, of_two_processes_one_wins_whole) {
  Scratch scratch;
  std::vector<pid_t> children;
  for (const char letter : {'a', 'b'}) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = 0; i < 10; ++i) {
        if (!save(scratch.path(), letter).ok()) ::_exit(1);
      }
      ::_exit(0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int result = 0;
    ASSERT_EQ(::waitpid(child, &result, 0), child);
    EXPECT_EQ(result, 0);
  }
  EXPECT_THAT(letter_of(scratch.path()), testing::AnyOf('a', 'b'));
  EXPECT_EQ(scratch.names().size(), 1u);
}

TEST(Crash, threads_save_while_others_read) {
  Scratch scratch;
  ASSERT_OK(save(scratch.path(), 'a'));
  std::vector<std::thread> threads;
  for (const char letter : {'a', 'b', 'c'}) {
    threads.emplace_back([&, letter] {
      for (int i = 0; i < 8; ++i) EXPECT_TRUE(save(scratch.path(), letter).ok());
    });
    threads.emplace_back([&] {
      for (int i = 0; i < 8; ++i) {
        EXPECT_THAT(letter_of(scratch.path()), testing::AnyOf('a', 'b', 'c'));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(scratch.names().size(), 1u);
}

TEST(Crash, a_file_can_be_saved_over_its_own_mapping) {
  Scratch scratch;
  ASSERT_OK(save(scratch.path(), 'a'));
  const Result<Reader> reader = Reader::open(scratch.path(), {.access = Access::kMap});
  ASSERT_OK(reader.status());
  const Bytes old = reader.value().data("t").value();
  const TensorView again{"t", safetensors::Dtype::kU8, {kSize}, old.data.get(), old.size};
  ASSERT_OK(safetensors::write(scratch.path(), std::vector{again}, {{"letter", "a"}}));
  EXPECT_EQ(letter_of(scratch.path()), 'a');
  ASSERT_OK(save(scratch.path(), 'b'));
  EXPECT_EQ(letter_of(scratch.path()), 'b');
  EXPECT_EQ(to_string(old), std::string(kSize, 'a'));
}

TEST(Crash, one_reader_serves_many_threads) {
  Scratch scratch;
  ASSERT_OK(save(scratch.path(), 'a'));
  for (const Access access : {Access::kMap, Access::kRead}) {
    const Result<Reader> reader = Reader::open(scratch.path(), {.access = access});
    ASSERT_OK(reader.status());
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([copy = reader.value()] {
        EXPECT_EQ(to_string(copy.data("t").value()), std::string(kSize, 'a'));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace
}  // namespace quantal::io
