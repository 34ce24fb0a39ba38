#include "kernels/scratch.h"

#include <new>
#include <vector>

namespace quantal::kernels {
namespace {

constexpr std::align_val_t kAlign{64};

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kMostPieces = 0;  // it has to see where each of them ends
#else
constexpr std::size_t kMostPieces = 16;
#endif

struct Piece {
  float* data;
  std::size_t bytes;
};

void release(const Piece& piece) { ::operator delete(piece.data, kAlign); }

/// What a thread keeps, the oldest first.
class Kept {
 public:
  Kept() { pieces_.reserve(kMostPieces); }
  ~Kept() {
    for (const Piece& piece : pieces_) release(piece);
  }
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

  /// The smallest that has as many bytes and not more than twice as many; null where none has.
  Piece take(std::size_t bytes) {
    auto best = pieces_.end();
    for (auto piece = pieces_.begin(); piece != pieces_.end(); ++piece) {
      const bool fits = piece->bytes >= bytes && piece->bytes / 2 <= bytes;
      if (fits && (best == pieces_.end() || piece->bytes < best->bytes)) best = piece;
    }
    return best == pieces_.end() ? Piece{nullptr, 0} : remove(best);
  }

  void give_back(const Piece& piece) {
    if (kMostPieces == 0 || piece.bytes > Scratch::kMostKept) return release(piece);
    while (pieces_.size() == kMostPieces || total_ + piece.bytes > Scratch::kMostKept) {
      release(remove(pieces_.begin()));
    }
    pieces_.push_back(piece);
    total_ += piece.bytes;
  }

 private:
  Piece remove(std::vector<Piece>::iterator piece) {
    const Piece removed = *piece;
    pieces_.erase(piece);
    total_ -= removed.bytes;
    return removed;
  }

  std::vector<Piece> pieces_;
  std::size_t total_ = 0;  ///< bytes
};

Kept& kept() {
  thread_local Kept of_thread;
  return of_thread;
}

}  // namespace

Scratch::Scratch(std::int64_t floats) {
  const auto bytes = static_cast<std::size_t>(floats) * sizeof(float);
  if (bytes == 0) return;
  Piece piece = kept().take(bytes);
  if (piece.data == nullptr) {
    piece = {static_cast<float*>(::operator new(bytes, kAlign)), bytes};
  }
  data_ = piece.data;
  bytes_ = piece.bytes;
}

Scratch::~Scratch() {
  if (data_ != nullptr) kept().give_back({data_, bytes_});
}

}  // namespace quantal::kernels
