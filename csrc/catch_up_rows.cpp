#include "catch_up_rows.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "formula.h"
#include "history.h"
#include "prefetch.h"
#include "rounding.h"

namespace sparseadam {

namespace {

constexpr double kLeastBeta1TakenOut = 0.5;

// The terms of a series, with the signs and factors that all elements of a row share.
template <class Moment>
struct Terms {
  Moment terms[kNumTerms];

  Terms(const double* sums, double factor) {
    for (int i = 0; i < kNumTerms; ++i) terms[i] = static_cast<Moment>((i % 2 == 0 ? factor : -factor) * sums[i]);
  }
  // terms[0] + y * (terms[1] + y * ...)
  SPARSEADAM_INLINE Moment at(Moment y) const {
    Moment sum = terms[kNumTerms - 1];
    for (int i = kNumTerms - 2; i >= 0; --i) sum = terms[i] + y * sum;
    return sum;
  }
};

template <class TableElement, class MomentElement, bool kStochastic>
class Replay {
 public:
  static constexpr bool kKnowsWidths = std::is_same_v<TableElement, float>;
  using Element = TableElement;
  using Moment = MomentElement;

  Replay(const TableMemory& memory, Moment* scratch)
      : memory_(memory),
        steps_(memory.history.steps),
        last_(memory.history.steps[memory.history.num_steps]),
        weights_(scratch),
        roots_(scratch + memory.width),
        exp_avg_(scratch + 2 * memory.width),
        exp_avg_sq_(scratch + 3 * memory.width),
        moves_(scratch + 4 * memory.width) {}

  SPARSEADAM_INLINE void prefetch_table(int64_t row) const {
    prefetch(table_row(row), static_cast<int64_t>(sizeof(Element)) * memory_.width);
  }
  SPARSEADAM_INLINE void prefetch_moments(int64_t slot) const {
    const auto moment_bytes = static_cast<int64_t>(sizeof(Moment)) * memory_.width;
    prefetch(exp_avg_of(slot), moment_bytes);
    prefetch(exp_avg_sq_of(slot), moment_bytes);
  }

  SPARSEADAM_INLINE void move(int64_t row, int64_t slot) const {
    const int64_t clock = slot * memory_.moments.clock_stride;
    const History& history = memory_.history;
    int64_t begin = history.entry_of(memory_.moments.weight_steps[clock]);
    const int64_t written = history.entry_of(memory_.moments.moment_steps[clock]);
    memory_.moments.weight_steps[clock] = static_cast<int32_t>(history.step());

    Element* table = table_row(row);
    Moment* weights = load(table);
    // The step that wrote the moments is the first one to replay, but for a small beta1: the sums end where the betas'
    // product is negligible, and would leave out what is not, once that beta1 is taken out of it.
    if (written > begin && steps_[written].beta1 < kLeastBeta1TakenOut) {
      take_own_step(weights, exp_avg_of(slot), exp_avg_sq_of(slot), memory_.width, scalars_of(written));
      begin = written;
    }
    if (begin < history.num_steps) replay(weights, begin, slot, scales_at(begin, written));
    store(weights, table, row);
  }

 private:
  SPARSEADAM_INLINE Element* table_row(int64_t row) const {
    return static_cast<Element*>(memory_.table) + row * memory_.table_stride;
  }
  SPARSEADAM_INLINE const Moment* exp_avg_of(int64_t slot) const {
    return static_cast<const Moment*>(memory_.moments.exp_avg) + slot * memory_.moments.exp_avg_stride;
  }
  SPARSEADAM_INLINE const Moment* exp_avg_sq_of(int64_t slot) const {
    return static_cast<const Moment*>(memory_.moments.exp_avg_sq) + slot * memory_.moments.exp_avg_sq_stride;
  }
  SPARSEADAM_INLINE double decay_since(double log_decay) const {
    return log_decay == last_.log_decay ? 1.0 : std::exp(last_.log_decay - log_decay);
  }

  // What moments written at one entry are to be multiplied by, to be those of another. Most rows were last stepped just
  // after they were last moved, and the sums for where they were moved to begin with that step: its betas are taken out
  // of the moments.
  struct MomentScales {
    double first, root_of_second;
  };
  SPARSEADAM_INLINE MomentScales scales_at(int64_t entry, int64_t written) const {
    if (entry == written) return {1.0, 1.0};
    if (entry + 1 == written) return {1.0 / steps_[written].beta1, 1.0 / std::sqrt(steps_[written].beta2)};
    return {std::exp(steps_[entry].log_beta1 - steps_[written].log_beta1),
            std::exp((steps_[entry].log_beta2 - steps_[written].log_beta2) / 2)};
  }

  // The numbers of a step, betas as they are for moments that a gradient of zero is added to.
  SPARSEADAM_INLINE Scalars<Moment> scalars_of(int64_t entry) const {
    const StepNumbers& step = steps_[entry];
    return Scalars<Moment>({step.beta1, 0.0, step.beta2, 0.0, step.step_size, step.root_scale, step.eps,
                            std::exp(step.log_decay - steps_[entry - 1].log_decay), 0.0, 0.0, 0.0, 0.0, 0.0});
  }

  static SPARSEADAM_INLINE void take_own_step(Moment* __restrict__ weights, const Moment* __restrict__ exp_avg,
                                              const Moment* __restrict__ exp_avg_sq, int64_t width,
                                              const Scalars<Moment>& scalars) {
    for (int64_t i = 0; i < width; ++i) {
      weights[i] = next_weight(weights[i], exp_avg[i], denominator(exp_avg_sq[i], scalars), scalars);
    }
  }

  // Moves the weights by the steps after an entry, all of which the row has missed.
  SPARSEADAM_INLINE void replay(Moment* weights, int64_t begin, int64_t slot, MomentScales scales) const {
    if (scales.first >= kNegligible * scales.root_of_second) {
      move_weights(weights, begin, exp_avg_of(slot), exp_avg_sq_of(slot), scales);
    } else {
      decay_weights(weights, begin);
    }
  }

  SPARSEADAM_INLINE void decay_weights(Moment* weights, int64_t begin) const {
    const auto decay = static_cast<Moment>(decay_since(steps_[begin].log_decay));
    for (int64_t i = 0; i < memory_.width; ++i) weights[i] *= decay;
  }

  SPARSEADAM_INLINE void move_weights(Moment* weights, int64_t begin, const Moment* exp_avg, const Moment* exp_avg_sq,
                                      MomentScales scales) const {
    const MissedSums& sums = memory_.history.missed->at(begin);
    // What the sums leave out: the decay of the steps after the last one that they take in, and the moment's scale.
    const double factor = decay_since(sums.log_decay) * scales.first;
    const double tolerated = kTolerance<Moment> * sums.total;
    const auto decay = static_cast<Moment>(decay_since(steps_[begin].log_decay));
    const auto scale = static_cast<Moment>(scales.root_of_second);
    const bool has_blocks = sums.left_out <= tolerated;
    if (has_blocks && sums.more.empty()) {
      move_by_block(weights, exp_avg, exp_avg_sq, memory_.width, decay, scale, Block(sums.first, factor));
    } else if (has_blocks) {
      move_by_blocks(weights, exp_avg, exp_avg_sq, memory_.width, decay, scale, sums, factor);
    } else {
      walk(weights, begin, exp_avg, exp_avg_sq, scales);
    }
  }

  // The sum about the middle of a block.
  struct Block {
    Moment center, eps;
    Terms<Moment> terms;

    Block(const MissedBlock& block, double factor)
        : center(static_cast<Moment>(block.center)), eps(static_cast<Moment>(block.eps)), terms(block.terms, factor) {}
    SPARSEADAM_INLINE Moment at(Moment root) const {
      const Moment x = Moment{1} / (center * root + eps);
      return x * terms.at(Moment{1} - eps * x);
    }
  };

  static SPARSEADAM_INLINE void move_by_block(Moment* __restrict__ weights, const Moment* __restrict__ exp_avg,
                                              const Moment* __restrict__ exp_avg_sq, int64_t width, Moment decay,
                                              Moment scale, const Block& block) {
    for (int64_t i = 0; i < width; ++i) {
      weights[i] = decay * weights[i] - exp_avg[i] * block.at(std::sqrt(exp_avg_sq[i]) * scale);
    }
  }

  // The same for any number of blocks.
  SPARSEADAM_INLINE void move_by_blocks(Moment* __restrict__ weights, const Moment* __restrict__ exp_avg,
                                        const Moment* __restrict__ exp_avg_sq, int64_t width, Moment decay,
                                        Moment scale, const MissedSums& sums, double factor) const {
    Moment* __restrict__ roots = roots_;
    Moment* __restrict__ moves = moves_;
    for (int64_t i = 0; i < width; ++i) roots[i] = std::sqrt(exp_avg_sq[i]) * scale;
    const Block first(sums.first, factor);
    for (int64_t i = 0; i < width; ++i) moves[i] = first.at(roots[i]);
    for (const MissedBlock& each : sums.more) {
      const Block block(each, factor);
      for (int64_t i = 0; i < width; ++i) moves[i] += block.at(roots[i]);
    }
    for (int64_t i = 0; i < width; ++i) weights[i] = decay * weights[i] - exp_avg[i] * moves[i];
  }

  // Step by step, as dense Adam would have moved the row.
  SPARSEADAM_INLINE void walk(Moment* weights, int64_t begin, const Moment* exp_avg, const Moment* exp_avg_sq,
                              MomentScales scales) const {
    const auto first = static_cast<Moment>(scales.first);
    const auto second = static_cast<Moment>(scales.root_of_second * scales.root_of_second);
    for (int64_t i = 0; i < memory_.width; ++i) {
      exp_avg_[i] = exp_avg[i] * first;
      exp_avg_sq_[i] = exp_avg_sq[i] * second;
    }
    double left = scales.first / scales.root_of_second;
    int64_t entry = begin;
    while (entry < memory_.history.num_steps && left >= kNegligible) {
      ++entry;
      left *= steps_[entry].beta1 / std::sqrt(steps_[entry].beta2);
      walk_step(weights, exp_avg_, exp_avg_sq_, memory_.width, scalars_of(entry));
    }
    decay_weights(weights, entry);
  }

  static SPARSEADAM_INLINE void walk_step(Moment* __restrict__ weights, Moment* __restrict__ exp_avg,
                                          Moment* __restrict__ exp_avg_sq, int64_t width,
                                          const Scalars<Moment>& scalars) {
    for (int64_t i = 0; i < width; ++i) {
      exp_avg[i] = next_exp_avg(exp_avg[i], Moment{0}, scalars);
      exp_avg_sq[i] = next_exp_avg_sq(exp_avg_sq[i], Moment{0}, scalars);
      weights[i] = next_weight(weights[i], exp_avg[i], denominator(exp_avg_sq[i], scalars), scalars);
    }
  }

  // Weights are moved where they lie, if that is in the type of the moments.
  SPARSEADAM_INLINE Moment* load(Element* table) const {
    if constexpr (std::is_same_v<Element, Moment>) {
      return table;
    } else {
      for (int64_t i = 0; i < memory_.width; ++i) weights_[i] = widen(table[i]);
      return weights_;
    }
  }

  SPARSEADAM_INLINE void store(const Moment* weights, Element* table, int64_t row) const {
    if constexpr (kStochastic) {
      const uint32_t key = row_key(memory_.random_key, row);
      for (int64_t i = 0; i < memory_.width; ++i) {
        const uint32_t random = random_bits(key, Rounded::kMissedSteps, static_cast<uint32_t>(i));
        narrow_stochastic(weights[i], random, &table[i]);
      }
    } else if constexpr (!std::is_same_v<Element, Moment>) {
      for (int64_t i = 0; i < memory_.width; ++i) narrow(weights[i], &table[i]);
    }
  }

  const TableMemory& memory_;
  const StepNumbers* steps_;
  const StepNumbers& last_;
  // Of the row that is being moved.
  Moment* weights_;
  Moment* roots_;
  Moment* exp_avg_;
  Moment* exp_avg_sq_;
  Moment* moves_;
};

// As update_rows_of_width in row_walk.h. 65,536 uniform rows of 1,000,000 x 64 took 5 to 8 % less time so, and with
// float weights moved where they lie.
template <class Rows, int64_t kWidth>
SPARSEADAM_INLINE void catch_up_rows_of_width(TableMemory memory, const RowList& list, void* scratch) {
  if (list.num_rows == 0) return;
  if (kWidth > 0) memory.width = kWidth;
  const Rows rows(memory, static_cast<typename Rows::Moment*>(scratch));
  constexpr auto kElementBytes = static_cast<int64_t>(sizeof(typename Rows::Element));
  const int64_t row_bytes = kElementBytes * memory.width;
  const int64_t ahead = prefetch_distance(row_bytes);
  GroupPrefetch table_ahead(list.num_rows, row_bytes, list.rows[list.num_rows - 1] - list.rows[0],
                            memory.table_stride * kElementBytes);
  const auto prefetch_table = [&](int64_t r) SPARSEADAM_LAMBDA_INLINE { rows.prefetch_table(list.rows[r]); };
  for (int64_t r = 0; r < list.num_rows; ++r) {
    table_ahead.reach(r + ahead, prefetch_table);
    if (r + ahead < list.num_rows) rows.prefetch_moments(list.slots[r + ahead]);
    rows.move(list.rows[r], list.slots[r]);
  }
}

template <class Rows>
SPARSEADAM_INLINE void catch_up_rows(const TableMemory& memory, const RowList& list, void* scratch) {
  with_width<Rows::kKnowsWidths>(memory.width, [&](auto width) SPARSEADAM_LAMBDA_INLINE {
    catch_up_rows_of_width<Rows, width>(memory, list, scratch);
  });
}

// One function per kind of table, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                            \
  template <class Rows>                                                                            \
  TARGET void catch_up_rows_##SET(const TableMemory& memory, const RowList& list, void* scratch) { \
    catch_up_rows<Rows>(memory, list, scratch);                                                    \
  }

SPARSEADAM_EACH_SET(SPARSEADAM_VARIANT)

template <class Rows>
CatchUpRows choose([[maybe_unused]] InstructionSet instruction_set) {
  return SPARSEADAM_OF_SET(instruction_set, catch_up_rows, Rows);
}

}  // namespace

CatchUpRows catch_up_rows_for(ElementType element, bool stochastic_rounding, InstructionSet instruction_set) {
  return with_types(element, [&](auto table_element, auto moment) {
    using Element = decltype(table_element);
    using Moment = decltype(moment);
    if constexpr (sizeof(Element) < sizeof(Moment)) {
      if (stochastic_rounding) return choose<Replay<Element, Moment, true>>(instruction_set);
    }
    return choose<Replay<Element, Moment, false>>(instruction_set);
  });
}

}  // namespace sparseadam
