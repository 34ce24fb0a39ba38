#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <quantal/api.h>
#include <quantal/status.h>

#include "io/file_ops.h"

namespace quantal::io {

/// A piece of a file to write.
struct Chunk {
  const void* data;
  std::uint64_t size;
};

/// Makes `path` hold the chunks, or leaves it as it was. Writes `.<name>.quantal-<pid>-<rand>.tmp`
/// in the same folder, syncs, renames, syncs the folder. A process that is killed can leave such a
/// file behind; a path that names a link, a mode and existing readers: as safetensors::write().
///
/// kIo with errno. Only a failure to sync the folder comes with the new file already in place.
QUANTAL_API Status write_file_atomic(const std::string& path, std::span<const Chunk> chunks,
                                     FileOps& ops = os_file_ops());

}  // namespace quantal::io
