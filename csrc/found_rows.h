// Rows that were read, as the step after it meets them again.
//
// Where missed steps are replayed, rows are brought up to date as a batch looks them up, and most often the gradient
// that follows has those very lookups. catch_up leaves them here, sorted and with their slots, so that the step need
// neither sort nor find them once more, nor look at each row's clock to see that it is up to date.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "partition.h"

namespace sparseadam {

struct FoundRows {
  Arena arena;  // holds all of the following
  Partitioning lookups;
  int64_t* rows;     // [num_rows_read], as they were read
  uint32_t* begins;  // of each partition's rows, in its sorted entries
  uint32_t* ends;
  int64_t* slots;     // of each partition's rows, -1 where there is none
  int64_t* num_rows;  // per partition
  int64_t num_rows_read = 0;
  int64_t num_slots = 0;  // in use when they were found
  int64_t step = -1;      // up to which they were brought; -1 where they are no longer to be used

  // Whether they are the rows of a step's lookups, as they would be found now. Slots are never given back or moved
  // where missed steps are replayed, so their number tells that they are what they were.
  bool are_those_of(const Lookups& other, int64_t step_so_far, int64_t num_slots_so_far) const {
    return step == step_so_far && num_slots == num_slots_so_far && num_rows_read == other.num_lookups &&
           other.sparse_dim == 1 && other.sparse_shape[0] == lookups.num_rows() &&
           std::equal(rows, rows + num_rows_read, other.indices);
  }
};

}  // namespace sparseadam
