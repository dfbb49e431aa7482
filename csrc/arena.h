// Memory for one step's scratch: taken piece by piece, given back all at once, kept from step to step.
//
// The scratch of all tables of a step lies in one stretch, so a step on many small tables finds it in the caches;
// vectors of each table's own were as many cache misses a table.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace sparseadam {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Memory for `count` elements, not initialised, valid until `reset`.
  template <class T>
  T* take(int64_t count) {
    const size_t num_bytes = (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ + num_bytes > size_) add_block(num_bytes);
    std::byte* begin = blocks_.back().get() + used_;
    used_ += num_bytes;
    return reinterpret_cast<T*>(begin);
  }

  // Takes everything back. Where it had to be pieced together, the next round gets it in one piece.
  void reset() {
    if (blocks_.size() > 1) {
      blocks_.clear();
      size_ = 0;
      used_ = 0;
      add_block(total_);
    }
    used_ = 0;
  }

 private:
  static constexpr size_t kAlignment = alignof(std::max_align_t);

  void add_block(size_t num_bytes) {
    const size_t size = std::max(num_bytes, size_);
    blocks_.emplace_back(new std::byte[size]);  // make_unique would write zeros
    total_ = blocks_.size() == 1 ? size : total_ + size;
    size_ = size;
    used_ = 0;
  }

  std::vector<std::unique_ptr<std::byte[]>> blocks_;
  size_t size_ = 0;   // of the last block
  size_t used_ = 0;   // of the last block
  size_t total_ = 0;  // of all blocks
};

}  // namespace sparseadam
