#include <quantal/status.h>

namespace quantal {

const char* errc_name(Errc code) {
  switch (code) {
    case Errc::kOk:
      return "Ok";
    case Errc::kInvalidArgument:
      return "InvalidArgument";
    case Errc::kIo:
      return "Io";
    case Errc::kHeaderTooSmall:
      return "HeaderTooSmall";
    case Errc::kHeaderTooLarge:
      return "HeaderTooLarge";
    case Errc::kInvalidHeaderLength:
      return "InvalidHeaderLength";
    case Errc::kInvalidUtf8:
      return "InvalidUtf8";
    case Errc::kInvalidJson:
      return "InvalidJson";
    case Errc::kDepthExceeded:
      return "DepthExceeded";
    case Errc::kDuplicateKey:
      return "DuplicateKey";
    case Errc::kUnknownField:
      return "UnknownField";
    case Errc::kUnsupportedDtype:
      return "UnsupportedDtype";
    case Errc::kInvalidShape:
      return "InvalidShape";
    case Errc::kInvalidOffset:
      return "InvalidOffset";
    case Errc::kSizeMismatch:
      return "SizeMismatch";
    case Errc::kMissingTensor:
      return "MissingTensor";
    case Errc::kInvalidData:
      return "InvalidData";
    case Errc::kPathEscape:
      return "PathEscape";
    case Errc::kOrphanTensor:
      return "OrphanTensor";
    case Errc::kLimitExceeded:
      return "LimitExceeded";
    case Errc::kOutOfMemory:
      return "OutOfMemory";
  }
  return "unknown";
}

}  // namespace quantal
