#include "partition.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace sparseadam {

namespace {

// A partition of about this many lookups is sorted inside the first-level cache (8 bytes an entry, two buffers).
constexpr int64_t kLookupsPerPartition = 1024;
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

// One stable counting pass over `bits` bits from `shift` up.
void radix_pass(const Entry* from, Entry* to, int64_t count, int shift, int bits) {
  uint32_t begins[(1 << kMaxDigitBits) + 1];
  const Entry mask = (Entry{1} << bits) - 1;
  const int64_t num_buckets = int64_t{1} << bits;
  std::memset(begins, 0, sizeof(uint32_t) * static_cast<size_t>(num_buckets + 1));
  for (int64_t i = 0; i < count; ++i) ++begins[((from[i] >> shift) & mask) + 1];
  for (int64_t bucket = 1; bucket < num_buckets; ++bucket) begins[bucket] += begins[bucket - 1];
  for (int64_t i = 0; i < count; ++i) to[begins[(from[i] >> shift) & mask]++] = from[i];
}

}  // namespace

bool Partitioning::fits(int64_t num_rows, int64_t num_lookups) {
  const auto last_row = static_cast<uint64_t>(std::max<int64_t>(num_rows - 1, 0));
  const auto last_position = static_cast<uint64_t>(std::max<int64_t>(num_lookups - 1, 0));
  // Counters of a partition are 32 bits wide.
  return bit_width(last_row) + bit_width(last_position) <= 64 && last_position < std::numeric_limits<uint32_t>::max();
}

void Partitioning::plan(const Lookups& lookups, int64_t num_rows, Arena& arena) {
  lookups_ = lookups;
  num_rows_ = num_rows;
  const int64_t num_lookups = lookups.num_lookups;
  position_bits_ = bit_width(static_cast<uint64_t>(std::max<int64_t>(num_lookups - 1, 0)));
  position_mask_ = (Entry{1} << position_bits_) - 1;

  const int64_t wanted = std::clamp<int64_t>(num_lookups / kLookupsPerPartition, 1, kMaxPartitions);
  const int64_t last_row = std::max<int64_t>(num_rows - 1, 0);
  range_bits_ = 0;
  while ((last_row >> range_bits_) >= wanted) ++range_bits_;
  num_partitions_ = (last_row >> range_bits_) + 1;

  chunk_size_ = std::max(kMinChunkSize, 8 * num_partitions_);
  num_chunks_ = (num_lookups + chunk_size_ - 1) / chunk_size_;

  scattered_ = arena.take<Entry>(num_lookups);
  sorted_ = arena.take<Entry>(num_lookups);
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
  const int64_t begin = chunk * chunk_size_;
  const int64_t end = std::min(begin + chunk_size_, lookups_.num_lookups);
  if (!is_in_range(lookups_, begin, end)) return find_bad_index(begin, end);

  if (lookups_.sparse_dim == 1) {
    scatter_chunk(chunk, begin, end, [this](int64_t i) { return lookups_.indices[i]; });
  } else {
    scatter_chunk(chunk, begin, end, [this](int64_t i) { return flatten_row(lookups_, i); });
  }
  return {};
}

template <class RowAt>
void Partitioning::scatter_chunk(int64_t chunk, int64_t begin, int64_t end, RowAt row_at) {
  uint32_t* segments = segment_begins_ + chunk * (num_partitions_ + 1);
  std::fill(segments, segments + num_partitions_ + 1, 0);
  for (int64_t i = begin; i < end; ++i) ++segments[(row_at(i) >> range_bits_) + 1];
  for (int64_t p = 1; p <= num_partitions_; ++p) segments[p] += segments[p - 1];

  Entry* scattered = scattered_ + begin;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = row_at(i);
    const Entry entry = (static_cast<Entry>(row) << position_bits_) | static_cast<Entry>(i);
    scattered[segments[row >> range_bits_]++] = entry;
  }
  // Each begin has moved to its segment's end, which is the next one's begin: shift them back by one place.
  std::copy_backward(segments, segments + num_partitions_, segments + num_partitions_ + 1);
  segments[0] = 0;
}

void Partitioning::finish_partitioning() {
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
}

void Partitioning::sort_partition(int64_t partition, Entry* scratch) {
  const int64_t count = partition_end(partition) - partition_begin(partition);
  Entry* sorted = sorted_ + partition_begin(partition);
  const bool use_radix = count >= kRadixSortMin && range_bits_ > 0;
  const int num_passes = use_radix ? (range_bits_ + kMaxDigitBits - 1) / kMaxDigitBits : 0;

  // Start in the buffer from which an even or odd number of passes ends in `sorted`.
  Entry* from = num_passes % 2 == 0 ? sorted : scratch;
  Entry* to = num_passes % 2 == 0 ? scratch : sorted;
  Entry* cursor = from;
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const uint32_t* segments = segment_begins_ + chunk * (num_partitions_ + 1);
    const Entry* chunk_entries = scattered_ + chunk * chunk_size_;
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
int64_t Partitioning::find_rows(int64_t partition, uint32_t* begins, uint32_t* ends) const {
  const int64_t begin = partition_begin(partition);
  const int64_t end = partition_end(partition);
  if (begin == end) return 0;
  int64_t r = 0;
  begins[0] = static_cast<uint32_t>(begin);
  for (int64_t i = begin; i + 1 < end; ++i) {
    const auto next = static_cast<uint32_t>(i + 1);
    ends[r] = next;
    begins[r + 1] = next;
    r += (sorted_[i] ^ sorted_[next]) >> position_bits_ != 0 ? 1 : 0;
  }
  ends[r] = static_cast<uint32_t>(end);
  return r + 1;
}

}  // namespace sparseadam
