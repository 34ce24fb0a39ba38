#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <utility>

#include <quantal/safetensors.h>

#include "io/dtype.h"
#include "io/header.h"
#include "io/message.h"
#include "io/source.h"

namespace quantal::safetensors {

struct Reader::State {
  io::Source source;
  io::Header header;
  std::uint64_t data_begin;
};

namespace {

std::span<const std::byte> view(const Bytes& bytes) { return {bytes.data.get(), bytes.size}; }

Result<Reader> read_header(io::Source source, const ReadOptions& options) {
  const std::uint64_t size = source.size();
  // The header is a copy even of a mapped file: it must not change between check and use.
  Result<Bytes> first = source.copy(0, std::min(size, io::kLengthBytes));
  if (!first.ok()) return first.status();
  Result<std::uint64_t> length = io::header_length(view(first.value()), size, source.name());
  if (!length.ok()) return length.status();
  Result<Bytes> text = source.copy(io::kLengthBytes, length.value());
  if (!text.ok()) return text.status();
  const std::uint64_t data_begin = io::kLengthBytes + length.value();
  Result<io::Header> header =
      io::parse_header({reinterpret_cast<const char*>(text.value().data.get()), length.value()},
                       size - data_begin, source.name(), options.strict);
  if (!header.ok()) return header.status();
  return Reader(std::make_shared<const Reader::State>(
      Reader::State{std::move(source), std::move(header).value(), data_begin}));
}

}  // namespace

Result<Reader> Reader::open(const std::string& path, const ReadOptions& options) {
  return io::open_reader(path, options, io::os_file_ops());
}

Result<Reader> Reader::from_memory(Bytes bytes, const ReadOptions& options) {
  return io::without_bad_alloc({.source = "memory"}, [&]() -> Result<Reader> {
    if (bytes.data == nullptr && bytes.size > 0) {
      return io::failure(Errc::kInvalidArgument, {.source = "memory"}, "bytes", "a null pointer");
    }
    return read_header(io::Source::from_memory(std::move(bytes)), options);
  });
}

const Metadata& Reader::metadata() const { return state_->header.metadata; }

const std::vector<TensorInfo>& Reader::tensors() const { return state_->header.tensors; }

const TensorInfo* Reader::find(std::string_view name) const { return state_->header.find(name); }

const std::vector<std::string>& Reader::warnings() const { return state_->header.warnings; }

Result<Bytes> Reader::data(const TensorInfo& info) const {
  const io::Site site{.source = state_->source.name(), .tensor = info.name};
  return io::without_bad_alloc(site, [&]() -> Result<Bytes> {
    const std::uint64_t data_size = state_->source.size() - state_->data_begin;
    if (info.begin > info.end || info.end > data_size) {
      return io::failure(Errc::kInvalidArgument, site, "a tensor of this file",
                         "offsets " + io::list_text(std::array{info.begin, info.end}));
    }
    Result<Bytes> bytes = state_->source.bytes(state_->data_begin + info.begin, info.size(),
                                               io::dtype_alignment(info.dtype));
    if (!bytes.ok()) return bytes;
    Status status = io::check_values(info.dtype, view(bytes.value()), site);
    if (!status.ok()) return status;
    return bytes;
  });
}

Result<Bytes> Reader::data(std::string_view name) const {
  if (const TensorInfo* info = find(name)) return data(*info);
  return io::failure(Errc::kMissingTensor, {.source = state_->source.name(), .tensor = name},
                     "a tensor of that name", "none");
}

}  // namespace quantal::safetensors

namespace quantal::io {

Result<safetensors::Reader> open_reader(const std::string& path,
                                        const safetensors::ReadOptions& options, FileOps& ops) {
  return without_bad_alloc({.source = path}, [&]() -> Result<safetensors::Reader> {
    Result<Source> source = Source::open(path, options.access, ops);
    if (!source.ok()) return source.status();
    return safetensors::read_header(std::move(source).value(), options);
  });
}

}  // namespace quantal::io
