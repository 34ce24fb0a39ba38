#include <random>

#include "corpus/corpus.h"
#include "io/scratch.h"

// Damaged files must open with every tensor inside the file, or give a typed error: no crash, no
// hang, nothing that a sanitizer objects to.
namespace quantal::io {
namespace {

using corpus::Case;
using safetensors::Reader;

Errc verdict(const std::string& bytes) {
  const Result<Reader> reader = Reader::from_memory(to_bytes(bytes));
  if (!reader.ok()) {
    EXPECT_FALSE(reader.status().message().empty());
    return reader.status().code();
  }
  for (const safetensors::TensorInfo& info : reader.value().tensors()) {
    EXPECT_LE(info.begin, info.end);
    EXPECT_LE(info.end, bytes.size());
  }
  return read_all(reader.value()).code();
}

class Damage : public testing::TestWithParam<Case> {};

TEST_P(Damage, truncated_at_every_byte) {
  const std::string& bytes = GetParam().bytes;
  EXPECT_EQ(verdict(bytes), Errc::kOk);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_NE(verdict(bytes.substr(0, size)), Errc::kOk) << size;
  }
}

TEST_P(Damage, every_bit_of_the_header_flipped) {
  std::string bytes = GetParam().bytes;
  for (std::size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    const char mask = static_cast<char>(1 << bit % 8);
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ mask);
    verdict(bytes);
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ mask);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Damage, testing::ValuesIn(corpus::seeds()),
                         [](const auto& info) { return info.param.id; });

// Cuts, repeats, overwrites and splices; the header's length is mostly set right, or nearly all
// cases would end there.
std::string mutate(const std::vector<Case>& seeds, std::mt19937_64& random) {
  static const std::vector<std::string> kTokens = {"[",
                                                   "]",
                                                   "{",
                                                   "}",
                                                   ",",
                                                   ":",
                                                   "\"",
                                                   "\\",
                                                   "\\u0000",
                                                   "\\ud83d\\ude00",
                                                   "-1",
                                                   "0",
                                                   "1e9",
                                                   "9223372036854775807",
                                                   "18446744073709551615",
                                                   "null",
                                                   "\"__metadata__\":",
                                                   "\"shape\":",
                                                   "\"data_offsets\":",
                                                   "\"dtype\":\"F4\"",
                                                   "\"BOOL\"",
                                                   "\xF0\x9F\x98\x80",
                                                   "\xED\xA0\x80"};
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : random() % n; };
  std::string bytes = seeds[below(seeds.size())].bytes;
  const std::size_t data = bytes.size() - bytes.rfind('}') - 1;  // its own, as none ends in '}'
  for (std::size_t steps = 1 + below(4); steps > 0; --steps) {
    const std::size_t at = below(bytes.size());
    const std::size_t size = below(std::min<std::size_t>(bytes.size() - at, 40));
    switch (below(5)) {
      case 0:
        bytes.erase(at, size);
        break;
      case 1:
        bytes.insert(at, std::string(bytes, at, size));
        break;
      case 2:
        bytes.insert(at, kTokens[below(kTokens.size())]);
        break;
      case 3:
        if (!bytes.empty()) bytes[at] = static_cast<char>(random());
        break;
      default: {
        const std::string& other = seeds[below(seeds.size())].bytes;
        bytes = bytes.substr(0, at) + other.substr(below(other.size()));
        break;
      }
    }
  }
  if (below(4) != 0 && bytes.size() > 8 + data) {
    bytes = corpus::file_of_length(bytes.size() - 8 - data, bytes.substr(8));
  }
  return bytes;
}

TEST(Damage, random_mutations) {
  std::mt19937_64 random(1);
  const std::vector<Case> seeds = corpus::seeds();
  int opened = 0;
  for (int i = 0; i < 10'000; ++i) opened += verdict(mutate(seeds, random)) == Errc::kOk;
  EXPECT_GT(opened, 100);  // the mutations are not all nonsense
  EXPECT_LT(opened, 5'000);
}

}  // namespace
}  // namespace quantal::io
