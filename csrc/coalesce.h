// Summing the repeated rows of a gradient by itself, for what needs the sums and not a step: clipping, accumulation.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "partition.h"
#include "row_update.h"

namespace sparseadam {

// The rows of a gradient's lookups, sorted, with the lookups of each. Indices are checked and read once, when this is
// made; then memory for the sums can be allocated, and `sum` fills it.
class Coalescing {
 public:
  // `num_rows` is the table's; Partitioning::fits it and the lookups.
  Coalescing(const Lookups& lookups, int64_t num_rows, int num_threads);

  const BadIndex& bad_index() const { return bad_index_; }  // if there is one, there are no rows
  int64_t num_touched() const { return first_rows_.back(); }

  // Writes the touched rows, ascending, [num_touched], and the sum of each one's values in lookup order, [num_touched,
  // width], in the type of its moments.
  void sum(const void* values, int64_t width, ElementType element, InstructionSet instruction_set, int64_t* rows,
           void* sums, int num_threads) const;

 private:
  int64_t find_rows(int64_t partition);

  Arena arena_;
  Partitioning lookups_;
  BadIndex bad_index_;
  uint32_t* begins_ = nullptr;
  uint32_t* ends_ = nullptr;
  std::vector<int64_t> first_rows_{0};  // [num_partitions + 1]: where a partition's rows begin among all
};

}  // namespace sparseadam
