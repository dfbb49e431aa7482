#include "coalesce.h"

#include <algorithm>
#include <numeric>

#include "thread_team.h"

namespace sparseadam {

Coalescing::Coalescing(const Lookups& lookups, int64_t num_rows, int num_threads) {
  if (lookups.num_lookups == 0) return;
  lookups_.plan(lookups, num_rows, 0, num_threads, lookups.num_lookups, arena_);
  begins_ = arena_.take<uint32_t>(lookups.num_lookups);
  ends_ = arena_.take<uint32_t>(lookups.num_lookups);
  const int64_t num_partitions = lookups_.num_partitions();
  std::vector<BadIndex> bad(static_cast<size_t>(lookups_.num_chunks()));
  std::vector<int64_t> counts(static_cast<size_t>(num_partitions));
  auto run = [&](Team& team) {
    auto partition_chunk = [&](int64_t chunk, int) {
      bad[static_cast<size_t>(chunk)] = lookups_.partition_chunk(chunk);
    };
    team.for_each(lookups_.num_chunks(), partition_chunk);
    const auto first_bad =
        std::find_if(bad.begin(), bad.end(), [](const BadIndex& found) { return found.lookup >= 0; });
    if (first_bad != bad.end()) {
      bad_index_ = *first_bad;
      return;
    }
    lookups_.finish_partitioning(arena_);
    auto find_rows_of = [&](int64_t partition, int) { counts[static_cast<size_t>(partition)] = find_rows(partition); };
    team.for_each(num_partitions, find_rows_of);
  };
  with_team(num_threads, run);
  if (bad_index_.lookup >= 0) return;
  first_rows_.resize(static_cast<size_t>(num_partitions) + 1);
  std::partial_sum(counts.begin(), counts.end(), first_rows_.begin() + 1);
}

// Sorts a partition and finds where the lookups of its rows begin and end.
int64_t Coalescing::find_rows(int64_t partition) {
  const int64_t begin = lookups_.partition_begin(partition);
  const int64_t size = lookups_.partition_size(partition);
  std::vector<Entry> scratch(static_cast<size_t>(std::min(size, lookups_.sort_scratch())));
  lookups_.sort_partition(partition, lookups_.kept(partition), scratch.data());
  return lookups_.find_rows(lookups_.kept(partition), size, begins_ + begin, ends_ + begin);
}

void Coalescing::sum(const void* values, int64_t width, ElementType element, InstructionSet instruction_set,
                     int64_t* rows, void* sums, int num_threads) const {
  if (num_touched() == 0) return;
  const SumRows sum_rows = row_kernels_for(element, {}, false, instruction_set).sum_rows;
  const int64_t sum_bytes = moment_bytes(element) * width;
  auto run = [&](Team& team) {
    auto sum_partition = [&](int64_t partition, int) {
      const auto p = static_cast<size_t>(partition);
      const int64_t at = lookups_.partition_begin(partition);
      const int64_t first = first_rows_[p];
      const RowRun of{&lookups_, lookups_.kept(partition),  begins_ + at, ends_ + at,
                      nullptr,   first_rows_[p + 1] - first};
      for (int64_t r = 0; r < of.num_rows; ++r) rows[first + r] = lookups_.row_of(of.sorted[of.begins[r]]);
      sum_rows(values, width, of, static_cast<char*>(sums) + first * sum_bytes);
    };
    team.for_each(lookups_.num_partitions(), sum_partition);
  };
  with_team(num_threads, run);
}

}  // namespace sparseadam
