#include "partition.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "element.h"
#include "prefetch.h"

namespace sparseadam {

namespace {

// A partition of about this many lookups is sorted inside the first-level cache, or nearly so (8 bytes an entry, two
// buffers). With half as many 65,536 Zipf lookups into 100,000 x 16 took 10 % more time on two cores, into 1,000,000 x
// 64 3 %. They are half as large where threads would have less than kPartitionsPerThread each to share out otherwise,
// of all tables: 26 tables of 2,048 lookups each took 2 to 5 % less time in whole ones. And they are twice as large
// where a row is a single cache line, so that sorting counts for more: 65,536 Zipf lookups into 100,000 x 16 took 3 to
// 8 % less time so on two cores of Zen 5, into 1,000,000 x 16 4 to 6 %; uniform ones into 1,000,000 x 64 up to 6 %
// more.
constexpr int64_t kLookupsPerPartition = 2048;
constexpr int64_t kLookupsPerPartitionOfNarrowRows = 4096;
constexpr int64_t kMinLookupsPerPartition = kLookupsPerPartition / 2;
constexpr int64_t kPartitionsPerThread = 4;
constexpr int64_t kMaxPartitions = 4096;
constexpr int64_t kMinChunkSize = 8192;
// Below this many entries a comparison sort beats clearing and scanning radix counters.
constexpr int64_t kRadixSortMin = 192;
constexpr int kMaxDigitBits = 11;

int bit_width(uint64_t value) {
  int width = 0;
  while (value != 0) {
    value >>= 1;
    ++width;
  }
  return width;
}

// Row named by lookup `position`: the mixed-radix number of its indices over the sparse dimensions.
inline int64_t flatten_row(const Lookups& lookups, int64_t position) {
  int64_t row = 0;
  for (int64_t dim = 0; dim < lookups.sparse_dim; ++dim) {
    row = row * lookups.sparse_shape[dim] + lookups.indices[dim * lookups.num_lookups + position];
  }
  return row;
}

// Whether all indices of a stretch lie inside their dimensions. `index | (size - 1 - index)` has its sign bit set where
// one does not; written so, the loop is one that every instruction set can vectorise.
inline bool is_in_range(const Lookups& lookups, int64_t begin, int64_t end) {
  uint64_t outside = 0;
  for (int64_t dim = 0; dim < lookups.sparse_dim; ++dim) {
    const int64_t* indices = lookups.indices + dim * lookups.num_lookups;
    const auto last = static_cast<uint64_t>(lookups.sparse_shape[dim] - 1);
    for (int64_t position = begin; position < end; ++position) {
      const auto index = static_cast<uint64_t>(indices[position]);
      outside |= index | (last - index);
    }
  }
  return outside >> 63 == 0;
}

// Items are taken from so many stretches at once. An item reads and writes its bucket's counter, and the next one of
// that bucket waits for it; those of another stretch have counters of their own. On a Xeon 65,536 Zipf lookups into
// 1,000,000 x 64 took 3 % less time with two than with one, and 26 tables 5 %; four brought no more. On an AMD EPYC
// (Zen 5) as many into 100,000 x 16 took 4 % less with four than with two, where the sort has few enough buckets for
// the counters to be worth clearing.
constexpr int64_t kLanes = 2;
constexpr int64_t kMoreLanes = 4;
constexpr int64_t kItemsPerBucketForMore = 8;

// Puts items into buckets, bucket after bucket, those of one bucket in their order. `counters` has room for kNumLanes *
// num_buckets; returned is the part of it that says where each bucket ends.
template <int64_t kNumLanes, class BucketOf, class EntryOf>
SPARSEADAM_INLINE const uint32_t* scatter(int64_t num_items, int64_t num_buckets, BucketOf bucket_of, EntryOf entry_of,
                                          uint32_t* __restrict__ counters, Entry* __restrict__ to) {
  std::memset(counters, 0, sizeof(uint32_t) * static_cast<size_t>(kNumLanes * num_buckets));
  const int64_t stretch = num_items / kNumLanes;
  uint32_t* last_lane = counters + (kNumLanes - 1) * num_buckets;  // which takes what is left over as well
  for (int64_t i = 0; i < stretch; ++i) {
    for (int64_t lane = 0; lane < kNumLanes; ++lane) ++counters[lane * num_buckets + bucket_of(lane * stretch + i)];
  }
  for (int64_t i = kNumLanes * stretch; i < num_items; ++i) ++last_lane[bucket_of(i)];

  uint32_t begin = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    for (int64_t lane = 0; lane < kNumLanes; ++lane) {
      const uint32_t count = counters[lane * num_buckets + bucket];
      counters[lane * num_buckets + bucket] = begin;
      begin += count;
    }
  }
  for (int64_t i = 0; i < stretch; ++i) {
    for (int64_t lane = 0; lane < kNumLanes; ++lane) {
      const int64_t item = lane * stretch + i;
      to[counters[lane * num_buckets + bucket_of(item)]++] = entry_of(item);
    }
  }
  for (int64_t i = kNumLanes * stretch; i < num_items; ++i) to[last_lane[bucket_of(i)]++] = entry_of(i);
  return last_lane;
}

// One stable counting pass over `bits` bits from `shift` up.
void radix_pass(const Entry* from, Entry* to, int64_t count, int shift, int bits) {
  uint32_t counters[kMoreLanes << kMaxDigitBits];
  const Entry mask = (Entry{1} << bits) - 1;
  const auto digit_of = [=](int64_t i) { return static_cast<int64_t>((from[i] >> shift) & mask); };
  const auto entry_of = [=](int64_t i) { return from[i]; };
  const int64_t num_buckets = int64_t{1} << bits;
  if (count >= kItemsPerBucketForMore * num_buckets) {
    scatter<kMoreLanes>(count, num_buckets, digit_of, entry_of, counters, to);
  } else {
    scatter<kLanes>(count, num_buckets, digit_of, entry_of, counters, to);
  }
}

int64_t lookups_per_partition(int64_t row_bytes) {
  return row_bytes > 0 && row_bytes <= kCacheLine ? kLookupsPerPartitionOfNarrowRows : kLookupsPerPartition;
}

}  // namespace

bool Partitioning::fits(int64_t num_rows, int64_t num_lookups) {
  const auto last_row = static_cast<uint64_t>(std::max<int64_t>(num_rows - 1, 0));
  const auto last_position = static_cast<uint64_t>(std::max<int64_t>(num_lookups - 1, 0));
  // Counters of a partition are 32 bits wide.
  return bit_width(last_row) + bit_width(last_position) <= 64 && last_position < std::numeric_limits<uint32_t>::max();
}

void Partitioning::plan(const Lookups& lookups, int64_t num_rows, int64_t row_bytes, int num_threads,
                        int64_t num_lookups_in_all, Arena& arena) {
  lookups_ = lookups;
  num_rows_ = num_rows;
  const int64_t num_lookups = lookups.num_lookups;
  position_bits_ = bit_width(static_cast<uint64_t>(std::max<int64_t>(num_lookups - 1, 0)));
  position_mask_ = (Entry{1} << position_bits_) - 1;

  const int64_t its_share = kPartitionsPerThread * num_threads * num_lookups / std::max<int64_t>(num_lookups_in_all, 1);
  const int64_t to_share = std::min(its_share, num_lookups / kMinLookupsPerPartition);
  const int64_t wanted =
      std::clamp<int64_t>(std::max(num_lookups / lookups_per_partition(row_bytes), to_share), 1, kMaxPartitions);
  const int64_t last_row = std::max<int64_t>(num_rows - 1, 0);
  range_bits_ = 0;
  while ((last_row >> range_bits_) >= wanted) ++range_bits_;
  num_partitions_ = (last_row >> range_bits_) + 1;
  rows_spanned_ = num_partitions_ > 1 ? int64_t{1} << range_bits_ : num_rows;

  chunk_size_ = std::max(kMinChunkSize, 8 * num_partitions_);
  num_chunks_ = (num_lookups + chunk_size_ - 1) / chunk_size_;

  scattered_ = arena.take<Entry>(num_lookups);
  kept_ = arena.take<Entry>(num_lookups);
  segment_begins_ = arena.take<uint32_t>(num_chunks_ * (num_partitions_ + 1));
  partition_begins_ = arena.take<int64_t>(num_partitions_ + 1);
}

BadIndex Partitioning::find_bad_index(int64_t begin, int64_t end) const {
  for (int64_t position = begin; position < end; ++position) {
    for (int64_t dim = 0; dim < lookups_.sparse_dim; ++dim) {
      const int64_t index = lookups_.indices[dim * lookups_.num_lookups + position];
      if (index < 0 || index >= lookups_.sparse_shape[dim]) return {position, dim, index};
    }
  }
  return {};
}

BadIndex Partitioning::partition_chunk(int64_t chunk) {
  const int64_t begin = chunk_begin(chunk);
  const int64_t end = chunk_begin(chunk + 1);
  if (!is_in_range(lookups_, begin, end)) return find_bad_index(begin, end);

  if (lookups_.sparse_dim == 1) {
    scatter_chunk(chunk, begin, end, [indices = lookups_.indices](int64_t i) { return indices[i]; });
  } else {
    scatter_chunk(chunk, begin, end, [lookups = lookups_](int64_t i) { return flatten_row(lookups, i); });
  }
  return {};
}

template <class RowAt>
void Partitioning::scatter_chunk(int64_t chunk, int64_t begin, int64_t end, RowAt row_at) {
  // Not in segment_begins_, where other threads write to the same cache lines: on two cores 65,536 Zipf lookups into
  // 100,000 x 16 took a fifth less time so.
  uint32_t counters[kLanes * kMaxPartitions];
  const int range_bits = range_bits_;
  const int position_bits = position_bits_;
  const auto partition_of = [=](int64_t i) { return row_at(begin + i) >> range_bits; };
  const auto entry_of = [=](int64_t i) {
    return (static_cast<Entry>(row_at(begin + i)) << position_bits) | static_cast<Entry>(begin + i);
  };
  // The last walk has driven these lines out of the caches, and to fetch each as its first entry is written took two
  // thirds of a scatter's time; clearing them writes whole lines, which need not be fetched. On an AMD EPYC (Zen 5) a
  // step of 65,536 Zipf lookups into 100,000 x 16 took 2 to 11 % less time so, of 262,144 into 1,000,000 x 128 3 to 4
  // %. Prefetches, for writing too, brought 1 %.
  std::memset(scattered_ + begin, 0, sizeof(Entry) * static_cast<size_t>(end - begin));
  const uint32_t* ends =
      scatter<kLanes>(end - begin, num_partitions_, partition_of, entry_of, counters, scattered_ + begin);
  uint32_t* segments = segment_begins_ + chunk * (num_partitions_ + 1);
  segments[0] = 0;
  std::copy(ends, ends + num_partitions_, segments + 1);
}

void Partitioning::finish_partitioning(Arena& arena) {
  std::fill(partition_begins_, partition_begins_ + num_partitions_ + 1, 0);
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const uint32_t* segments = segment_begins_ + chunk * (num_partitions_ + 1);
    for (int64_t p = 0; p < num_partitions_; ++p) partition_begins_[p + 1] += segments[p + 1] - segments[p];
  }
  largest_partition_ = 0;
  for (int64_t p = 0; p < num_partitions_; ++p) {
    largest_partition_ = std::max(largest_partition_, partition_begins_[p + 1]);
    partition_begins_[p + 1] += partition_begins_[p];
  }
  if (largest_partition_ > kMaxSortScratch) spare_ = arena.take<Entry>(lookups_.num_lookups);
}

void Partitioning::sort_partition(int64_t partition, Entry* sorted, Entry* scratch) const {
  const int64_t count = partition_size(partition);
  const bool use_radix = count >= kRadixSortMin && range_bits_ > 0;
  if (count > kMaxSortScratch) scratch = spare_ + partition_begin(partition);
  const int num_passes = use_radix ? (range_bits_ + kMaxDigitBits - 1) / kMaxDigitBits : 0;

  // Start in the buffer from which an even or odd number of passes ends in `sorted`.
  Entry* from = num_passes % 2 == 0 ? sorted : scratch;
  Entry* to = num_passes % 2 == 0 ? scratch : sorted;
  Entry* cursor = from;
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const uint32_t* segments = segment_begins_ + chunk * (num_partitions_ + 1);
    const Entry* chunk_entries = scattered_ + chunk_begin(chunk);
    cursor = std::copy(chunk_entries + segments[partition], chunk_entries + segments[partition + 1], cursor);
  }
  if (!use_radix) {
    std::sort(sorted, sorted + count);  // entries are distinct, so this is the stable order by row
    return;
  }
  // The partition fixes a row's high bits; only the low ones are left to sort by, in digits of equal width.
  for (int pass = 0, bit = 0; pass < num_passes; ++pass) {
    const int bits = (range_bits_ - bit + num_passes - pass - 1) / (num_passes - pass);
    radix_pass(from, to, count, position_bits_ + bit, bits);
    bit += bits;
    std::swap(from, to);
  }
}

// Without branches on the entries: which of them is its row's last one cannot be foreseen.
int64_t Partitioning::find_rows(const Entry* sorted, int64_t num_entries, uint32_t* begins, uint32_t* ends) const {
  if (num_entries == 0) return 0;
  int64_t r = 0;
  begins[0] = 0;
  for (int64_t i = 0; i + 1 < num_entries; ++i) {
    const auto next = static_cast<uint32_t>(i + 1);
    ends[r] = next;
    begins[r + 1] = next;
    r += (sorted[i] ^ sorted[next]) >> position_bits_ != 0 ? 1 : 0;
  }
  ends[r] = static_cast<uint32_t>(num_entries);
  return r + 1;
}

}  // namespace sparseadam
