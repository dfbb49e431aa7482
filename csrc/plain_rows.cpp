// Rows with default options: moments of their own type, updated where they lie.
#include <type_traits>

#include "formula.h"
#include "row_walk.h"

namespace sparseadam {

namespace {

// A table whose moments are of their own type, one of each an element, and whose rows share the step's numbers, but for
// what those that replay missed steps have missed.
template <class TableElement, class MomentElement, bool kReplays>
class PlainRows {
 public:
  static constexpr bool kKnowsWidths = std::is_same_v<TableElement, float>;
  // Whether update() takes the one value of a row as it lies, not only a sum.
  static constexpr bool kTakesValues = true;
  using Element = TableElement;
  using Moment = MomentElement;

  PlainRows(const TableMemory& memory, const StepScalars& scalars, Moment*)
      : memory_(memory),
        beta1_(scalars.beta1),
        beta2_(scalars.beta2),
        scalars_(scalars),
        exp_avg_(static_cast<Moment*>(memory.moments.exp_avg)),
        exp_avg_sq_(static_cast<Moment*>(memory.moments.exp_avg_sq)) {}

  // Where missed steps are replayed, weights wait until they are read: catch_up.h moves them by this step as well.
  static constexpr bool moves_weights() { return !kReplays; }

  SPARSEADAM_INLINE void prefetch_moments(int64_t slot) const {
    const auto num_bytes = static_cast<int64_t>(sizeof(Moment)) * memory_.width;
    prefetch(exp_avg_ + slot * memory_.moments.exp_avg_stride, num_bytes);
    prefetch(exp_avg_sq_ + slot * memory_.moments.exp_avg_sq_stride, num_bytes);
    if constexpr (kReplays) prefetch(memory_.moments.moment_steps + slot * memory_.moments.clock_stride, 1);
  }

  template <class Gradient>
  SPARSEADAM_INLINE void update(Element* table, int64_t, int64_t slot, const Gradient* gradient) const {
    Moment* exp_avg = exp_avg_ + slot * memory_.moments.exp_avg_stride;
    Moment* exp_avg_sq = exp_avg_sq_ + slot * memory_.moments.exp_avg_sq_stride;
    Scalars<Moment> scalars = scalars_;
    if constexpr (kReplays) {
      const MomentFactors missed = count_in_missed_steps(memory_, slot);
      scalars.beta1 = static_cast<Moment>(beta1_ * missed.first);
      scalars.beta2 = static_cast<Moment>(beta2_ * missed.second);
    }
    update_elements(table, exp_avg, exp_avg_sq, gradient, memory_.width, scalars);
  }

 private:
  template <class Gradient>
  static SPARSEADAM_INLINE void update_elements(Element* __restrict__ table, Moment* __restrict__ exp_avg,
                                                Moment* __restrict__ exp_avg_sq, const Gradient* __restrict__ gradient,
                                                int64_t width, const Scalars<Moment>& scalars) {
    for (int64_t i = 0; i < width; ++i) {
      const Moment grad = widen(gradient[i]);
      const Moment first = next_exp_avg(exp_avg[i], grad, scalars);
      const Moment second = next_exp_avg_sq(exp_avg_sq[i], grad * grad, scalars);
      exp_avg[i] = first;
      exp_avg_sq[i] = second;
      if constexpr (moves_weights()) {
        narrow(next_weight<Moment>(widen(table[i]), first, denominator(second, scalars), scalars), &table[i]);
      }
    }
  }

  const TableMemory& memory_;
  const double beta1_, beta2_;
  const Scalars<Moment> scalars_;
  Moment* exp_avg_;
  Moment* exp_avg_sq_;
};

}  // namespace

UpdateRows update_plain_rows_for(ElementType element, bool replays, InstructionSet instruction_set) {
  return with_types(element, [&](auto table_element, auto moment) {
    using Element = decltype(table_element);
    using Moment = decltype(moment);
    return replays ? update_rows_for<PlainRows<Element, Moment, true>>(instruction_set)
                   : update_rows_for<PlainRows<Element, Moment, false>>(instruction_set);
  });
}

}  // namespace sparseadam
