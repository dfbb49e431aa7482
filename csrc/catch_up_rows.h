// The replay of missed steps for the rows of a list: see history.h for the formula.
#pragma once

#include <cstdint>

#include "row_update.h"

namespace sparseadam {

// Rows that are behind, with their slots.
struct RowList {
  const int64_t* rows;
  const int64_t* slots;
  int64_t num_rows;
};

// Moves the weights of each row of a list by the steps that they have yet to take. `scratch` as for UpdateRows.
using CatchUpRows = void (*)(const TableMemory&, const RowList&, void* scratch);

// The function for a table, or nullptr where this build has none for its type of elements.
CatchUpRows catch_up_rows_for(ElementType element, bool stochastic_rounding, InstructionSet instruction_set);

}  // namespace sparseadam
