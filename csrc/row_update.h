// The update of rows.
//
// For each row of a run, with g the sum of its lookups' values in lookup order:
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
//   table      = decay * table - step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)
//
// which is Kingma & Ba (2015), Algorithm 1, with step_size = lr / (1 - beta1**t) and root_scale = 1 / sqrt(1 -
// beta2**t), and Loshchilov & Hutter's (2019) decoupled weight decay. The scalars come from the caller, computed in
// double; they are rounded once to the type of the moments. A table's options change the formula thus:
//
// - One second moment a row: the mean of g * g over the row takes the place of g * g (FBGEMM's "partial row-wise
// Adam").
// - AMSGrad: the root is of the largest exp_avg_sq so far (Reddi et al., 2018).
// - A row's own correction: t is the row's count of touches; step_size and root_scale are computed for each row.
// - Owed decay: decay is exp(log_decay - paid), all that the row missed and this step's own.
// - Missed steps that are replayed: moments are multiplied by the betas of the steps that the row missed, too. Its
//   weights stay as they are until they are next read: catch_up.h moves them by this step as well.
// - Moments of fewer bits: decoded before and encoded after, by stochastic rounding (rounding.h).
//
// Accumulation is in the type of the moments: double for double tables, float for all others. The code is plain loops,
// compiled once per instruction set; contraction is off, so every instruction set gives the same bits.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "element.h"
#include "history.h"
#include "partition.h"

// Wide code is enabled per function and chosen at run time; files themselves stay at the platform's floor.
// SPARSEADAM_EACH_SET defines a VARIANT(SET, TARGET) of a function template for each instruction set, and
// SPARSEADAM_OF_SET(set, name, types...) is name_SET<types...> for the one that is given.
#if defined(SPARSEADAM_X86)
#define SPARSEADAM_AVX2 __attribute__((target("avx2,f16c")))
#define SPARSEADAM_AVX512 \
  __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define SPARSEADAM_EACH_SET(VARIANT) \
  VARIANT(portable, )                \
  VARIANT(avx2, SPARSEADAM_AVX2)     \
  VARIANT(avx512, SPARSEADAM_AVX512)
#define SPARSEADAM_OF_SET(set, name, ...)                        \
  ((set) == InstructionSet::kAvx512 ? name##_avx512<__VA_ARGS__> \
   : (set) == InstructionSet::kAvx2 ? name##_avx2<__VA_ARGS__>   \
                                    : name##_portable<__VA_ARGS__>)
#else
#define SPARSEADAM_EACH_SET(VARIANT) VARIANT(portable, )
#define SPARSEADAM_OF_SET(set, name, ...) name##_portable<__VA_ARGS__>
#endif

namespace sparseadam {

enum class ElementType { kFloat32, kFloat64, kBFloat16, kFloat16 };
// Bytes of an element.
inline int64_t element_bytes(ElementType element) {
  switch (element) {
    case ElementType::kFloat64:
      return 8;
    case ElementType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// Bytes of an element of its moments as they are computed, and of sums.
inline int64_t moment_bytes(ElementType element) { return element == ElementType::kFloat64 ? 8 : 4; }
// What sums of missed steps may be off by.
inline double tolerance_of(ElementType element) {
  return moment_bytes(element) == sizeof(double) ? kTolerance<double> : kTolerance<float>;
}

// Calls choose(element, moment) with a value of each of a table's two types, or returns {} where this build has none.
template <class Choose>
auto with_types(ElementType element, Choose choose) -> decltype(choose(float{}, float{})) {
  switch (element) {
    case ElementType::kFloat32:
      return choose(float{}, float{});
    case ElementType::kFloat64:
      return choose(double{}, double{});
    case ElementType::kBFloat16:
      return choose(BFloat16{}, float{});
    case ElementType::kFloat16:
#if defined(SPARSEADAM_HAS_FLOAT16)
      return choose(Float16{}, float{});
#else
      return {};
#endif
  }
  return {};
}

// Calls run(width), with the width of rows as a constant if it is one of some usual ones, and else 0. Loops over rows
// of a known width need no counting: with fewer instructions between them, more cache lines are on their way at once.
// 262,144 Zipf lookups into 1,000,000 x 128 took 22 ms on two cores in place of 27, and 65,536 into 1,000,000 x 64 3.8
// in place of 4.4. For float32 tables alone: each width is a kernel more to compile.
template <bool kKnowsWidths, class Run>
SPARSEADAM_INLINE void with_width(int64_t width, Run run) {
  if constexpr (kKnowsWidths) {
    switch (width) {
      case 16:
        return run(std::integral_constant<int64_t, 16>{});
      case 32:
        return run(std::integral_constant<int64_t, 32>{});
      case 64:
        return run(std::integral_constant<int64_t, 64>{});
      case 128:
        return run(std::integral_constant<int64_t, 128>{});
    }
  }
  run(std::integral_constant<int64_t, 0>{});
}

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

struct StepScalars {
  double beta1, one_minus_beta1;  // one_minus_beta1 carries the sign of `maximize`: climbing negates g
  double beta2, one_minus_beta2;
  double step_size, root_scale, eps;
  double decay;       // of touched rows
  double lr;          // for rows with corrections of their own
  double torch_eps;   // 1 where eps stands before the correction, which only such rows need to be told
  double log_decay;   // what this step adds to what rows owe, where they pay all that they missed; else 0
  double seed, step;  // for random bits; whole numbers below 2**53
};

// How the elements of the moments are stored: in their own type, which is double for double tables and else float, as
// bfloat16, or as 8-bit codes with a scale for each block of a row.
enum class MomentType { kOwn, kBFloat16, kCode8 };

// Where the moments of a table are and which there are; nullptr for those that its options do without. Strides are in
// elements, from slot to slot. A second moment a row is of the moments' own type.
struct MomentMemory {
  MomentType type;
  bool one_exp_avg_sq_a_row;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  int64_t exp_avg_stride;
  int64_t exp_avg_sq_stride;  // of max_exp_avg_sq too
  float* exp_avg_scale;       // [.., num_blocks]
  float* exp_avg_sq_scale;
  int64_t scale_stride;
  int32_t* row_steps;      // touches of each slot
  double* paid_log_decay;  // of each slot
  int32_t* moment_steps;   // up to which step a slot's moments, and its row's weights, have been brought
  int32_t* weight_steps;
  int64_t clock_stride;  // of both
};

// A table, its moments and its gradient's values, as raw memory. Strides are in elements; a row's elements are
// adjacent.
struct TableMemory {
  void* table;
  int64_t table_stride;
  MomentMemory moments;
  bool stochastic_rounding;  // of the table
  const void* values;        // [num_lookups, width]
  int64_t width;
  uint64_t random_key;       // of the table's step
  double log_decay;          // what a row owes that has paid nothing, this step included
  const int64_t* row_names;  // what random bits know the rows by; nullptr where by their place in the table
  History history;           // where missed steps are replayed; it has been taken in
};

// Rows to update: row r of the run has the lookups sorted[begins[r]] .. sorted[ends[r] - 1] and the moments at
// slots[r]. A row with a negative slot is passed over.
struct RowRun {
  const Partitioning* lookups;
  const Entry* sorted;
  const uint32_t* begins;
  const uint32_t* ends;
  const int64_t* slots;
  int64_t num_rows;
};

// Updates the rows of a run. `scratch` has room for kScratchRows * width doubles.
using UpdateRows = void (*)(const TableMemory&, const RowRun&, const StepScalars&, void* scratch);
constexpr int64_t kScratchRows = 5;

// Says of each row of a run whether its summed gradient is finite, [num_rows]. The run needs no slots; `scratch` as
// above.
using FindFiniteRows = void (*)(const TableMemory&, const RowRun&, uint8_t* is_finite, void* scratch);

// Writes the sum of each row's values, [num_rows, width], in the type of the moments. The run needs no slots.
using SumRows = void (*)(const void* values, int64_t width, const RowRun&, void* sums);

struct RowKernels {
  UpdateRows update_rows;
  FindFiniteRows find_finite_rows;
  SumRows sum_rows;
};

// The instruction sets that this build has and this processor can run, slowest first.
std::vector<InstructionSet> instruction_sets();

// The functions for a table, or nullptrs where this build has none for its type of elements.
RowKernels row_kernels_for(ElementType element, const MomentMemory& moments, bool stochastic_rounding,
                           InstructionSet instruction_set);

}  // namespace sparseadam
