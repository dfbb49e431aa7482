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
  MomentMemory moments;
  void* slot_of_row;  // [num_rows], int32, or int64 where wide_slots
  bool wide_slots;
  int64_t* rows;  // [capacity], the row of each slot
  bool stochastic_rounding;
  uint64_t stream;  // tells the table's random bits from other tables'
  // What its rows are called in `rows` and to random bits; nullptr where by their place, as in a whole table.
  const int64_t* row_names;

  int64_t row_bytes() const { return width * element_bytes(element); }
};

// What to do about rows whose summed gradient has an infinity or a NaN: update them, refuse the step, or leave them as
// they are.
enum class NonFinite { kPropagate, kRefuse, kSkip };

// One table's part in a step.
struct TableStep {
  const Table* table;
  const int64_t* indices;  // [sparse_dim, num_lookups]
  const void* values;      // [num_lookups, width]
  int64_t num_lookups;
  StepScalars scalars;
  NonFinite nonfinite;
  // In: as before the step. Out: as after it.
  int64_t num_slots;    // in use
  int64_t num_skipped;  // rows left as they were, over all steps
  double log_decay;     // owed by a row that has paid nothing
  History history;      // where missed steps are replayed
};

// Why a step was not taken, of the first table in their order that it cannot be taken for; `table` is -1 if it was.
struct Fault {
  int64_t table = -1;
  BadIndex bad_index;            // its first, if any
  std::vector<int64_t> rows;     // else its first rows that are refused, ascending
  bool rows_are_behind = false;  // why: their weights have yet to take steps, or their gradient is not finite
};

// Updates all tables in place, or none: with a fault nothing has been written. The caller guarantees room for one slot
// per touched row, that no table is there twice, and that Partitioning::fits each of them. Tables that overlap (views
// of one tensor) are updated one after the other.
Fault step(std::vector<TableStep>& tables, InstructionSet instruction_set, int num_threads);

}  // namespace sparseadam
