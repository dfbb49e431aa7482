// Rows with any options.
#include <algorithm>
#include <cmath>
#include <limits>

#include "formula.h"
#include "rounding.h"
#include "row_walk.h"

namespace sparseadam {

namespace {

// Any table. Moments are brought into the form of a plain row's, in scratch where they are stored otherwise, updated
// there, and put back.
template <class TableElement, class MomentElement>
class AnyRows {
 public:
  static constexpr bool kKnowsWidths = false;
  static constexpr bool kTakesValues = false;
  using Element = TableElement;
  using Moment = MomentElement;

  AnyRows(const TableMemory& memory, const StepScalars& scalars, Moment* scratch)
      : memory_(memory),
        moments_(memory.moments),
        step_scalars_(scalars),
        weights_(scratch),
        denoms_(scratch + memory.width),
        exp_avg_(scratch + 2 * memory.width),
        exp_avg_sq_(scratch + 3 * memory.width) {}

  // As in plain_rows.cpp.
  SPARSEADAM_INLINE bool moves_weights() const { return moments_.moment_steps == nullptr; }

  SPARSEADAM_INLINE void prefetch_moments(int64_t slot) const {
    prefetch(at<char>(moments_.exp_avg, slot * moments_.exp_avg_stride * exp_avg_bytes()),
             memory_.width * exp_avg_bytes());
    if (moments_.one_exp_avg_sq_a_row) {
      prefetch(at<Moment>(moments_.exp_avg_sq, slot * moments_.exp_avg_sq_stride), 1);
    } else {
      prefetch(at<char>(moments_.exp_avg_sq, slot * moments_.exp_avg_sq_stride * exp_avg_bytes()),
               memory_.width * exp_avg_bytes());
    }
    if (moments_.max_exp_avg_sq != nullptr) {
      prefetch(at<Moment>(moments_.max_exp_avg_sq, slot * moments_.exp_avg_sq_stride),
               moments_.one_exp_avg_sq_a_row ? 1 : memory_.width * static_cast<int64_t>(sizeof(Moment)));
    }
    if (moments_.exp_avg_scale != nullptr) {
      prefetch(moments_.exp_avg_scale + slot * moments_.scale_stride,
               moments_.scale_stride * static_cast<int64_t>(sizeof(float)));
    }
    if (moments_.row_steps != nullptr) prefetch(moments_.row_steps + slot, 1);
    if (moments_.paid_log_decay != nullptr) prefetch(moments_.paid_log_decay + slot, 1);
    if (moments_.moment_steps != nullptr) prefetch(moments_.moment_steps + slot * moments_.clock_stride, 1);
  }

  SPARSEADAM_INLINE void update(Element* table, int64_t row, int64_t slot, const Moment* gradient) const {
    const Scalars<Moment> scalars = scalars_of(slot);
    const int64_t name = memory_.row_names != nullptr ? memory_.row_names[row] : row;
    const uint32_t key = row_key(memory_.random_key, name);
    Moment* exp_avg = load_exp_avg(slot);
    for (int64_t i = 0; i < memory_.width; ++i) {
      exp_avg[i] = next_exp_avg<Moment>(exp_avg[i], gradient[i], scalars);
    }
    if (moments_.one_exp_avg_sq_a_row) {
      update_row_second(slot, gradient, scalars);
    } else {
      update_second(slot, gradient, scalars, key);
    }
    store_exp_avg(slot, exp_avg, key);
    if (!moves_weights()) return;
    for (int64_t i = 0; i < memory_.width; ++i) {
      weights_[i] = next_weight<Moment>(widen(table[i]), exp_avg[i], denoms_[i], scalars);
    }
    store_weights(table, key);
  }

 private:
  template <class T>
  static SPARSEADAM_INLINE T* at(void* memory, int64_t offset) {
    return static_cast<T*>(memory) + offset;
  }

  SPARSEADAM_INLINE int64_t exp_avg_bytes() const {
    return moments_.type == MomentType::kOwn        ? static_cast<int64_t>(sizeof(Moment))
           : moments_.type == MomentType::kBFloat16 ? static_cast<int64_t>(sizeof(BFloat16))
                                                    : 1;
  }

  // The step's numbers with what is the row's own in them.
  SPARSEADAM_INLINE Scalars<Moment> scalars_of(int64_t slot) const {
    StepScalars scalars = step_scalars_;
    if (moments_.row_steps != nullptr) {
      int32_t& row_steps = moments_.row_steps[slot];
      if (row_steps < std::numeric_limits<int32_t>::max()) ++row_steps;  // there both corrections are 1
      const double touches = row_steps;
      const double bias_correction1 = 1.0 - std::pow(scalars.beta1, touches);
      const double root_correction2 = std::sqrt(1.0 - std::pow(scalars.beta2, touches));
      const bool torch_eps = scalars.torch_eps != 0.0;
      scalars.step_size = scalars.lr / bias_correction1 * (torch_eps ? root_correction2 : 1.0);
      scalars.root_scale = torch_eps ? 1.0 : 1.0 / root_correction2;
    }
    if (moments_.moment_steps != nullptr) {
      const MomentFactors missed = count_in_missed_steps(memory_, slot);
      scalars.beta1 *= missed.first;
      scalars.beta2 *= missed.second;
    }
    if (moments_.paid_log_decay != nullptr) {
      scalars.decay = std::exp(memory_.log_decay - moments_.paid_log_decay[slot]);
      moments_.paid_log_decay[slot] = memory_.log_decay;
    }
    return Scalars<Moment>(scalars);
  }

  SPARSEADAM_INLINE Moment* load_exp_avg(int64_t slot) const {
    const int64_t begin = slot * moments_.exp_avg_stride;
    if (moments_.type == MomentType::kOwn) return at<Moment>(moments_.exp_avg, begin);
    if (moments_.type == MomentType::kBFloat16) {
      const auto* stored = at<const BFloat16>(moments_.exp_avg, begin);
      for (int64_t i = 0; i < memory_.width; ++i) exp_avg_[i] = widen(stored[i]);
    } else {
      decode_row<ExpAvgBlock>(at<uint8_t>(moments_.exp_avg, begin),
                              moments_.exp_avg_scale + slot * moments_.scale_stride, memory_.width, exp_avg_);
    }
    return exp_avg_;
  }

  SPARSEADAM_INLINE void store_exp_avg(int64_t slot, const Moment* exp_avg, uint32_t key) const {
    const int64_t begin = slot * moments_.exp_avg_stride;
    if (moments_.type == MomentType::kBFloat16) {
      store_bfloat16(exp_avg, at<BFloat16>(moments_.exp_avg, begin), key, Rounded::kExpAvg);
    } else if (moments_.type == MomentType::kCode8) {
      encode_row<ExpAvgBlock>(exp_avg, memory_.width, key, at<uint8_t>(moments_.exp_avg, begin),
                              moments_.exp_avg_scale + slot * moments_.scale_stride);
    }
  }

  SPARSEADAM_INLINE void store_bfloat16(const Moment* from, BFloat16* to, uint32_t key, Rounded what) const {
    for (int64_t i = 0; i < memory_.width; ++i) {
      narrow_stochastic(static_cast<float>(from[i]), random_bits(key, what, static_cast<uint32_t>(i)), &to[i]);
    }
  }

  // Second moments, element by element, and the denominators they lead to.
  SPARSEADAM_INLINE void update_second(int64_t slot, const Moment* gradient, const Scalars<Moment>& scalars,
                                       uint32_t key) const {
    const int64_t begin = slot * moments_.exp_avg_sq_stride;
    Moment* exp_avg_sq = exp_avg_sq_;
    if (moments_.type == MomentType::kOwn) {
      exp_avg_sq = at<Moment>(moments_.exp_avg_sq, begin);
    } else if (moments_.type == MomentType::kBFloat16) {
      const auto* stored = at<const BFloat16>(moments_.exp_avg_sq, begin);
      for (int64_t i = 0; i < memory_.width; ++i) exp_avg_sq_[i] = widen(stored[i]);
    } else {
      decode_row<ExpAvgSqBlock>(at<uint8_t>(moments_.exp_avg_sq, begin),
                                moments_.exp_avg_sq_scale + slot * moments_.scale_stride, memory_.width, exp_avg_sq_);
    }
    for (int64_t i = 0; i < memory_.width; ++i) {
      const Moment grad = gradient[i];
      exp_avg_sq[i] = next_exp_avg_sq(exp_avg_sq[i], grad * grad, scalars);
    }
    Moment* under_root = exp_avg_sq;
    if (moments_.max_exp_avg_sq != nullptr) {
      under_root = at<Moment>(moments_.max_exp_avg_sq, begin);
      for (int64_t i = 0; i < memory_.width; ++i) under_root[i] = larger(exp_avg_sq[i], under_root[i]);
    }
    if (moves_weights()) {
      for (int64_t i = 0; i < memory_.width; ++i) denoms_[i] = denominator(under_root[i], scalars);
    }
    if (moments_.type == MomentType::kBFloat16) {
      store_bfloat16(exp_avg_sq, at<BFloat16>(moments_.exp_avg_sq, begin), key, Rounded::kExpAvgSq);
    } else if (moments_.type == MomentType::kCode8) {
      encode_row<ExpAvgSqBlock>(exp_avg_sq, memory_.width, key, at<uint8_t>(moments_.exp_avg_sq, begin),
                                moments_.exp_avg_sq_scale + slot * moments_.scale_stride);
    }
  }

  // The same for one second moment a row.
  SPARSEADAM_INLINE void update_row_second(int64_t slot, const Moment* gradient, const Scalars<Moment>& scalars) const {
    Moment* exp_avg_sq = at<Moment>(moments_.exp_avg_sq, slot * moments_.exp_avg_sq_stride);
    *exp_avg_sq = next_exp_avg_sq(*exp_avg_sq, mean_square(gradient), scalars);
    Moment under_root = *exp_avg_sq;
    if (moments_.max_exp_avg_sq != nullptr) {
      Moment* largest = at<Moment>(moments_.max_exp_avg_sq, slot * moments_.exp_avg_sq_stride);
      *largest = larger(*exp_avg_sq, *largest);
      under_root = *largest;
    }
    const Moment denom = denominator(under_root, scalars);
    for (int64_t i = 0; i < memory_.width; ++i) denoms_[i] = denom;
  }

  // Summed in a fixed number of lanes, so that every instruction set sums in the same order.
  SPARSEADAM_INLINE Moment mean_square(const Moment* gradient) const {
    constexpr int64_t kLanes = 16;
    Moment lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= memory_.width; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Moment grad = gradient[i + lane];
        lanes[lane] += grad * grad;
      }
    }
    for (int64_t lane = 0; i < memory_.width; ++i, ++lane) {
      const Moment grad = gradient[i];
      lanes[lane] += grad * grad;
    }
    Moment sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum / static_cast<Moment>(std::max<int64_t>(memory_.width, 1));
  }

  // A NaN stays one, as in torch.maximum.
  static SPARSEADAM_INLINE Moment larger(Moment found, Moment largest) {
    return found > largest || found != found ? found : largest;
  }

  SPARSEADAM_INLINE void store_weights(Element* table, uint32_t key) const {
    if (!memory_.stochastic_rounding) {
      for (int64_t i = 0; i < memory_.width; ++i) narrow(weights_[i], &table[i]);
      return;
    }
    for (int64_t i = 0; i < memory_.width; ++i) {
      narrow_stochastic(weights_[i], random_bits(key, Rounded::kTable, static_cast<uint32_t>(i)), &table[i]);
    }
  }

  const TableMemory& memory_;
  const MomentMemory& moments_;
  const StepScalars& step_scalars_;
  Moment* weights_;
  Moment* denoms_;
  Moment* exp_avg_;
  Moment* exp_avg_sq_;
};

}  // namespace

UpdateRows update_any_rows_for(ElementType element, InstructionSet instruction_set) {
  return with_types(element, [&](auto table_element, auto moment) {
    return update_rows_for<AnyRows<decltype(table_element), decltype(moment)>>(instruction_set);
  });
}

}  // namespace sparseadam
