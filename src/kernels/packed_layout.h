#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include <quantal/api.h>
#include <quantal/isa.h>
#include <quantal/qtype.h>

#include "kernels/float_types.h"

/// How a quantized matrix lies in memory while it computes: one layout for every processor.
namespace quantal::kernels {

/// Runs body(begin, end) over parts of [0, count), maybe on several threads, and waits for all.
using ParallelFor = std::function<void(
    std::int64_t count, const std::function<void(std::int64_t begin, std::int64_t end)>& body)>;

/// Everything on the calling thread.
QUANTAL_API void serial_for(std::int64_t count,
                            const std::function<void(std::int64_t, std::int64_t)>& body);

/// A weight of (rows, columns) = (out, in).
struct WeightSpec {
  QTypeId qtype = QTypeId::kInt8;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t group_size = 0;  ///< elements of a row that share a scale; 0: the whole row
  FloatType scale_type = FloatType::kF32;
};

/// The packed form: tiles of 16 rows, one after the other. A tile is its groups in order; a group
/// is its lines of codes, then 16 scales, then 16 shifts (affine types), padded to 64 bytes.
///
/// A line is 64 bytes: 16 rows of 4 bytes, for `depth` consecutive columns.
///
///   int8, float8   depth 4    byte 4r + j: column j of row r; int8 as code + 128
///   int4           depth 8    byte 4r + j: column j in the low nibble, 4 + j in the high one
///   int2           depth 16   byte 4r + j: column 4p + j in bits [2p, 2p + 2)
///
/// Columns past the end of a group and rows past the last are padded: codes of zero bits (int8:
/// code 0), scales and shifts of 0.
class QUANTAL_API PackedLayout {
 public:
  static constexpr std::int64_t kTileRows = 16;
  static constexpr std::int64_t kLineBytes = 64;

  /// Precondition: sizes are not negative and their product fits.
  explicit PackedLayout(const WeightSpec& spec);

  const WeightSpec& spec() const { return spec_; }
  bool is_affine() const { return bits_ < 8; }
  std::int64_t depth() const { return 32 / bits_; }
  std::int64_t tiles() const { return (spec_.rows + kTileRows - 1) / kTileRows; }
  std::int64_t groups() const { return groups_; }
  /// Columns of one group; the last may be shorter.
  std::int64_t group_columns(std::int64_t group) const {
    return group + 1 < groups_ ? group_size_ : spec_.columns - group * group_size_;
  }
  std::int64_t group_begin(std::int64_t group) const { return group * group_size_; }
  std::int64_t group_lines(std::int64_t group) const {
    return (group_columns(group) + depth() - 1) / depth();
  }
  /// Columns with every group padded to whole lines: how kernels want a token.
  std::int64_t padded_begin(std::int64_t group) const { return group * group_lines(0) * depth(); }
  std::int64_t padded_columns() const {
    return padded_begin(groups_ - 1) + group_lines(groups_ - 1) * depth();
  }
  /// Where a group begins, from the beginning of its tile.
  std::int64_t group_offset(std::int64_t group) const { return group * group_bytes_; }
  std::int64_t tile_bytes() const { return tile_bytes_; }
  std::int64_t size() const { return tiles() * tile_bytes_; }

 private:
  WeightSpec spec_;
  int bits_;
  std::int64_t group_size_;
  std::int64_t groups_;
  std::int64_t group_bytes_;
  std::int64_t tile_bytes_;
};

/// A weight in canonical form (docs/formats.md), as pointers.
struct CanonicalWeight {
  const std::uint8_t* data = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;  ///< null for symmetric types
};
struct MutableCanonicalWeight {
  std::uint8_t* data = nullptr;
  void* scale = nullptr;
  void* shift = nullptr;
};

/// Canonical to packed: `packed` has layout.size() bytes, aligned to 64.
QUANTAL_API void pack(const PackedLayout& layout, const CanonicalWeight& weight, std::byte* packed,
                      const ParallelFor& parallel_for = serial_for, Isa isa = Isa::kPortable);

/// Tiles [begin, end) alone, to `packed`.
QUANTAL_API void pack_tiles(Isa isa, const PackedLayout& layout, const CanonicalWeight& weight,
                            std::int64_t begin, std::int64_t end, std::byte* packed);

/// Packed to canonical, bit for bit what pack() was given (a short last group's padding as the
/// canonical form prescribes it).
QUANTAL_API void unpack(const PackedLayout& layout, const std::byte* packed,
                        const MutableCanonicalWeight& weight,
                        const ParallelFor& parallel_for = serial_for, Isa isa = Isa::kPortable);

/// Bytes of the canonical data.
QUANTAL_API std::int64_t canonical_data_size(const WeightSpec& spec);

/// Codes of the 16 rows of a tile's group in canonical form: bits [shift, shift + bits) of each
/// byte.
struct TileRows {
  const std::uint8_t* from[PackedLayout::kTileRows];
  int shift[PackedLayout::kTileRows];
};
/// Packs as many whole lines as it takes at a time, xor `flip`, and tells how many columns it did.
std::int64_t pack_rows__avx2(int bits, const TileRows& rows, std::int64_t columns,
                             std::uint32_t flip, std::byte* lines);

/// Where the codes of 8 rows of a tile go, bits [shift, shift + bits) of each byte: zeros so far.
struct HalfRows {
  std::uint8_t* to[PackedLayout::kTileRows / 2];
  int shift[PackedLayout::kTileRows / 2];
};
/// Unpacks as many whole lines as it takes at a time, xor `flip`, and tells how many columns it
/// did.
std::int64_t unpack_rows__avx2(int bits, const std::byte* lines, std::int64_t columns,
                               std::uint32_t flip, const HalfRows& rows);

/// Where column `j` of a line lies in a row's four bytes, read as one little-endian word.
constexpr int bit_of(int bits, int j) { return 8 * (j % 4) + bits * (j / 4); }

/// The code in the packed form, as stored (int8: code + 128): the plain reading of the drawing
/// above, which every kernel is tested against.
QUANTAL_API std::uint8_t packed_code(const PackedLayout& layout, const std::byte* packed,
                                     std::int64_t row, std::int64_t column);

}  // namespace quantal::kernels
