// Bringing rows to the processor before a walk over them comes by.
#pragma once

#include <algorithm>
#include <cstdint>

#include "element.h"

#if defined(SPARSEADAM_X86)
#include <cpuid.h>
#endif

namespace sparseadam {

// How far ahead of the walk lines are asked for: in bytes, so that narrow and wide rows have as much in flight.
struct Reach {
  int64_t bytes_of_rows;          // of the table, from the row that is walked to the one that is prefetched
  int64_t bytes_of_all;           // of table, moments and values, from the lookup that is summed to the prefetched one
  int64_t lookups_for_page_walk;  // from that one to the one whose first line is; 0: none is, apart from the rest
};

// Into the second-level cache. 8 KiB made 65,536 uniform lookups into 1,000,000 x 64 take 4.0 ms on two cores of a Xeon
// in place of 4.5 with 4 KiB; more brought nothing. A lookup's first line is prefetched before the rest of its values,
// and with it their page: values come out of a backward pass, in small pages. 262,144 Zipf lookups into 1,000,000 x 128
// took 6 % less time so, 65,536 into 1,000,000 x 64 and into 10,000,000 x 64 5 %, and as many uniform ones 2 %.
constexpr Reach kFar{8192, 32768, 32};

// Into the first-level cache. A Xeon has more lines on their way to the second-level one; AMD's Zen 5 as many to
// either, and would then fetch them once more. On two cores of the latter this took 7 to 12 % less time than kFar with
// 65,536 uniform lookups into 1,000,000 x 64, 8 to 11 % less with 262,144 into 1,000,000 x 128, 5 to 8 % less with Zipf
// ones. Twice as far took 2 to 4 % more, half as far up to 12 % more of narrow rows. First lines apart from the rest
// took up to 5 % more. Rows of 4 KiB took 4 % more than with kFar, of 3 KiB 3 % less.
constexpr Reach kNear{2048, 8192, 0};
constexpr int64_t kMaxBytesNear = 3072;

// Whether this is AMD's Zen 5 (family 1Ah) or later. For older ones kFar was tried on one alone, and this on none.
inline bool is_zen5_or_later() {
#if defined(SPARSEADAM_X86)
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") == 0 || __get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
  const unsigned family = ((eax >> 8) & 0xFu) + ((eax >> 20) & 0xFFu);
  return family >= 0x1Au;
#else
  return false;
#endif
}

inline const bool kIsZen5OrLater = is_zen5_or_later();

SPARSEADAM_INLINE bool goes_near(int64_t row_bytes) { return row_bytes <= kMaxBytesNear && kIsZen5OrLater; }

inline const Reach& reach_of(int64_t row_bytes) { return goes_near(row_bytes) ? kNear : kFar; }

constexpr int64_t kMinPrefetchRows = 2;
constexpr int64_t kMaxPrefetchRows = 32;
constexpr int64_t kCacheLine = 64;

template <int kLocality>
SPARSEADAM_INLINE void prefetch_with_locality(const void* address, int64_t num_bytes) {
  const char* bytes = static_cast<const char*>(address);
  for (int64_t offset = 0; offset < num_bytes; offset += kCacheLine) __builtin_prefetch(bytes + offset, 1, kLocality);
}

// `num_bytes`: of a row of a table, of moments or of values.
SPARSEADAM_INLINE void prefetch(const void* address, int64_t num_bytes) {
  if (goes_near(num_bytes)) {
    prefetch_with_locality<3>(address, num_bytes);
  } else {
    prefetch_with_locality<2>(address, num_bytes);
  }
}

// How many rows ahead of the walk rows are prefetched.
inline int64_t prefetch_distance(int64_t row_bytes) {
  if (row_bytes == 0) return kMinPrefetchRows;
  return std::clamp(reach_of(row_bytes).bytes_of_rows / row_bytes, kMinPrefetchRows, kMaxPrefetchRows);
}

// The same for the values of a walk's lookups. Between those of two lookups comes what the update needs of a row, but
// only once for all lookups of the row: the more it has, the more lookups ahead it must be until as many bytes are on
// their way. For 262,144 Zipf lookups into 1,000,000 x 128 a step took 4 to 5 % less time than with rows' own distance.
constexpr int64_t kStreamsARow = 3;  // the table and both moments
constexpr int64_t kMaxPrefetchLookups = 64;

inline int64_t prefetch_distance_of_values(int64_t row_bytes, int64_t num_rows, int64_t num_lookups) {
  const int64_t bytes = row_bytes * (kStreamsARow * num_rows + num_lookups);
  if (bytes == 0) return kMinPrefetchRows;
  return std::clamp(reach_of(row_bytes).bytes_of_all * num_lookups / bytes, kMinPrefetchRows, kMaxPrefetchLookups);
}

// How much of a lookup's values is prefetched before the rest. Values of a single line gained nothing.
inline int64_t first_bytes_of_values(int64_t row_bytes) {
  return reach_of(row_bytes).lookups_for_page_walk > 0 && row_bytes > kCacheLine ? kCacheLine : 0;
}

// Rows farther apart than pages are prefetched in groups of this many bytes. Before a row's lines can be asked for, the
// processor walks the page tables, and a prefetch instruction waits for that; the walks of several rows go on at once
// where little stands between their prefetches. 65,536 Zipf lookups into 10,000,000 x 64 took 9 % less time so. Where
// rows share pages, or have adjacent ones, there is nothing to gain, and the even pace is the better one: by 4 % for
// 65,536 uniform lookups into 1,000,000 x 64.
constexpr int64_t kGroupBytes = 2048;
constexpr int64_t kMaxGroupRows = 16;
constexpr int64_t kBytesApart = 5120;  // a page is 4,096

// Prefetches the rows of a walk in their order, a group at a time.
class GroupPrefetch {
 public:
  // `rows_spanned`: how far the last row lies from the first one, `stride_bytes` from row to row.
  GroupPrefetch(int64_t num_rows, int64_t row_bytes, int64_t rows_spanned, int64_t stride_bytes)
      : num_rows_(num_rows), group_(1) {
    if (row_bytes == 0 || rows_spanned * stride_bytes / num_rows < kBytesApart) return;
    group_ = std::clamp<int64_t>(kGroupBytes / row_bytes, 1, kMaxGroupRows);
  }

  // Calls prefetch_row(i) for each row up to row r, and the rest of its group, for which it was not called before.
  template <class PrefetchRow>
  SPARSEADAM_INLINE void reach(int64_t r, PrefetchRow prefetch_row) {
    if (r < next_) return;
    const int64_t end = std::min(r + group_, num_rows_);
    for (; next_ < end; ++next_) prefetch_row(next_);
  }

 private:
  int64_t num_rows_, group_;
  int64_t next_ = 0;
};

}  // namespace sparseadam
