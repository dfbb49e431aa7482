// Replaying missed steps: moves rows that are about to be read to where their table's last step would have them.
#pragma once

#include <cstdint>

#include "history.h"
#include "partition.h"
#include "step.h"

namespace sparseadam {

// Rows of one table that are about to be read, any of them more than once.
struct RowsRead {
  const Table* table;
  const int64_t* rows;  // [num_rows_read]
  int64_t num_rows_read;
  History history;
  uint64_t seed;  // of stochastic rounding
  // In: slots in use before. Out: after. Rows without one get one where weight decay moves them.
  int64_t num_slots;
};

// Moves the rows that are behind, in place, and sets their clocks; or none of them, where a row is outside the table,
// which is returned. Moments stay as they were last written. The result does not depend on the number of threads.
// Calls for one history do not overlap.
BadIndex catch_up(RowsRead& read, InstructionSet instruction_set, int num_threads);

}  // namespace sparseadam
