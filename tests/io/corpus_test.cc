#include "corpus/corpus.h"

#include <gmock/gmock.h>

#include "io/scratch.h"

namespace quantal::io {
namespace {

using corpus::Case;
using safetensors::Access;
using safetensors::Reader;
using testing::HasSubstr;

class Corpus : public testing::TestWithParam<Case> {
 protected:
  // The verdict on opening, and where it opens on the tensors' data.
  void expect_verdict(const Result<Reader>& reader) {
    const Case& wanted = GetParam();
    Status status = reader.status();
    EXPECT_STREQ(errc_name(status.code()), errc_name(wanted.open)) << status.message();
    if (reader.ok()) {
      status = read_all(reader.value());
      EXPECT_STREQ(errc_name(status.code()), errc_name(wanted.data)) << status.message();
    }
    EXPECT_THAT(status.message(), HasSubstr(wanted.message));
    const char* form = status.ok() ? "" : "[quantal::safetensors] expected ";
    EXPECT_THAT(status.message(), HasSubstr(form));
  }
};

TEST_P(Corpus, mapped) {
  Scratch scratch;
  spit(scratch.path(), GetParam().bytes);
  expect_verdict(Reader::open(scratch.path(), {.access = Access::kMap}));
}

TEST_P(Corpus, read) {
  Scratch scratch;
  spit(scratch.path(), GetParam().bytes);
  expect_verdict(Reader::open(scratch.path(), {.access = Access::kRead}));
}

TEST_P(Corpus, in_memory) { expect_verdict(Reader::from_memory(to_bytes(GetParam().bytes))); }

INSTANTIATE_TEST_SUITE_P(Rows, Corpus, testing::ValuesIn(corpus::cases()),
                         [](const auto& info) { return info.param.id; });

}  // namespace
}  // namespace quantal::io
