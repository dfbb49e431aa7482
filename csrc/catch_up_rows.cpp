#include "catch_up_rows.h"

#include <cmath>
#include <limits>

#include "formula.h"
#include "prefetch.h"
#include "rounding.h"

namespace sparseadam {

namespace {

// What share of a row's move, as it would be without eps, the sums of history.h may be off by. Float tables round each
// weight by 2**-24 of itself anyway.
template <class Moment>
constexpr double kTolerance = sizeof(Moment) == sizeof(double) ? 1e-9 : 0x1p-22;

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
  using Element = TableElement;
  using Moment = MomentElement;

  Replay(const TableMemory& memory, const MissedSteps& missed, Moment* scratch)
      : memory_(memory),
        missed_(missed),
        steps_(memory.history.steps),
        last_(memory.history.steps[memory.history.num_steps]),
        weights_(scratch),
        roots_(scratch + memory.width),
        moves_(scratch + 2 * memory.width),
        exp_avg_(scratch + 3 * memory.width),
        exp_avg_sq_(scratch + 4 * memory.width) {}

  SPARSEADAM_INLINE void prefetch_row(int64_t row, int64_t slot) const {
    const auto moment_bytes = static_cast<int64_t>(sizeof(Moment)) * memory_.width;
    prefetch(table_row(row), static_cast<int64_t>(sizeof(Element)) * memory_.width);
    prefetch(exp_avg_of(slot), moment_bytes);
    prefetch(exp_avg_sq_of(slot), moment_bytes);
  }

  SPARSEADAM_INLINE void move(int64_t row, int64_t slot) const {
    const int64_t clock = slot * memory_.moments.clock_stride;
    const History& history = memory_.history;
    const int64_t begin = history.entry_of(memory_.moments.weight_steps[clock]);
    const StepNumbers& written = steps_[history.entry_of(memory_.moments.moment_steps[clock])];
    memory_.moments.weight_steps[clock] = static_cast<int32_t>(history.step());

    Element* table = table_row(row);
    for (int64_t i = 0; i < memory_.width; ++i) weights_[i] = widen(table[i]);
    // What the moments have come to at `begin`: the first times scale1, the root of the second times root_scale2.
    const double scale1 = std::exp(steps_[begin].log_beta1 - written.log_beta1);
    const double root_scale2 = std::exp((steps_[begin].log_beta2 - written.log_beta2) / 2);
    if (scale1 >= kNegligible * root_scale2) {
      move_weights(begin, slot, scale1, root_scale2);
    } else {
      decay_weights(begin);
    }
    store(table, row);
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
  SPARSEADAM_INLINE double decay_since(double log_decay) const { return std::exp(last_.log_decay - log_decay); }

  SPARSEADAM_INLINE void decay_weights(int64_t begin) const {
    const auto decay = static_cast<Moment>(decay_since(steps_[begin].log_decay));
    for (int64_t i = 0; i < memory_.width; ++i) weights_[i] *= decay;
  }

  SPARSEADAM_INLINE void move_weights(int64_t begin, int64_t slot, double scale1, double root_scale2) const {
    const MissedSums& sums = missed_.at(begin);
    const Moment* exp_avg = exp_avg_of(slot);
    const Moment* exp_avg_sq = exp_avg_sq_of(slot);
    const auto scale = static_cast<Moment>(root_scale2);
    for (int64_t i = 0; i < memory_.width; ++i) roots_[i] = std::sqrt(exp_avg_sq[i]) * scale;

    // What the sums leave out: the decay of the steps after the last one that they take in, and the moment's scale.
    const double factor = decay_since(sums.log_decay) * scale1;
    const double tolerated = kTolerance<Moment> * sums.powers[0];
    if (sums.eps == sums.eps && sums.centered_error <= tolerated) {
      sum_centered(sums, factor);
    } else if (is_eps_small(sums, tolerated, exp_avg)) {
      sum_powers(sums, factor);
    } else {
      walk(begin, exp_avg, exp_avg_sq, scale1, root_scale2);
      return;
    }
    const auto decay = static_cast<Moment>(decay_since(steps_[begin].log_decay));
    for (int64_t i = 0; i < memory_.width; ++i) weights_[i] = decay * weights_[i] - exp_avg[i] * moves_[i];
  }

  // moves_ = sum of w / (d * root + eps), about the middle of each block.
  SPARSEADAM_INLINE void sum_centered(const MissedSums& sums, double factor) const {
    const auto eps = static_cast<Moment>(sums.eps);
    for (int64_t i = 0; i < memory_.width; ++i) moves_[i] = 0;
    for (int block = 0; block < kNumBlocks; ++block) {
      if (sums.centered[block][0] == 0.0) continue;  // which has no step yet
      const Terms<Moment> terms(sums.centered[block], factor);
      const auto center = static_cast<Moment>(sums.center[block]);
      for (int64_t i = 0; i < memory_.width; ++i) {
        const Moment x = Moment{1} / (center * roots_[i] + eps);
        moves_[i] += x * terms.at(Moment{1} - eps * x);
      }
    }
  }

  // Whether the powers of eps / root may be cut off, for every element that moves.
  SPARSEADAM_INLINE bool is_eps_small(const MissedSums& sums, double tolerated, const Moment* exp_avg) const {
    const double smallest = sums.eps * std::pow(sums.powers[kNumTerms] / tolerated, 1.0 / kNumTerms);
    if (!(smallest < static_cast<double>(std::numeric_limits<Moment>::max()))) return false;
    const auto least = static_cast<Moment>(smallest);
    int64_t num_small = 0;
    for (int64_t i = 0; i < memory_.width; ++i) num_small += !(roots_[i] >= least) & (exp_avg[i] != Moment{0}) ? 1 : 0;
    if (num_small > 0) return false;
    // Elements that do not move need a root that can be divided by.
    for (int64_t i = 0; i < memory_.width; ++i) roots_[i] = roots_[i] >= least ? roots_[i] : Moment{1};
    return true;
  }

  // moves_ = the same sum, in powers of eps / root.
  SPARSEADAM_INLINE void sum_powers(const MissedSums& sums, double factor) const {
    const auto eps = static_cast<Moment>(sums.eps);
    const Terms<Moment> terms(sums.powers, factor);
    for (int64_t i = 0; i < memory_.width; ++i) {
      const Moment x = Moment{1} / roots_[i];
      moves_[i] = x * terms.at(eps * x);
    }
  }

  // Step by step, as dense Adam would have moved the row.
  SPARSEADAM_INLINE void walk(int64_t begin, const Moment* exp_avg, const Moment* exp_avg_sq, double scale1,
                              double root_scale2) const {
    const auto first = static_cast<Moment>(scale1);
    const auto second = static_cast<Moment>(root_scale2 * root_scale2);
    for (int64_t i = 0; i < memory_.width; ++i) {
      exp_avg_[i] = exp_avg[i] * first;
      exp_avg_sq_[i] = exp_avg_sq[i] * second;
    }
    double left = scale1 / root_scale2;
    int64_t entry = begin;
    while (entry < memory_.history.num_steps && left >= kNegligible) {
      const double decayed_to = steps_[entry].log_decay;
      const StepNumbers& step = steps_[++entry];
      left *= step.beta1 / std::sqrt(step.beta2);
      const Scalars<Moment> scalars({step.beta1, 0.0, step.beta2, 0.0, step.step_size, step.root_scale, step.eps,
                                     std::exp(step.log_decay - decayed_to), 0.0, 0.0, 0.0, 0.0, 0.0});
      for (int64_t i = 0; i < memory_.width; ++i) {
        exp_avg_[i] = next_exp_avg(exp_avg_[i], Moment{0}, scalars);
        exp_avg_sq_[i] = next_exp_avg_sq(exp_avg_sq_[i], Moment{0}, scalars);
        weights_[i] = next_weight(weights_[i], exp_avg_[i], denominator(exp_avg_sq_[i], scalars), scalars);
      }
    }
    decay_weights(entry);
  }

  SPARSEADAM_INLINE void store(Element* table, int64_t row) const {
    if constexpr (kStochastic) {
      const uint32_t key = row_key(memory_.random_key, row);
      for (int64_t i = 0; i < memory_.width; ++i) {
        const uint32_t random = random_bits(key, Rounded::kMissedSteps, static_cast<uint32_t>(i));
        narrow_stochastic(weights_[i], random, &table[i]);
      }
    } else {
      for (int64_t i = 0; i < memory_.width; ++i) narrow(weights_[i], &table[i]);
    }
  }

  const TableMemory& memory_;
  const MissedSteps& missed_;
  const StepNumbers* steps_;
  const StepNumbers& last_;
  // Of the row that is being moved.
  Moment* __restrict__ weights_;
  Moment* __restrict__ roots_;
  Moment* __restrict__ moves_;
  Moment* __restrict__ exp_avg_;
  Moment* __restrict__ exp_avg_sq_;
};

template <class Rows>
SPARSEADAM_INLINE void catch_up_rows(const TableMemory& memory, const MissedSteps& missed, const RowList& list,
                                     void* scratch) {
  const Rows rows(memory, missed, static_cast<typename Rows::Moment*>(scratch));
  const int64_t ahead = prefetch_distance(static_cast<int64_t>(sizeof(typename Rows::Element)) * memory.width);
  for (int64_t r = 0; r < list.num_rows; ++r) {
    if (r + ahead < list.num_rows) rows.prefetch_row(list.rows[r + ahead], list.slots[r + ahead]);
    rows.move(list.rows[r], list.slots[r]);
  }
}

// One function per kind of table, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                                      \
  template <class Rows>                                                                                      \
  TARGET void catch_up_rows_##SET(const TableMemory& memory, const MissedSteps& missed, const RowList& list, \
                                  void* scratch) {                                                           \
    catch_up_rows<Rows>(memory, missed, list, scratch);                                                      \
  }

SPARSEADAM_VARIANT(portable, )
#if defined(SPARSEADAM_X86)
SPARSEADAM_VARIANT(avx2, SPARSEADAM_AVX2)
SPARSEADAM_VARIANT(avx512, SPARSEADAM_AVX512)
#endif

template <class Rows>
CatchUpRows choose(InstructionSet instruction_set) {
#if defined(SPARSEADAM_X86)
  if (instruction_set == InstructionSet::kAvx512) return catch_up_rows_avx512<Rows>;
  if (instruction_set == InstructionSet::kAvx2) return catch_up_rows_avx2<Rows>;
#endif
  return catch_up_rows_portable<Rows>;
}

}  // namespace

CatchUpRows catch_up_rows_for(ElementType element, bool stochastic_rounding, InstructionSet instruction_set) {
  switch (element) {
    case ElementType::kFloat32:
      return choose<Replay<float, float, false>>(instruction_set);
    case ElementType::kFloat64:
      return choose<Replay<double, double, false>>(instruction_set);
    case ElementType::kBFloat16:
      return stochastic_rounding ? choose<Replay<BFloat16, float, true>>(instruction_set)
                                 : choose<Replay<BFloat16, float, false>>(instruction_set);
    case ElementType::kFloat16:
#if defined(SPARSEADAM_HAS_FLOAT16)
      return stochastic_rounding ? choose<Replay<Float16, float, true>>(instruction_set)
                                 : choose<Replay<Float16, float, false>>(instruction_set);
#else
      return nullptr;
#endif
  }
  return nullptr;
}

}  // namespace sparseadam
