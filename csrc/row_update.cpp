#include "row_update.h"

#include <algorithm>
#include <cmath>

#include "element.h"
#include "prefetch.h"
#include "row_walk.h"

namespace sparseadam {

namespace {

template <class Element, class Moment>
SPARSEADAM_INLINE void sum_row(const Element* values, int64_t width, const RowRun& run, int64_t r, Moment* sum) {
  const Partitioning& lookups = *run.lookups;
  const Entry* sorted = lookups.sorted();
  const int64_t last_entry = run.ends[run.num_rows - 1] - int64_t{1};
  const int64_t row_bytes = static_cast<int64_t>(sizeof(Element)) * width;
  const int64_t ahead = prefetch_distance(row_bytes);
  std::fill(sum, sum + width, Moment{0});
  for (int64_t entry = run.begins[r]; entry < run.ends[r]; ++entry) {
    prefetch(values + lookups.position_of(sorted[std::min(entry + ahead, last_entry)]) * width, row_bytes);
    add_values(sum, values + lookups.position_of(sorted[entry]) * width, width);
  }
}

template <class Element, class Moment>
SPARSEADAM_INLINE bool is_finite(const TableMemory& memory, const RowRun& run, int64_t r, void* scratch) {
  auto* sum = static_cast<Moment*>(scratch);
  sum_row(static_cast<const Element*>(memory.values), memory.width, run, r, sum);
  int64_t num_bad = 0;
  for (int64_t i = 0; i < memory.width; ++i) num_bad += std::isfinite(sum[i]) ? 0 : 1;
  return num_bad == 0;
}

template <class Element, class Moment>
SPARSEADAM_INLINE void sum_rows(const void* values, int64_t width, const RowRun& run, void* sums) {
  for (int64_t r = 0; r < run.num_rows; ++r) {
    sum_row(static_cast<const Element*>(values), width, run, r, static_cast<Moment*>(sums) + r * width);
  }
}

// One function per type of elements, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                                 \
  template <class Element, class Moment>                                                                \
  TARGET bool is_finite_##SET(const TableMemory& memory, const RowRun& run, int64_t r, void* scratch) { \
    return is_finite<Element, Moment>(memory, run, r, scratch);                                         \
  }                                                                                                     \
  template <class Element, class Moment>                                                                \
  TARGET void sum_rows_##SET(const void* values, int64_t width, const RowRun& run, void* sums) {        \
    sum_rows<Element, Moment>(values, width, run, sums);                                                \
  }

SPARSEADAM_EACH_SET(SPARSEADAM_VARIANT)

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found{InstructionSet::kPortable};
#if defined(SPARSEADAM_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    found.push_back(InstructionSet::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(InstructionSet::kAvx512);
    }
  }
#endif
  return found;
}

RowKernels row_kernels_for(ElementType element, const MomentMemory& moments, bool stochastic_rounding,
                           InstructionSet instruction_set) {
  const bool is_plain = moments.type == MomentType::kOwn && !moments.one_exp_avg_sq_a_row &&
                        moments.max_exp_avg_sq == nullptr && moments.row_steps == nullptr &&
                        moments.paid_log_decay == nullptr && !stochastic_rounding;
  const UpdateRows update_rows = is_plain
                                     ? update_plain_rows_for(element, moments.moment_steps != nullptr, instruction_set)
                                     : update_any_rows_for(element, instruction_set);
  return with_types(element, [&](auto table_element, auto moment) {
    using Element = decltype(table_element);
    using Moment = decltype(moment);
    return RowKernels{update_rows, SPARSEADAM_OF_SET(instruction_set, is_finite, Element, Moment),
                      SPARSEADAM_OF_SET(instruction_set, sum_rows, Element, Moment)};
  });
}

}  // namespace sparseadam
