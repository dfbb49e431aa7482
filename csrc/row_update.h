// The update of rows: the only place of the native backend where the formula stands.
//
// For each row of a run, with g the sum of its lookups' values in lookup order:
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
//   table     -= step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)
//
// which is Kingma & Ba (2015), Algorithm 1, with step_size = lr / (1 - beta1**t) and root_scale = 1 / sqrt(1 -
// beta2**t). The scalars come from the caller, computed in double; they are rounded once to the type of the moments.
//
// Accumulation is in the type of the moments: double for double tables, float for all others. The code is plain loops,
// compiled once per instruction set; contraction is off, so every instruction set gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "partition.h"

namespace sparseadam {

enum class ElementType { kFloat32, kFloat64, kBFloat16, kFloat16 };
// Bytes of an element.
inline int64_t element_bytes(ElementType element) {
  switch (element) {
    case ElementType::kFloat64:
      return 8;
    case ElementType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

struct StepScalars {
  double beta1, one_minus_beta1;  // one_minus_beta1 carries the sign of `maximize`: climbing negates g
  double beta2, one_minus_beta2;
  double step_size, root_scale, eps;
};

// A table, its moments and its gradient's values, as raw memory. Strides are in elements; a row's elements are
// adjacent.
struct TableMemory {
  void* table;
  int64_t table_stride;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t moment_stride;
  const void* values;  // [num_lookups, width]
  int64_t width;
};

// Rows to update: row r of the run has the lookups sorted[begins[r]] .. sorted[ends[r] - 1] and the moments at
// slots[r]. A row with a negative slot is passed over.
struct RowRun {
  const Partitioning* lookups;
  const uint32_t* begins;
  const uint32_t* ends;
  const int64_t* slots;
  int64_t num_rows;
};

// Updates the rows of a run. `sum` is scratch for `width` elements of the moments' type.
using UpdateRows = void (*)(const TableMemory&, const RowRun&, const StepScalars&, void* sum);

// The instruction sets that this build has and this processor can run, slowest first.
std::vector<InstructionSet> instruction_sets();

// The function for a table's element type, or nullptr where this build has none.
UpdateRows update_rows_for(ElementType element, InstructionSet instruction_set);

}  // namespace sparseadam
