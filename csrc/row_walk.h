// The walk over the rows of a run: each row's sum, and what is prefetched meanwhile. What an update does to a row is up
// to the two kinds of rows, which are compiled apart because they take most of the build.
#pragma once

#include <algorithm>
#include <cstdint>

#include "element.h"
#include "prefetch.h"
#include "row_update.h"

namespace sparseadam {

// The functions for the two kinds of rows, or nullptr where this build has none for a type of elements.
UpdateRows update_plain_rows_for(ElementType element, bool replays, InstructionSet instruction_set);
UpdateRows update_any_rows_for(ElementType element, InstructionSet instruction_set);

// What a row's moments are multiplied by for the steps it has missed; its clocks then show that they have taken this
// step, and its weights have not.
SPARSEADAM_INLINE MomentFactors count_in_missed_steps(const TableMemory& memory, int64_t slot) {
  const History& history = memory.history;
  const int64_t clock = slot * memory.moments.clock_stride;
  const int64_t written = history.entry_of(memory.moments.moment_steps[clock]);
  memory.moments.moment_steps[clock] = static_cast<int32_t>(history.step() + 1);
  memory.moments.weight_steps[clock] = static_cast<int32_t>(history.step());
  return history.missed->moment_factors(history, written);
}

// The values of a run's lookups. They lie where the batch put them, far apart in row order: while one lookup's are
// used, those of later ones are fetched.
template <class Element>
class WalkedValues {
 public:
  SPARSEADAM_INLINE WalkedValues(const void* values, int64_t width, const RowRun& run)
      : values_(static_cast<const Element*>(values)),
        width_(width),
        row_bytes_(static_cast<int64_t>(sizeof(Element)) * width),
        first_bytes_(first_bytes_of_values(row_bytes_)),
        last_entry_(run.ends[run.num_rows - 1] - int64_t{1}),
        ahead_(prefetch_distance_of_values(row_bytes_, run.num_rows, last_entry_ + 1 - run.begins[0])),
        first_ahead_(reach_of(row_bytes_).lookups_for_page_walk),
        lookups_(*run.lookups),
        sorted_(run.sorted) {}

  SPARSEADAM_INLINE const Element* of(int64_t entry) const {
    const int64_t later = entry + ahead_;
    if (first_bytes_ > 0) prefetch(address(std::min(later + first_ahead_, last_entry_)), first_bytes_);
    const int64_t first_elements = first_bytes_ / static_cast<int64_t>(sizeof(Element));
    prefetch(address(std::min(later, last_entry_)) + first_elements, row_bytes_ - first_bytes_);
    return address(entry);
  }

 private:
  SPARSEADAM_INLINE const Element* address(int64_t entry) const {
    return values_ + lookups_.position_of(sorted_[entry]) * width_;
  }

  const Element* values_;
  const int64_t width_, row_bytes_, first_bytes_, last_entry_, ahead_, first_ahead_;
  const Partitioning& lookups_;
  const Entry* sorted_;
};

template <class Element, class Moment>
SPARSEADAM_INLINE void add_values(Moment* __restrict__ sum, const Element* __restrict__ values, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += widen(values[i]);
}

// Rows of kWidth elements, or of as many as memory.width says where that is 0. The memory is a copy of this function's
// own, so that the compiler knows the width in all that is inlined here.
template <class Rows, int64_t kWidth>
SPARSEADAM_INLINE void update_rows_of_width(TableMemory memory, const RowRun& run, const StepScalars& scalars,
                                            void* scratch) {
  if (run.num_rows == 0) return;
  if (kWidth > 0) memory.width = kWidth;
  using Element = typename Rows::Element;
  using Moment = typename Rows::Moment;
  const int64_t width = memory.width;
  auto* sum = static_cast<Moment*>(scratch);
  const Rows rows(memory, scalars, sum + width);
  const Partitioning& lookups = *run.lookups;
  const Entry* sorted = run.sorted;
  auto* table = static_cast<Element*>(memory.table);
  const WalkedValues<Element> values(memory.values, width, run);
  const auto row_bytes = static_cast<int64_t>(sizeof(Element)) * width;
  const int64_t ahead = prefetch_distance(row_bytes);
  const auto row_at = [&](int64_t r) { return lookups.row_of(sorted[run.begins[r]]); };
  GroupPrefetch table_ahead(run.num_rows, row_bytes, row_at(run.num_rows - 1) - row_at(0),
                            memory.table_stride * static_cast<int64_t>(sizeof(Element)));
  const auto prefetch_table = [&](int64_t r) SPARSEADAM_LAMBDA_INLINE {
    if (rows.moves_weights() && run.slots[r] >= 0) prefetch(table + row_at(r) * memory.table_stride, row_bytes);
  };

  for (int64_t r = 0; r < run.num_rows; ++r) {
    table_ahead.reach(r + ahead, prefetch_table);
    if (r + ahead < run.num_rows && run.slots[r + ahead] >= 0) rows.prefetch_moments(run.slots[r + ahead]);
    if (run.slots[r] < 0) continue;
    const int64_t begin = run.begins[r];
    const int64_t end = run.ends[r];
    const int64_t row = lookups.row_of(sorted[begin]);
    Element* weights = table + row * memory.table_stride;
    const Element* gradient = values.of(begin);
    if constexpr (Rows::kTakesValues) {
      if (end - begin == 1) {
        rows.update(weights, row, run.slots[r], gradient);
        continue;
      }
    }
    for (int64_t i = 0; i < width; ++i) sum[i] = widen(gradient[i]);
    for (int64_t entry = begin + 1; entry < end; ++entry) add_values(sum, values.of(entry), width);
    rows.update(weights, row, run.slots[r], sum);
  }
}

template <class Rows>
SPARSEADAM_INLINE void update_rows(const TableMemory& memory, const RowRun& run, const StepScalars& scalars,
                                   void* scratch) {
  with_width<Rows::kKnowsWidths>(memory.width, [&](auto width) SPARSEADAM_LAMBDA_INLINE {
    update_rows_of_width<Rows, width>(memory, run, scalars, scratch);
  });
}

// One function per kind of rows, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                                   \
  template <class Rows>                                                                                   \
  TARGET void update_rows_##SET(const TableMemory& memory, const RowRun& run, const StepScalars& scalars, \
                                void* scratch) {                                                          \
    update_rows<Rows>(memory, run, scalars, scratch);                                                     \
  }

SPARSEADAM_EACH_SET(SPARSEADAM_VARIANT)
#undef SPARSEADAM_VARIANT

template <class Rows>
UpdateRows update_rows_for([[maybe_unused]] InstructionSet instruction_set) {
  return SPARSEADAM_OF_SET(instruction_set, update_rows, Rows);
}

}  // namespace sparseadam
