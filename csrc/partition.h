// Lookups -> partitions sorted by row.
//
// A gradient names its rows in the order the batch looked them up: any order, any row many times. The walk over the
// table wants each row once and in row order, because then pages and cache lines are met once and in a direction that
// the hardware can follow. This file gets from the one to the other; it does no arithmetic on values and writes
// nothing that the caller can see, so every index is checked here, before the first row is changed.
//
//   1. partition_chunk: a chunk of lookups is counted and scattered by row range into its own stretch of `scattered`.
//      Chunks are independent of each other, so they need no common prefix sum and no barrier among them.
//   2. sort_partition: the stretches of one row range are gathered, chunk after chunk, and sorted by row in cache.
//
// An entry packs (row, position) into one 64-bit word, row above position. Sorting is stable by construction, so the
// lookups of a row stay in lookup order and their sum does not depend on the number of chunks or threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "arena.h"

namespace sparseadam {

using Entry = uint64_t;

// Where a gradient's lookups point: `indices` is [sparse_dim, num_lookups], row-major, as torch stores it.
struct Lookups {
  const int64_t* indices;
  const int64_t* sparse_shape;  // [sparse_dim]: the table's leading sizes; their product is the number of rows
  int64_t sparse_dim;
  int64_t num_lookups;
};

// The first index found outside its dimension; `lookup` is -1 where there is none.
struct BadIndex {
  int64_t lookup = -1;
  int64_t dim = 0;
  int64_t index = 0;
};

class Partitioning {
 public:
  // Whether rows and positions of this size fit into an Entry together.
  static bool fits(int64_t num_rows, int64_t num_lookups);

  // Plans chunks and row ranges for a number of threads, on which no result depends, and takes memory for them, which
  // must last until the step is over. `row_bytes` are those of a lookup's values, or 0 if that is not
  // known; `num_lookups_in_all` are the lookups that the threads share out: of all tables.
  void plan(const Lookups& lookups, int64_t num_rows, int64_t row_bytes, int num_threads, int64_t num_lookups_in_all,
            Arena& arena);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_chunks() const { return num_chunks_; }
  int64_t num_partitions() const { return num_partitions_; }
  // What the largest partition needs: entries to sort in, and the rows that it can have.
  int64_t sort_scratch() const { return std::min(largest_partition_, kMaxSortScratch); }
  int64_t max_rows() const { return std::min(largest_partition_, rows_spanned_); }

  // Where a chunk's lookups begin, or the last one's end.
  int64_t chunk_begin(int64_t chunk) const { return std::min(chunk * chunk_size_, lookups_.num_lookups); }

  // Step 1, for one chunk. Thread-safe for distinct chunks. Checks every index it reads.
  BadIndex partition_chunk(int64_t chunk);

  // Between the steps, on one thread: where each partition starts in the sorted order. The arena is that of `plan`, or
  // one that lasts as long.
  void finish_partitioning(Arena& arena);

  // Step 2, for one partition: all its entries to `sorted`. `scratch` holds at least sort_scratch() entries.
  // Thread-safe for distinct partitions.
  void sort_partition(int64_t partition, Entry* sorted, Entry* scratch) const;

  // Where a partition's sorted entries last as long as the arena.
  Entry* kept(int64_t partition) const { return kept_ + partition_begin(partition); }

  // After step 2: where the lookups of each row begin and end among a partition's sorted entries. Returns how many rows
  // there are. Both arrays hold as many as there are entries, or one more than there are rows.
  int64_t find_rows(const Entry* sorted, int64_t num_entries, uint32_t* begins, uint32_t* ends) const;

  int64_t partition_begin(int64_t partition) const { return partition_begins_[partition]; }
  int64_t partition_end(int64_t partition) const { return partition_begins_[partition + 1]; }
  int64_t partition_size(int64_t partition) const { return partition_end(partition) - partition_begin(partition); }
  int64_t row_of(Entry entry) const { return static_cast<int64_t>(entry >> position_bits_); }
  int64_t position_of(Entry entry) const { return static_cast<int64_t>(entry & position_mask_); }

 private:
  // A thread's own scratch stays in its cache, which does not matter for partitions larger than this, as those with a
  // row looked up millions of times are. They are sorted in memory that is there once, and not for each thread.
  static constexpr int64_t kMaxSortScratch = 65536;

  BadIndex find_bad_index(int64_t begin, int64_t end) const;
  template <class RowAt>
  void scatter_chunk(int64_t chunk, int64_t begin, int64_t end, RowAt row_at);

  Lookups lookups_{};
  int64_t num_rows_ = 0;
  int64_t num_chunks_ = 0;
  int64_t chunk_size_ = 0;
  int64_t num_partitions_ = 0;
  int64_t largest_partition_ = 0;
  int64_t rows_spanned_ = 0;  // by a partition
  int position_bits_ = 0;
  int range_bits_ = 0;  // a partition covers 2**range_bits_ consecutive rows
  Entry position_mask_ = 0;
  Entry* scattered_ = nullptr;           // [num_lookups], by chunk, then by partition
  Entry* kept_ = nullptr;                // [num_lookups], by row, then by position
  uint32_t* segment_begins_ = nullptr;   // [num_chunks, num_partitions + 1], into scattered_, relative to the chunk
  int64_t* partition_begins_ = nullptr;  // [num_partitions + 1], into kept_
  Entry* spare_ = nullptr;               // [num_lookups], where there are partitions beyond kMaxSortScratch
};

}  // namespace sparseadam
