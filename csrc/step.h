// One step over all tables: check and partition every lookup, then walk the rows.
#pragma once

#include <cstdint>
#include <vector>

#include "row_update.h"

namespace sparseadam {

// A table with its compact moments. `slot_of_row` holds slot + 1, and 0 for a row never touched.
struct Table {
  void* table;
  int64_t table_stride;
  ElementType element;
  std::vector<int64_t> sparse_shape;
  int64_t num_rows;
  int64_t width;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t moment_stride;
  void* slot_of_row;  // [num_rows], int32, or int64 where wide_slots
  bool wide_slots;
  int64_t* rows;  // [capacity], the row of each slot
};

// One table's part in a step.
struct TableStep {
  const Table* table;
  const int64_t* indices;  // [sparse_dim, num_lookups]
  const void* values;      // [num_lookups, width]
  int64_t num_lookups;
  int64_t num_slots;  // in: slots in use before the step; out: after it
  StepScalars scalars;
};

// The first bad index of a step, in the order of its tables; `table` is -1 where there is none.
struct BadLookup {
  int64_t table = -1;
  BadIndex at;
};

// Updates all tables in place, or none: with a bad index nothing has been written. The caller guarantees room for one
// slot per touched row, that no table is there twice, and that Partitioning::fits each of them. Tables that overlap
// (views of one tensor) are updated one after the other.
BadLookup step(std::vector<TableStep>& tables, InstructionSet instruction_set, int num_threads);

}  // namespace sparseadam
