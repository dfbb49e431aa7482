#include "row_update.h"

#include <algorithm>
#include <cmath>

#include "element.h"
#include "row_walk.h"

namespace sparseadam {

namespace {

// Writes the sum of each row's values to sum_of(r), and calls on_sum(r, sum) while it is at hand. Not compiled for
// known widths: GCC makes scalar code of a constant 16 elements here, and small took 18 % more time so.
template <class Element, class Moment, class SumOf, class OnSum>
SPARSEADAM_INLINE void sum_each_row(const void* all_values, int64_t width, const RowRun& run, SumOf sum_of,
                                    OnSum on_sum) {
  if (run.num_rows == 0) return;
  const WalkedValues<Element> values(all_values, width, run);
  for (int64_t r = 0; r < run.num_rows; ++r) {
    Moment* sum = sum_of(r);
    std::fill(sum, sum + width, Moment{0});
    for (int64_t entry = run.begins[r]; entry < run.ends[r]; ++entry) add_values(sum, values.of(entry), width);
    on_sum(r, sum);
  }
}

template <class Element, class Moment>
SPARSEADAM_INLINE void find_finite_rows(const TableMemory& memory, const RowRun& run, uint8_t* is_finite,
                                        void* scratch) {
  const auto sum_of = [&](int64_t) SPARSEADAM_LAMBDA_INLINE { return static_cast<Moment*>(scratch); };
  const auto look = [&](int64_t r, const Moment* sum) SPARSEADAM_LAMBDA_INLINE {
    int64_t num_bad = 0;
    for (int64_t i = 0; i < memory.width; ++i) num_bad += std::isfinite(sum[i]) ? 0 : 1;
    is_finite[r] = num_bad == 0 ? 1 : 0;
  };
  sum_each_row<Element, Moment>(memory.values, memory.width, run, sum_of, look);
}

template <class Element, class Moment>
SPARSEADAM_INLINE void sum_rows(const void* values, int64_t width, const RowRun& run, void* sums) {
  const auto sum_of = [&](int64_t r) SPARSEADAM_LAMBDA_INLINE { return static_cast<Moment*>(sums) + r * width; };
  sum_each_row<Element, Moment>(values, width, run, sum_of, [](int64_t, const Moment*) {});
}

// One function per type of elements, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                                \
  template <class Element, class Moment>                                                               \
  TARGET void find_finite_rows_##SET(const TableMemory& memory, const RowRun& run, uint8_t* is_finite, \
                                     void* scratch) {                                                  \
    find_finite_rows<Element, Moment>(memory, run, is_finite, scratch);                                \
  }                                                                                                    \
  template <class Element, class Moment>                                                               \
  TARGET void sum_rows_##SET(const void* values, int64_t width, const RowRun& run, void* sums) {       \
    sum_rows<Element, Moment>(values, width, run, sums);                                               \
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
    return RowKernels{update_rows, SPARSEADAM_OF_SET(instruction_set, find_finite_rows, Element, Moment),
                      SPARSEADAM_OF_SET(instruction_set, sum_rows, Element, Moment)};
  });
}

}  // namespace sparseadam
