#include "kernels/packed_layout.h"

#include <algorithm>
#include <cstring>

#include "kernels/canonical_codes.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int bits_of(QTypeId qtype) { return qtype == QTypeId::kInt2 ? 2 : qtype == QTypeId::kInt4 ? 4 : 8; }

// int8 is stored as code + 128: what unsigned-by-signed dot products take.
std::uint32_t flip_of(const WeightSpec& spec) {
  return spec.qtype == QTypeId::kInt8 ? 0x80808080U : 0;
}

// One row of a group: `columns` codes, bits [shift, shift + bits) of the bytes at `from`, become
// the row's word of every line at `lines`.
template <int bits>
void pack_row(const std::uint8_t* from, int shift, std::int64_t columns, std::uint32_t flip,
              std::byte* lines) {
  constexpr int kDepth = 32 / bits;
  constexpr std::uint32_t kMask = (1U << bits) - 1;
  for (std::int64_t first = 0; first < columns; first += kDepth, lines += kLineBytes) {
    const auto count = static_cast<int>(std::min<std::int64_t>(kDepth, columns - first));
    std::uint32_t word = 0;
    for (int j = 0; j < count; ++j) {
      word |= (static_cast<std::uint32_t>(from[first + j]) >> shift & kMask) << bit_of(bits, j);
    }
    word ^= flip;
    std::memcpy(lines, &word, sizeof(word));
  }
}

// The inverse, which ors codes into `to`; a short last group is padded to `width` columns with
// copies of its last element.
template <int bits>
void unpack_row(const std::byte* lines, std::int64_t columns, std::int64_t width,
                std::uint32_t flip, std::uint8_t* to, int shift) {
  constexpr int kDepth = 32 / bits;
  constexpr std::uint32_t kMask = (1U << bits) - 1;
  std::uint32_t code = 0;
  for (std::int64_t first = 0; first < columns; first += kDepth, lines += kLineBytes) {
    const auto count = static_cast<int>(std::min<std::int64_t>(kDepth, columns - first));
    std::uint32_t word;
    std::memcpy(&word, lines, sizeof(word));
    word ^= flip;
    for (int j = 0; j < count; ++j) {
      code = word >> bit_of(bits, j) & kMask;
      to[first + j] |= static_cast<std::uint8_t>(code << shift);
    }
  }
  for (std::int64_t c = columns; c < width; ++c) to[c] |= static_cast<std::uint8_t>(code << shift);
}

// Columns [begin, columns) of one row.
void pack_rest(const PackedLayout& layout, const TileRows& rows, std::int64_t row,
               std::int64_t begin, std::int64_t columns, std::byte* lines) {
  const std::uint8_t* from = rows.from[row] + begin;
  std::byte* out = lines + begin / layout.depth() * kLineBytes + row * 4;
  switch (layout.depth()) {
    case 16:
      return pack_row<2>(from, rows.shift[row], columns - begin, 0, out);
    case 8:
      return pack_row<4>(from, rows.shift[row], columns - begin, 0, out);
    default:
      return pack_row<8>(from, rows.shift[row], columns - begin, flip_of(layout.spec()), out);
  }
}

std::int64_t pack_whole_lines(Isa isa, const PackedLayout& layout, const TileRows& rows,
                              std::int64_t columns, std::byte* lines) {
#if defined(__x86_64__)
  if (isa != Isa::kPortable) {
    const auto bits = static_cast<int>(32 / layout.depth());
    return pack_rows__avx2(bits, rows, columns, flip_of(layout.spec()), lines);
  }
#endif
  static_cast<void>(isa), static_cast<void>(layout), static_cast<void>(rows);
  static_cast<void>(columns), static_cast<void>(lines);
  return 0;
}

void copy_scale(const PackedLayout& layout, void* to, std::int64_t to_index, const void* from,
                std::int64_t from_index) {
  const int size = size_of(layout.spec().scale_type);
  std::memcpy(static_cast<std::byte*>(to) + to_index * size,
              static_cast<const std::byte*>(from) + from_index * size, size);
}

/// Unpacks a weight, some of its code rows at a time.
class Unpacking {
 public:
  Unpacking(Isa isa, const PackedLayout& layout, const std::byte* packed,
            const MutableCanonicalWeight& weight)
      : isa_(isa), layout_(layout), packed_(packed), weight_(weight), codes_(layout.spec()) {}

  const CanonicalCodes& codes() const { return codes_; }

  /// Code rows [begin, end), whose bytes are zeros or hold others' codes.
  void run(std::int64_t begin, std::int64_t end) const {
    const std::int64_t groups = layout_.groups();
    while (begin < end) {
      const bool is_half = begin % (kHalfRows * groups) == 0;
      if (isa_ == Isa::kPortable || !is_half || begin + kHalfRows * groups > end) {
        unpack_codes(begin, 0);
        unpack_scales(begin++);
        continue;
      }
      for (std::int64_t group = 0; group < groups; ++group) unpack_half(begin + group);
      begin += kHalfRows * groups;
    }
  }

 private:
  static constexpr std::int64_t kHalfRows = kTileRows / 2;

  std::int64_t row(std::int64_t code_row) const { return code_row / layout_.groups(); }
  std::int64_t group(std::int64_t code_row) const { return code_row % layout_.groups(); }
  const std::byte* lines(std::int64_t code_row) const {
    return packed_ + row(code_row) / kTileRows * layout_.tile_bytes() +
           layout_.group_offset(group(code_row));
  }

  // One group of eight rows, of which `code_row` is of the first.
  void unpack_half(std::int64_t code_row) const {
    HalfRows rows{};
    for (int r = 0; r < kHalfRows; ++r) {
      const std::int64_t at = code_row + r * layout_.groups();
      rows.to[r] = weight_.data + codes_.byte(at);
      rows.shift[r] = codes_.shift(at);
    }
    std::int64_t columns = layout_.group_columns(group(code_row)), done = 0;
    if (columns < codes_.width()) --columns;  // the last one is what padding repeats
#if defined(__x86_64__)
    const std::int64_t half = row(code_row) % kTileRows * 4;
    done = unpack_rows__avx2(codes_.bits(), lines(code_row) + half, columns,
                             flip_of(layout_.spec()), rows);
#endif
    for (int r = 0; r < kHalfRows; ++r) {
      const std::int64_t at = code_row + r * layout_.groups();
      if (done < codes_.width()) unpack_codes(at, done);
      unpack_scales(at);
    }
  }

  // From column `first` on, which begins a line.
  void unpack_codes(std::int64_t code_row, std::int64_t first) const {
    std::uint8_t* to = weight_.data + codes_.byte(code_row) + first;
    const int shift = codes_.shift(code_row);
    const std::int64_t columns = layout_.group_columns(group(code_row)) - first;
    const std::int64_t width = codes_.width() - first;
    const std::byte* in =
        lines(code_row) + first / layout_.depth() * kLineBytes + row(code_row) % kTileRows * 4;
    switch (layout_.depth()) {
      case 16:
        return unpack_row<2>(in, columns, width, 0, to, shift);
      case 8:
        return unpack_row<4>(in, columns, width, 0, to, shift);
      default:
        return unpack_row<8>(in, columns, width, flip_of(layout_.spec()), to, shift);
    }
  }

  void unpack_scales(std::int64_t code_row) const {
    const std::byte* scales = lines(code_row) + layout_.group_lines(group(code_row)) * kLineBytes;
    const std::int64_t from = row(code_row) % kTileRows;
    copy_scale(layout_, weight_.scale, code_row, scales, from);
    if (layout_.is_affine()) {
      copy_scale(layout_, weight_.shift, code_row, scales, kTileRows + from);
    }
  }

  Isa isa_;
  const PackedLayout& layout_;
  const std::byte* packed_;
  const MutableCanonicalWeight& weight_;
  CanonicalCodes codes_;
};

// The scales of a tile's group, then its shifts.
void copy_scales(const PackedLayout& layout, const CanonicalWeight& weight, std::int64_t first,
                 std::int64_t rows, std::int64_t group, std::byte* out) {
  const std::int64_t end =
      group + 1 < layout.groups() ? layout.group_offset(group + 1) : layout.tile_bytes();
  const std::int64_t begin = layout.group_offset(group) + layout.group_lines(group) * kLineBytes;
  std::memset(out, 0, end - begin);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t from = (first + r) * layout.groups() + group;
    copy_scale(layout, out, r, weight.scale, from);
    if (layout.is_affine()) copy_scale(layout, out, kTileRows + r, weight.shift, from);
  }
}

}  // namespace

void serial_for(std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count > 0) body(0, count);
}

PackedLayout::PackedLayout(const WeightSpec& spec) : spec_(spec), bits_(bits_of(spec.qtype)) {
  group_size_ = spec.group_size > 0 ? std::min(spec.group_size, spec.columns) : spec.columns;
  groups_ = group_size_ > 0 ? ceil_div(spec.columns, group_size_) : 1;
  const std::int64_t scale_bytes = kTileRows * size_of(spec.scale_type) * (is_affine() ? 2 : 1);
  const std::int64_t tail = ceil_div(scale_bytes, kLineBytes) * kLineBytes;
  group_bytes_ = ceil_div(group_size_, depth()) * kLineBytes + tail;
  tile_bytes_ = (groups_ - 1) * group_bytes_ + group_lines(groups_ - 1) * kLineBytes + tail;
}

std::int64_t canonical_data_size(const WeightSpec& spec) { return CanonicalCodes(spec).size(); }

void pack(const PackedLayout& layout, const CanonicalWeight& weight, std::byte* packed,
          const ParallelFor& parallel_for, Isa isa) {
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    pack_tiles(isa, layout, weight, begin, end, packed + begin * layout.tile_bytes());
  });
}

void pack_tiles(Isa isa, const PackedLayout& layout, const CanonicalWeight& weight,
                std::int64_t begin, std::int64_t end, std::byte* packed) {
  const CanonicalCodes codes(layout.spec());
  const std::int64_t groups = layout.groups();
  for (std::int64_t tile = begin; tile < end; ++tile, packed += layout.tile_bytes()) {
    const std::int64_t first = tile * kTileRows;
    const std::int64_t rows = std::min(kTileRows, layout.spec().rows - first);
    if (rows < kTileRows) std::memset(packed, 0, layout.tile_bytes());
    for (std::int64_t group = 0; group < groups; ++group) {
      std::byte* lines = packed + layout.group_offset(group);
      const std::int64_t columns = layout.group_columns(group);
      TileRows from{};
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t code_row = codes.code_row(first + r, group);
        from.from[r] = weight.data + codes.byte(code_row);
        from.shift[r] = codes.shift(code_row);
      }
      const std::int64_t done =
          rows == kTileRows ? pack_whole_lines(isa, layout, from, columns, lines) : 0;
      if (done < columns) {
        for (std::int64_t r = 0; r < rows; ++r) pack_rest(layout, from, r, done, columns, lines);
      }
      copy_scales(layout, weight, first, rows, group,
                  lines + layout.group_lines(group) * kLineBytes);
    }
  }
}

void unpack(const PackedLayout& layout, const std::byte* packed,
            const MutableCanonicalWeight& weight, const ParallelFor& parallel_for, Isa isa) {
  const Unpacking unpacking(isa, layout, packed, weight);
  const CanonicalCodes& codes = unpacking.codes();
  // The code rows that share bytes are of one thread.
  parallel_for(codes.packed_rows(), [&](std::int64_t begin, std::int64_t end) {
    std::memset(weight.data + begin * codes.width(), 0, (end - begin) * codes.width());
    for (std::int64_t section = 0; section < codes.sections(); ++section) {
      const std::int64_t first = section * codes.packed_rows();
      unpacking.run(first + begin, std::min(first + end, codes.code_rows()));
    }
  });
}

std::uint8_t packed_code(const PackedLayout& layout, const std::byte* packed, std::int64_t row,
                         std::int64_t column) {
  const std::int64_t width = layout.group_begin(1);
  const std::int64_t group = width > 0 ? column / width : 0;
  const std::int64_t in_group = column - layout.group_begin(group), depth = layout.depth();
  const std::byte* line = packed + row / kTileRows * layout.tile_bytes() +
                          layout.group_offset(group) + in_group / depth * kLineBytes;
  const auto bits = static_cast<int>(32 / depth), j = static_cast<int>(in_group % depth);
  std::uint32_t word;
  std::memcpy(&word, line + row % kTileRows * 4, sizeof(word));
  return static_cast<std::uint8_t>(word >> bit_of(bits, j) & ((1U << bits) - 1));
}

}  // namespace quantal::kernels
