#include "io/message.h"

#include <cstring>
#include <system_error>

namespace quantal::io {
namespace {

constexpr std::size_t kShownOfPath = 4096;

// Length of the sequence at `p`, 0 where it is malformed. Ranges: Unicode 15, table 3-7.
std::size_t sequence_length(const unsigned char* p, std::size_t left) {
  const unsigned char lead = p[0];
  if (lead < 0x80) return 1;
  std::size_t length = 0;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if ((lead & 0xF0) == 0xE0) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;   // overlong
    if (lead == 0xED) high = 0x9F;  // surrogates
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;   // overlong
    if (lead == 0xF4) high = 0x8F;  // above U+10FFFF
  } else {
    return 0;
  }
  if (left < length || p[1] < low || p[1] > high) return 0;
  for (std::size_t i = 2; i < length; ++i) {
    if ((p[i] & 0xC0) != 0x80) return 0;
  }
  return length;
}

}  // namespace

bool is_valid_utf8(std::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  std::size_t left = text.size();
  while (left > 0) {
    std::uint64_t word = 0;
    if (left >= sizeof(word)) {
      std::memcpy(&word, p, sizeof(word));
      if ((word & 0x8080808080808080u) == 0) {
        p += sizeof(word);
        left -= sizeof(word);
        continue;
      }
    }
    const std::size_t length = sequence_length(p, left);
    if (length == 0) return false;
    p += length;
    left -= length;
  }
  return true;
}

std::string quote(std::string_view text, std::size_t limit) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  std::size_t i = 0;
  while (i < text.size() && i < limit) {
    const auto* p = reinterpret_cast<const unsigned char*>(text.data()) + i;
    const std::size_t length = sequence_length(p, text.size() - i);
    if (length == 0 || *p < 0x20 || *p == 0x7F) {
      out += "\\x";
      out += kHex[*p >> 4];
      out += kHex[*p & 15];
      ++i;
    } else {
      out += text.substr(i, length);
      i += length;
    }
  }
  if (i < text.size()) out += "...";
  return out += '\'';
}

Status failure(Errc code, const Site& site, std::string_view expected, std::string_view got) {
  std::string message = "[quantal::safetensors] expected ";
  message += expected;
  message += " in ";
  message += quote(site.source, kShownOfPath);
  if (site.tensor) message += ", tensor " + quote(*site.tensor);
  if (site.offset) message += ", offset " + std::to_string(*site.offset);
  message += ": got ";
  message += got;
  return Status(code, std::move(message));
}

Status io_failure(const Site& site, std::string_view expected, int error) {
  return failure(Errc::kIo, site, expected,
                 std::generic_category().message(error) + " (errno " + std::to_string(error) + ")");
}

}  // namespace quantal::io
