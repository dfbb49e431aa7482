// Bringing rows to the processor before a walk over them comes by.
#pragma once

#include <algorithm>
#include <cstdint>

#include "element.h"

namespace sparseadam {

// How far ahead of the walk rows are prefetched: by bytes, so that narrow and wide rows have as much in flight. 8 KiB
// made 65,536 uniform lookups into 1,000,000 x 64 take 4.0 ms on two cores in place of 4.5 with 4 KiB; more brought
// nothing.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kMinPrefetchRows = 2;
constexpr int64_t kMaxPrefetchRows = 32;
constexpr int64_t kCacheLine = 64;

SPARSEADAM_INLINE void prefetch(const void* address, int64_t num_bytes) {
  const char* bytes = static_cast<const char*>(address);
  for (int64_t offset = 0; offset < num_bytes; offset += kCacheLine) __builtin_prefetch(bytes + offset, 1, 2);
}

// How many rows ahead that is.
inline int64_t prefetch_distance(int64_t row_bytes) {
  if (row_bytes == 0) return kMinPrefetchRows;
  return std::clamp(kPrefetchBytes / row_bytes, kMinPrefetchRows, kMaxPrefetchRows);
}

}  // namespace sparseadam
