#include "row_update.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "element.h"
#include "formula.h"
#include "prefetch.h"
#include "rounding.h"

namespace sparseadam {

namespace {

// What a row's moments are multiplied by for the steps it has missed; its clocks then show this step.
SPARSEADAM_INLINE MomentFactors count_in_missed_steps(const TableMemory& memory, int64_t slot) {
  const History& history = memory.history;
  const int64_t clock = slot * memory.moments.clock_stride;
  const int64_t written = history.entry_of(memory.moments.moment_steps[clock]);
  memory.moments.moment_steps[clock] = static_cast<int32_t>(history.step() + 1);
  memory.moments.weight_steps[clock] = static_cast<int32_t>(history.step() + 1);
  return history.missed->moment_factors(history, written);
}

// A table whose moments are of their own type, one of each an element, and whose rows share the step's numbers, but for
// what those that replay missed steps have missed.
template <class TableElement, class MomentElement, bool kReplays>
class PlainRows {
 public:
  static constexpr bool kKnowsWidths = std::is_same_v<TableElement, float>;
  using Element = TableElement;
  using Moment = MomentElement;

  PlainRows(const TableMemory& memory, const StepScalars& scalars, Moment*)
      : memory_(memory),
        beta1_(scalars.beta1),
        beta2_(scalars.beta2),
        scalars_(scalars),
        exp_avg_(static_cast<Moment*>(memory.moments.exp_avg)),
        exp_avg_sq_(static_cast<Moment*>(memory.moments.exp_avg_sq)) {}

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
      narrow(next_weight<Moment>(widen(table[i]), first, denominator(second, scalars), scalars), &table[i]);
    }
  }

  const TableMemory& memory_;
  const double beta1_, beta2_;
  const Scalars<Moment> scalars_;
  Moment* exp_avg_;
  Moment* exp_avg_sq_;
};

// Any table. Moments are brought into the form of a plain row's, in scratch where they are stored otherwise, updated
// there, and put back.
template <class TableElement, class MomentElement>
class AnyRows {
 public:
  static constexpr bool kKnowsWidths = false;
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

  SPARSEADAM_INLINE void prefetch_moments(int64_t slot) const {
    prefetch(at<char>(moments_.exp_avg, slot * moments_.exp_avg_stride * exp_avg_bytes()),
             memory_.width * exp_avg_bytes());
    if (moments_.one_exp_avg_sq_a_row) {
      prefetch(at<Moment>(moments_.exp_avg_sq, slot), 1);
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

  template <class Gradient>
  SPARSEADAM_INLINE void update(Element* table, int64_t row, int64_t slot, const Gradient* gradient) const {
    const Scalars<Moment> scalars = scalars_of(slot);
    const int64_t name = memory_.row_names != nullptr ? memory_.row_names[row] : row;
    const uint32_t key = row_key(memory_.random_key, name);
    Moment* exp_avg = load_exp_avg(slot);
    for (int64_t i = 0; i < memory_.width; ++i) {
      exp_avg[i] = next_exp_avg<Moment>(exp_avg[i], widen(gradient[i]), scalars);
    }
    if (moments_.one_exp_avg_sq_a_row) {
      update_row_second(slot, gradient, scalars);
    } else {
      update_second(slot, gradient, scalars, key);
    }
    for (int64_t i = 0; i < memory_.width; ++i) {
      weights_[i] = next_weight<Moment>(widen(table[i]), exp_avg[i], denoms_[i], scalars);
    }
    store_exp_avg(slot, exp_avg, key);
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
      const double touches = ++moments_.row_steps[slot];
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
  template <class Gradient>
  SPARSEADAM_INLINE void update_second(int64_t slot, const Gradient* gradient, const Scalars<Moment>& scalars,
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
      const Moment grad = widen(gradient[i]);
      exp_avg_sq[i] = next_exp_avg_sq(exp_avg_sq[i], grad * grad, scalars);
    }
    Moment* under_root = exp_avg_sq;
    if (moments_.max_exp_avg_sq != nullptr) {
      under_root = at<Moment>(moments_.max_exp_avg_sq, begin);
      for (int64_t i = 0; i < memory_.width; ++i) under_root[i] = larger(exp_avg_sq[i], under_root[i]);
    }
    for (int64_t i = 0; i < memory_.width; ++i) denoms_[i] = denominator(under_root[i], scalars);
    if (moments_.type == MomentType::kBFloat16) {
      store_bfloat16(exp_avg_sq, at<BFloat16>(moments_.exp_avg_sq, begin), key, Rounded::kExpAvgSq);
    } else if (moments_.type == MomentType::kCode8) {
      encode_row<ExpAvgSqBlock>(exp_avg_sq, memory_.width, key, at<uint8_t>(moments_.exp_avg_sq, begin),
                                moments_.exp_avg_sq_scale + slot * moments_.scale_stride);
    }
  }

  // The same for one second moment a row.
  template <class Gradient>
  SPARSEADAM_INLINE void update_row_second(int64_t slot, const Gradient* gradient,
                                           const Scalars<Moment>& scalars) const {
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
  template <class Gradient>
  SPARSEADAM_INLINE Moment mean_square(const Gradient* gradient) const {
    constexpr int64_t kLanes = 16;
    Moment lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= memory_.width; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Moment grad = widen(gradient[i + lane]);
        lanes[lane] += grad * grad;
      }
    }
    for (int64_t lane = 0; i < memory_.width; ++i, ++lane) {
      const Moment grad = widen(gradient[i]);
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

template <class Element, class Moment>
SPARSEADAM_INLINE void add_values(Moment* __restrict__ sum, const Element* __restrict__ values, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += widen(values[i]);
}

// Rows of kWidth elements, or of as many as memory.width says where that is 0. The memory is a copy of this function's
// own, so that the compiler knows the width in all that is inlined here.
template <class Rows, int64_t kWidth>
SPARSEADAM_INLINE void update_rows_of_width(TableMemory memory, const RowRun& run, const StepScalars& scalars,
                                            void* scratch) {
  if (kWidth > 0) memory.width = kWidth;
  using Element = typename Rows::Element;
  using Moment = typename Rows::Moment;
  const int64_t width = memory.width;
  auto* sum = static_cast<Moment*>(scratch);
  const Rows rows(memory, scalars, sum + width);
  const Partitioning& lookups = *run.lookups;
  const Entry* sorted = lookups.sorted();
  auto* table = static_cast<Element*>(memory.table);
  const auto* values = static_cast<const Element*>(memory.values);
  const auto row_bytes = static_cast<int64_t>(sizeof(Element)) * width;
  const int64_t ahead = prefetch_distance(row_bytes);
  const int64_t last_entry = run.num_rows == 0 ? 0 : run.ends[run.num_rows - 1] - int64_t{1};

  for (int64_t r = 0; r < run.num_rows; ++r) {
    if (r + ahead < run.num_rows && run.slots[r + ahead] >= 0) {
      prefetch(table + lookups.row_of(sorted[run.begins[r + ahead]]) * memory.table_stride, row_bytes);
      rows.prefetch_moments(run.slots[r + ahead]);
    }
    if (run.slots[r] < 0) continue;
    const int64_t begin = run.begins[r];
    const int64_t end = run.ends[r];
    const auto value_at = [&](int64_t entry) {
      // Values lie where the batch put them, far apart in row order: fetch those of a later entry while using this one.
      const Entry later = sorted[std::min(entry + ahead, last_entry)];
      prefetch(values + lookups.position_of(later) * width, row_bytes);
      return values + lookups.position_of(sorted[entry]) * width;
    };
    const int64_t row = lookups.row_of(sorted[begin]);
    Element* weights = table + row * memory.table_stride;
    const Element* gradient = value_at(begin);
    if (end - begin == 1) {
      rows.update(weights, row, run.slots[r], gradient);
      continue;
    }
    for (int64_t i = 0; i < width; ++i) sum[i] = widen(gradient[i]);
    for (int64_t entry = begin + 1; entry < end; ++entry) add_values(sum, value_at(entry), width);
    rows.update(weights, row, run.slots[r], sum);
  }
}

// Loops over rows of a known width need no counting: with fewer instructions between them, more cache lines are on
// their way at once. 262,144 Zipf lookups into 1,000,000 x 128 took 22 ms on two cores in place of 27, and 65,536 into
// 1,000,000 x 64 3.8 in place of 4.4. For float32 tables alone: each width is a kernel more to compile.
template <class Rows>
SPARSEADAM_INLINE void update_rows(const TableMemory& memory, const RowRun& run, const StepScalars& scalars,
                                   void* scratch) {
  if constexpr (Rows::kKnowsWidths) {
    switch (memory.width) {
      case 16:
        return update_rows_of_width<Rows, 16>(memory, run, scalars, scratch);
      case 32:
        return update_rows_of_width<Rows, 32>(memory, run, scalars, scratch);
      case 64:
        return update_rows_of_width<Rows, 64>(memory, run, scalars, scratch);
      case 128:
        return update_rows_of_width<Rows, 128>(memory, run, scalars, scratch);
    }
  }
  update_rows_of_width<Rows, 0>(memory, run, scalars, scratch);
}

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

// One function per kind of table, for one instruction set.
#define SPARSEADAM_VARIANT(SET, TARGET)                                                                   \
  template <class Rows>                                                                                   \
  TARGET void update_rows_##SET(const TableMemory& memory, const RowRun& run, const StepScalars& scalars, \
                                void* scratch) {                                                          \
    update_rows<Rows>(memory, run, scalars, scratch);                                                     \
  }                                                                                                       \
  template <class Element, class Moment>                                                                  \
  TARGET bool is_finite_##SET(const TableMemory& memory, const RowRun& run, int64_t r, void* scratch) {   \
    return is_finite<Element, Moment>(memory, run, r, scratch);                                           \
  }                                                                                                       \
  template <class Element, class Moment>                                                                  \
  TARGET void sum_rows_##SET(const void* values, int64_t width, const RowRun& run, void* sums) {          \
    sum_rows<Element, Moment>(values, width, run, sums);                                                  \
  }

SPARSEADAM_VARIANT(portable, )
#if defined(SPARSEADAM_X86)
SPARSEADAM_VARIANT(avx2, SPARSEADAM_AVX2)
SPARSEADAM_VARIANT(avx512, SPARSEADAM_AVX512)
#endif

template <class Rows>
RowKernels kernels_of(InstructionSet instruction_set) {
  using Element = typename Rows::Element;
  using Moment = typename Rows::Moment;
#if defined(SPARSEADAM_X86)
  if (instruction_set == InstructionSet::kAvx512) {
    return {update_rows_avx512<Rows>, is_finite_avx512<Element, Moment>, sum_rows_avx512<Element, Moment>};
  }
  if (instruction_set == InstructionSet::kAvx2) {
    return {update_rows_avx2<Rows>, is_finite_avx2<Element, Moment>, sum_rows_avx2<Element, Moment>};
  }
#endif
  return {update_rows_portable<Rows>, is_finite_portable<Element, Moment>, sum_rows_portable<Element, Moment>};
}

template <class Element, class Moment>
RowKernels choose(bool is_plain, bool replays, InstructionSet instruction_set) {
  if (!is_plain) return kernels_of<AnyRows<Element, Moment>>(instruction_set);
  if (replays) return kernels_of<PlainRows<Element, Moment, true>>(instruction_set);
  return kernels_of<PlainRows<Element, Moment, false>>(instruction_set);
}

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
  switch (element) {
    case ElementType::kFloat32:
      return choose<float, float>(is_plain, moments.moment_steps != nullptr, instruction_set);
    case ElementType::kFloat64:
      return choose<double, double>(is_plain, moments.moment_steps != nullptr, instruction_set);
    case ElementType::kBFloat16:
      return choose<BFloat16, float>(is_plain, moments.moment_steps != nullptr, instruction_set);
    case ElementType::kFloat16:
#if defined(SPARSEADAM_HAS_FLOAT16)
      return choose<Float16, float>(is_plain, moments.moment_steps != nullptr, instruction_set);
#else
      return {};
#endif
  }
  return {};
}

}  // namespace sparseadam
