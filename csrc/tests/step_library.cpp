// The native step as a plain function of memory that the caller owns: benchmarks/builds.py loads it from several builds
// at once and gives all of them the same tables. Built against the headers of each, so it names no path.
#include <vector>

#include "row_update.h"
#include "step.h"

using namespace sparseadam;

// A float32 table all of whose lookups have slots, and a gradient of it. Moments are in elements, slot by slot.
struct TableAndGradient {
  float* table;
  int64_t num_rows, width;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t moment_stride;
  int32_t* slot_of_row;
  int64_t* rows;
  int64_t num_slots;
  const int64_t* indices;
  const float* values;
  int64_t num_lookups;
};

// Steps all tables with Adam's defaults; returns whether it could.
extern "C" bool take_step(const TableAndGradient* given, int64_t num_tables, int num_threads) {
  static const InstructionSet widest = instruction_sets().back();
  StepScalars scalars{};
  scalars.beta1 = 0.9;
  scalars.one_minus_beta1 = 0.1;
  scalars.beta2 = 0.999;
  scalars.one_minus_beta2 = 0.001;
  scalars.step_size = 1e-3;
  scalars.root_scale = 1.0;
  scalars.eps = 1e-8;
  scalars.decay = 1.0;

  std::vector<Table> tables(static_cast<size_t>(num_tables));
  std::vector<TableStep> steps(static_cast<size_t>(num_tables));
  for (size_t t = 0; t < tables.size(); ++t) {
    const TableAndGradient& from = given[t];
    Table& table = tables[t];
    table.table = from.table;
    table.table_stride = table.width = from.width;
    table.element = ElementType::kFloat32;
    table.sparse_shape = {from.num_rows};
    table.num_rows = from.num_rows;
    table.moments.exp_avg = from.exp_avg;
    table.moments.exp_avg_sq = from.exp_avg_sq;
    table.moments.exp_avg_stride = table.moments.exp_avg_sq_stride = from.moment_stride;
    table.slot_of_row = from.slot_of_row;
    table.rows = from.rows;
    steps[t].table = &table;
    steps[t].indices = from.indices;
    steps[t].values = from.values;
    steps[t].num_lookups = from.num_lookups;
    steps[t].scalars = scalars;
    steps[t].num_slots = from.num_slots;
  }
  return step(steps, widest, num_threads).table < 0;
}
