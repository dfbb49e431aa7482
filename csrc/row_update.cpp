#include "row_update.h"

#include <algorithm>
#include <cmath>

#include "element.h"

// Wide code is enabled per function and chosen at run time; the file itself stays at the platform's floor.
#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEADAM_X86 1
#endif

namespace sparseadam {

namespace {

// How far ahead of the walk rows are prefetched: by bytes, so that narrow and wide rows have as much in flight. 8 KiB
// made 65,536 uniform lookups into 1,000,000 x 64 take 4.0 ms on two cores in place of 4.5 with 4 KiB; more brought
// nothing.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kMinPrefetchRows = 2;
constexpr int64_t kMaxPrefetchRows = 32;
constexpr int64_t kCacheLine = 64;

template <class Moment>
struct Scalars {
  Moment beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_scale, eps;

  explicit Scalars(const StepScalars& from)
      : beta1(static_cast<Moment>(from.beta1)),
        one_minus_beta1(static_cast<Moment>(from.one_minus_beta1)),
        beta2(static_cast<Moment>(from.beta2)),
        one_minus_beta2(static_cast<Moment>(from.one_minus_beta2)),
        step_size(static_cast<Moment>(from.step_size)),
        root_scale(static_cast<Moment>(from.root_scale)),
        eps(static_cast<Moment>(from.eps)) {}
};

SPARSEADAM_INLINE void prefetch(const void* address, int64_t num_bytes) {
  const char* bytes = static_cast<const char*>(address);
  for (int64_t offset = 0; offset < num_bytes; offset += kCacheLine) __builtin_prefetch(bytes + offset, 1, 2);
}

// One row, its gradient already summed.
template <class Element, class Gradient, class Moment>
SPARSEADAM_INLINE void update_row(Element* __restrict__ table, Moment* __restrict__ exp_avg,
                                  Moment* __restrict__ exp_avg_sq, const Gradient* __restrict__ gradient, int64_t width,
                                  const Scalars<Moment>& scalars) {
  for (int64_t i = 0; i < width; ++i) {
    const Moment grad = widen(gradient[i]);
    const Moment first = scalars.beta1 * exp_avg[i] + scalars.one_minus_beta1 * grad;
    const Moment second = scalars.beta2 * exp_avg_sq[i] + scalars.one_minus_beta2 * (grad * grad);
    const Moment denom = std::sqrt(second) * scalars.root_scale + scalars.eps;
    exp_avg[i] = first;
    exp_avg_sq[i] = second;
    narrow(widen(table[i]) - scalars.step_size * first / denom, &table[i]);
  }
}

template <class Element, class Moment>
SPARSEADAM_INLINE void add_values(Moment* __restrict__ sum, const Element* __restrict__ values, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += widen(values[i]);
}

template <class Element, class Moment>
SPARSEADAM_INLINE void update_rows(const TableMemory& memory, const RowRun& run, const StepScalars& step_scalars,
                                   void* scratch) {
  const Scalars<Moment> scalars(step_scalars);
  const Partitioning& lookups = *run.lookups;
  const Entry* sorted = lookups.sorted();
  auto* table = static_cast<Element*>(memory.table);
  auto* exp_avg = static_cast<Moment*>(memory.exp_avg);
  auto* exp_avg_sq = static_cast<Moment*>(memory.exp_avg_sq);
  const auto* values = static_cast<const Element*>(memory.values);
  auto* sum = static_cast<Moment*>(scratch);
  const int64_t width = memory.width;
  const auto row_bytes = static_cast<int64_t>(sizeof(Element)) * width;
  const auto moment_bytes = static_cast<int64_t>(sizeof(Moment)) * width;
  const int64_t ahead = row_bytes == 0
                            ? kMinPrefetchRows
                            : std::min(std::max(kPrefetchBytes / row_bytes, kMinPrefetchRows), kMaxPrefetchRows);
  const int64_t last_entry = run.num_rows == 0 ? 0 : run.ends[run.num_rows - 1] - int64_t{1};

  for (int64_t r = 0; r < run.num_rows; ++r) {
    if (r + ahead < run.num_rows && run.slots[r + ahead] >= 0) {
      prefetch(table + lookups.row_of(sorted[run.begins[r + ahead]]) * memory.table_stride, row_bytes);
      prefetch(exp_avg + run.slots[r + ahead] * memory.moment_stride, moment_bytes);
      prefetch(exp_avg_sq + run.slots[r + ahead] * memory.moment_stride, moment_bytes);
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
    Element* row = table + lookups.row_of(sorted[begin]) * memory.table_stride;
    Moment* first = exp_avg + run.slots[r] * memory.moment_stride;
    Moment* second = exp_avg_sq + run.slots[r] * memory.moment_stride;
    const Element* gradient = value_at(begin);
    if (end - begin == 1) {
      update_row(row, first, second, gradient, width, scalars);
      continue;
    }
    for (int64_t i = 0; i < width; ++i) sum[i] = widen(gradient[i]);
    for (int64_t entry = begin + 1; entry < end; ++entry) add_values(sum, value_at(entry), width);
    update_row(row, first, second, sum, width, scalars);
  }
}

// One function per element type, for one instruction set.
#define SPARSEADAM_VARIANT(NAME, TARGET)                                                                  \
  template <class Element, class Moment>                                                                  \
  TARGET void NAME(const TableMemory& memory, const RowRun& run, const StepScalars& scalars, void* sum) { \
    update_rows<Element, Moment>(memory, run, scalars, sum);                                              \
  }

SPARSEADAM_VARIANT(update_rows_portable, )
#if defined(SPARSEADAM_X86)
SPARSEADAM_VARIANT(update_rows_avx2, __attribute__((target("avx2,f16c"))))
SPARSEADAM_VARIANT(update_rows_avx512,
                   __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

template <class Element, class Moment>
UpdateRows choose(InstructionSet instruction_set) {
#if defined(SPARSEADAM_X86)
  if (instruction_set == InstructionSet::kAvx512) return update_rows_avx512<Element, Moment>;
  if (instruction_set == InstructionSet::kAvx2) return update_rows_avx2<Element, Moment>;
#endif
  return update_rows_portable<Element, Moment>;
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

UpdateRows update_rows_for(ElementType element, InstructionSet instruction_set) {
  switch (element) {
    case ElementType::kFloat32:
      return choose<float, float>(instruction_set);
    case ElementType::kFloat64:
      return choose<double, double>(instruction_set);
    case ElementType::kBFloat16:
      return choose<BFloat16, float>(instruction_set);
    case ElementType::kFloat16:
#if defined(SPARSEADAM_HAS_FLOAT16)
      return choose<Float16, float>(instruction_set);
#else
      return nullptr;
#endif
  }
  return nullptr;
}

}  // namespace sparseadam
