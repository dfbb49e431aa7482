// The native step without Python: what the thread sanitizer and callgrind can look at.
//
//   step_test threads          the same bits for any number of threads and any instruction set, with any options; steps
//                              of several threads at once; a bad index changes nothing; rows that are skipped or
//                              refused; rows that catch up; partitions of any size; a team's phases follow one another,
//                              and nothing that is thrown gets lost; rounding where chance is at its ends
//   step_test cases            the fixed calls whose instructions are counted, a line "CASE SET" each
//   step_test call CASE SET    one of them; the part to count is the function `counted_call`
//
// All data comes from a generator with fixed seeds. A check that fails says what it found and aborts.
#include "../step.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../catch_up.h"
#include "../element.h"
#include "../found_rows.h"
#include "../rounding.h"
// Included, not linked: after a step that was held up, as most are under a sanitizer, the team takes the next ones
// alone. The tests reach in to forget that, or nearly all of them would run on one thread.
#include "../thread_team.cpp"

namespace sparseadam {

namespace {

#define CHECK(condition, ...)                        \
  do {                                               \
    if (!(condition)) fail(#condition, __VA_ARGS__); \
  } while (false)

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* condition, const char* format, ...) {
  std::fprintf(stderr, "step_test: not so: %s: ", condition);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// Steele, Lea & Flood's SplitMix64 (2014): the standard library's distributions differ from one library to the next.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

using Bytes = std::vector<unsigned char>;

enum class Draw { kUniform, kZipf };

// What a table has beside the moments of plain rows.
enum Option { kRowSecond = 1, kAmsgrad = 2, kRowSteps = 4, kOwesDecay = 8, kStochasticRounding = 16 };

struct TableSpec {
  const char* name;
  ElementType element;
  std::vector<int64_t> sparse_shape;
  int64_t width;
  int64_t num_lookups;
  Draw draw = Draw::kZipf;
  bool wide_slots = false;
  MomentType type = MomentType::kOwn;
  int options = 0;
  bool has(Option option) const { return (options & option) != 0; }
};

int64_t num_rows_of(const TableSpec& spec) {
  int64_t num_rows = 1;
  for (const int64_t size : spec.sparse_shape) num_rows *= size;
  return num_rows;
}

size_t moment_size(ElementType element) { return static_cast<size_t>(moment_bytes(element)); }

// Bytes of an element of a table's moments as they are stored.
size_t stored_size(const TableSpec& spec) {
  switch (spec.type) {
    case MomentType::kBFloat16:
      return sizeof(BFloat16);
    case MomentType::kCode8:
      return 1;
    default:
      return moment_size(spec.element);
  }
}

template <class Element, class Moment>
void fill_with(Bytes& to, Random& random) {
  for (size_t at = 0; at < to.size(); at += sizeof(Element)) {
    Element element;
    narrow(static_cast<Moment>(2.0 * random.uniform() - 1.0), &element);
    std::memcpy(&to[at], &element, sizeof element);
  }
}

Bytes random_elements(ElementType element, int64_t count, Random& random) {
  Bytes to(static_cast<size_t>(count) * static_cast<size_t>(element_bytes(element)));
  switch (element) {
    case ElementType::kFloat64:
      fill_with<double, double>(to, random);
      break;
    case ElementType::kFloat32:
      fill_with<float, float>(to, random);
      break;
    case ElementType::kBFloat16:
      fill_with<BFloat16, float>(to, random);
      break;
    case ElementType::kFloat16:
#if defined(SPARSEADAM_HAS_FLOAT16)
      fill_with<Float16, float>(to, random);
#endif
      break;
  }
  return to;
}

// A table with all that a step may write. A copy is a table of its own.
struct TableData {
  TableSpec spec;
  Bytes table;
  Bytes moments;              // [num_rows, moments_a_slot(), width]
  Bytes row_seconds;          // [num_rows, 1, or 2 with the largest ones]
  std::vector<float> scales;  // [num_rows, 1 or 2, blocks]
  std::vector<int32_t> row_steps;
  std::vector<double> paid_log_decay;
  Bytes slot_of_row;
  std::vector<int64_t> rows;
  int64_t num_steps = 0;
  int64_t num_slots = 0;
  int64_t num_skipped = 0;
  double log_decay = 0.0;

  TableData(const TableSpec& of, uint64_t seed) : spec(of) {
    Random random(seed);
    const int64_t num_rows = num_rows_of(spec);
    const auto slots = static_cast<size_t>(num_rows);
    table = random_elements(spec.element, num_rows * spec.width, random);
    moments.resize(static_cast<size_t>(num_rows * moments_a_slot() * spec.width) * stored_size(spec));
    if (spec.has(kRowSecond)) row_seconds.resize(slots * seconds_a_slot() * moment_size(spec.element));
    if (spec.type == MomentType::kCode8) scales.resize(slots * static_cast<size_t>(scales_a_slot()));
    if (spec.has(kRowSteps)) row_steps.resize(slots);
    if (spec.has(kOwesDecay)) paid_log_decay.resize(slots);
    slot_of_row.resize(slots * (spec.wide_slots ? sizeof(int64_t) : sizeof(int32_t)));
    rows.resize(slots, -1);
  }

  int64_t seconds_a_slot() const { return spec.has(kAmsgrad) ? 2 : 1; }
  int64_t moments_a_slot() const { return 1 + (spec.has(kRowSecond) ? 0 : seconds_a_slot()); }
  int64_t scales_a_slot() const { return (spec.has(kRowSecond) ? 1 : 2) * num_blocks(spec.width); }

  Table view() {
    MomentMemory memory{};
    memory.type = spec.type;
    memory.one_exp_avg_sq_a_row = spec.has(kRowSecond);
    memory.exp_avg = moments.data();
    memory.exp_avg_stride = moments_a_slot() * spec.width;
    const bool are_apart = memory.one_exp_avg_sq_a_row;
    const size_t second_size =
        are_apart ? moment_size(spec.element) : stored_size(spec) * static_cast<size_t>(spec.width);
    auto* second = are_apart ? row_seconds.data() : moments.data() + second_size;
    memory.exp_avg_sq = second;
    memory.exp_avg_sq_stride = are_apart ? seconds_a_slot() : memory.exp_avg_stride;
    if (spec.has(kAmsgrad)) memory.max_exp_avg_sq = second + second_size;
    if (spec.type == MomentType::kCode8) {
      memory.exp_avg_scale = scales.data();
      if (!are_apart) memory.exp_avg_sq_scale = scales.data() + num_blocks(spec.width);
      memory.scale_stride = scales_a_slot();
    }
    if (spec.has(kRowSteps)) memory.row_steps = row_steps.data();
    if (spec.has(kOwesDecay)) memory.paid_log_decay = paid_log_decay.data();
    return {table.data(),
            spec.width,
            spec.element,
            spec.sparse_shape,
            num_rows_of(spec),
            spec.width,
            memory,
            slot_of_row.data(),
            spec.wide_slots,
            rows.data(),
            spec.has(kStochasticRounding),
            0,
            nullptr};
  }
};

struct Gradient {
  std::vector<int64_t> indices;  // [sparse_dim, num_lookups]
  Bytes values;
};

// Lookups among the rows up to the `reach`-th part of the table. Zipf-like ones repeat much: some rows very often.
Gradient make_gradient(const TableSpec& spec, uint64_t seed, double reach = 1.0) {
  Random random(seed);
  const int64_t num_rows = std::max<int64_t>(1, static_cast<int64_t>(reach * static_cast<double>(num_rows_of(spec))));
  const auto sparse_dim = static_cast<int64_t>(spec.sparse_shape.size());
  Gradient gradient;
  gradient.indices.resize(static_cast<size_t>(sparse_dim * spec.num_lookups));
  for (int64_t i = 0; i < spec.num_lookups; ++i) {
    double u = random.uniform();
    if (spec.draw == Draw::kZipf) u = u * u * u * u;
    const auto rank = static_cast<uint64_t>(u * static_cast<double>(num_rows));
    // Frequent rows lie all over the table, not at its head. (Several ranks may share a row.)
    uint64_t row = rank * 0x9E3779B1u % static_cast<uint64_t>(num_rows);
    for (int64_t dim = sparse_dim - 1; dim >= 0; --dim) {
      const auto size = static_cast<uint64_t>(spec.sparse_shape[static_cast<size_t>(dim)]);
      gradient.indices[static_cast<size_t>(dim * spec.num_lookups + i)] = static_cast<int64_t>(row % size);
      row /= size;
    }
  }
  gradient.values = random_elements(spec.element, spec.num_lookups * spec.width, random);
  return gradient;
}

std::vector<TableData> make_tables(const std::vector<TableSpec>& specs, uint64_t seed) {
  std::vector<TableData> tables;
  for (const TableSpec& spec : specs) tables.emplace_back(spec, ++seed);
  return tables;
}

std::vector<Gradient> make_gradients(const std::vector<TableSpec>& specs, uint64_t seed, double reach = 1.0) {
  std::vector<Gradient> gradients;
  for (const TableSpec& spec : specs) gradients.push_back(make_gradient(spec, 1000 + ++seed, reach));
  return gradients;
}

// What a step takes, made ready beforehand so that a counted call holds the step and nothing else.
struct PreparedStep {
  std::vector<Table> views;
  std::vector<TableStep> tables;
};

PreparedStep prepare(std::vector<TableData>& tables, const std::vector<Gradient>& gradients,
                     NonFinite nonfinite = NonFinite::kPropagate) {
  PreparedStep prepared;
  for (TableData& table : tables) prepared.views.push_back(table.view());
  for (size_t t = 0; t < tables.size(); ++t) {
    StepScalars scalars{0.9, 0.1, 0.999, 0.001, 0.01, 2.0, 1e-8, 1.0, 0.01, 0.0, 0.0, 5.0, 1.0};
    scalars.step += static_cast<double>(tables[t].num_steps);
    if (tables[t].spec.has(kOwesDecay)) scalars.log_decay = std::log(0.99);
    prepared.tables.push_back({&prepared.views[t],
                               gradients[t].indices.data(),
                               gradients[t].values.data(),
                               tables[t].spec.num_lookups,
                               scalars,
                               nonfinite,
                               tables[t].num_slots,
                               tables[t].num_skipped,
                               tables[t].log_decay,
                               {}});
  }
  return prepared;
}

void keep_counters(const PreparedStep& prepared, std::vector<TableData>& tables) {
  for (size_t t = 0; t < tables.size(); ++t) {
    const TableStep& done = prepared.tables[t];
    tables[t].num_steps += 1;
    tables[t].num_slots = done.num_slots;
    tables[t].num_skipped = done.num_skipped;
    tables[t].log_decay = done.log_decay;
  }
}

Fault step_tables(std::vector<TableData>& tables, const std::vector<Gradient>& gradients, InstructionSet set,
                  int num_threads, NonFinite nonfinite = NonFinite::kPropagate) {
  steps_alone.store(0);
  PreparedStep prepared = prepare(tables, gradients, nonfinite);
  Fault fault = step(prepared.tables, set, num_threads);
  if (fault.table < 0) keep_counters(prepared, tables);
  return fault;
}

void check_same(const std::vector<TableData>& found, const std::vector<TableData>& expected, const char* where) {
  for (size_t t = 0; t < expected.size(); ++t) {
    const char* name = expected[t].spec.name;
    CHECK(found[t].num_slots == expected[t].num_slots, "%s, %s", name, where);
    CHECK(found[t].num_skipped == expected[t].num_skipped, "%s, %s", name, where);
    CHECK(found[t].log_decay == expected[t].log_decay, "%s, %s", name, where);
    CHECK(found[t].rows == expected[t].rows, "%s, %s", name, where);
    CHECK(found[t].slot_of_row == expected[t].slot_of_row, "%s, %s", name, where);
    CHECK(found[t].moments == expected[t].moments, "%s, %s", name, where);
    CHECK(found[t].row_seconds == expected[t].row_seconds, "%s, %s", name, where);
    CHECK(found[t].scales == expected[t].scales, "%s, %s", name, where);
    CHECK(found[t].row_steps == expected[t].row_steps, "%s, %s", name, where);
    CHECK(found[t].paid_log_decay == expected[t].paid_log_decay, "%s, %s", name, where);
    CHECK(found[t].table == expected[t].table, "%s, %s", name, where);
  }
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kPortable:
      return "portable";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
  }
  return "unknown";
}

// ---- partitions -------------------------------------------------------------------------------------------------

// Sorts lookups as a step does, its partitions shared out among threads, and compares with a sort of pairs. Returns
// what the largest partition needed of a thread.
int64_t check_partitions(const std::vector<int64_t>& rows, int64_t num_rows, int64_t row_bytes, int num_threads) {
  const auto num_lookups = static_cast<int64_t>(rows.size());
  Arena arena;
  Partitioning lookups;
  lookups.plan({rows.data(), &num_rows, 1, num_lookups}, num_rows, row_bytes, num_threads, num_lookups, arena);
  for (int64_t chunk = 0; chunk < lookups.num_chunks(); ++chunk) {
    CHECK(lookups.partition_chunk(chunk).lookup == -1, "chunk %d", static_cast<int>(chunk));
  }
  lookups.finish_partitioning(arena);
  constexpr int64_t kNumSorters = 2;
  std::vector<std::thread> sorters;
  for (int64_t sorter = 0; sorter < kNumSorters; ++sorter) {
    sorters.emplace_back([&, sorter] {
      std::vector<Entry> scratch(static_cast<size_t>(lookups.sort_scratch()));
      const int64_t end = (sorter + 1) * lookups.num_partitions() / kNumSorters;
      for (int64_t p = sorter * lookups.num_partitions() / kNumSorters; p < end; ++p) {
        lookups.sort_partition(p, lookups.kept(p), scratch.data());
      }
    });
  }
  for (std::thread& sorter : sorters) sorter.join();

  std::vector<std::pair<int64_t, int64_t>> expected;
  for (int64_t i = 0; i < num_lookups; ++i) expected.emplace_back(rows[static_cast<size_t>(i)], i);
  std::sort(expected.begin(), expected.end());
  int64_t begin = 0;
  for (int64_t p = 0; p < lookups.num_partitions(); ++p) {
    CHECK(lookups.partition_begin(p) == begin, "partition %d", static_cast<int>(p));
    int64_t num_distinct = 0;
    for (int64_t i = begin; i < lookups.partition_end(p); ++i) {
      const auto& [row, position] = expected[static_cast<size_t>(i)];
      const Entry entry = lookups.kept(0)[i];
      CHECK(lookups.row_of(entry) == row && lookups.position_of(entry) == position, "entry %d", static_cast<int>(i));
      num_distinct += i == begin || expected[static_cast<size_t>(i - 1)].first != row ? 1 : 0;
    }
    CHECK(num_distinct <= lookups.max_rows(), "partition %d has %d rows", static_cast<int>(p),
          static_cast<int>(num_distinct));
    begin = lookups.partition_end(p);
  }
  CHECK(begin == num_lookups, "%d lookups in partitions", static_cast<int>(begin));
  return lookups.sort_scratch();
}

// The first row and the last, which different threads sort, looked up so often each, between lookups of others.
std::vector<int64_t> hot_rows(int64_t count, int64_t num_rows) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) {
    rows.push_back(num_rows - 1);
    rows.push_back(0);
    if (i % 8 == 0) rows.push_back(num_rows / 2 + i % 64);
  }
  return rows;
}

// Partitions up to a size are sorted in a thread's own memory, larger ones in memory that all share; and there are no
// more of them than a thread can count, however many lookups and threads.
void test_partitions_of_any_size() {
  constexpr int64_t kNumRows = 4000;
  const int64_t most = check_partitions(hot_rows(200000, kNumRows), kNumRows, 256, 1);
  CHECK(most < 200000, "%d entries in a thread's own memory", static_cast<int>(most));
  for (const int64_t count : {most - 1, most, most + 1}) {
    for (const int64_t row_bytes : {0, 64, 256}) check_partitions(hot_rows(count, kNumRows), kNumRows, row_bytes, 2);
  }

  Random random(9);
  std::vector<int64_t> rows(4300 * 1024);
  for (int64_t& row : rows) row = static_cast<int64_t>(random.next() % rows.size());
  check_partitions(rows, static_cast<int64_t>(rows.size()), 256, 2000);
}

// ---- threads ----------------------------------------------------------------------------------------------------

constexpr int kNumSteps = 3;

// Together enough bytes for seven threads, enough lookups for several chunks and partitions of each larger table.
std::vector<TableSpec> mixed_tables() {
  constexpr auto kFloat32 = ElementType::kFloat32;
  constexpr auto kZipf = Draw::kZipf;
  return {
      {"float32", ElementType::kFloat32, {20000}, 64, 20000},
      {"float64", ElementType::kFloat64, {30000}, 8, 18000},
      {"bfloat16 of odd width", ElementType::kBFloat16, {9000}, 33, 12000},
#if defined(SPARSEADAM_HAS_FLOAT16)
      {"float16", ElementType::kFloat16, {3000}, 16, 9000},
#endif
      {"no lookups", ElementType::kFloat32, {50}, 16, 0},
      {"element-wise", ElementType::kFloat32, {700, 40}, 1, 30000},
      {"codes of several blocks", ElementType::kFloat64, {4000}, 150, 6000, kZipf, false, MomentType::kCode8},
      {"codes, one second moment",
       kFloat32,
       {5000},
       140,
       6000,
       kZipf,
       false,
       MomentType::kCode8,
       kRowSecond | kRowSteps},
      {"bfloat16 moments of a rounded table",
       ElementType::kBFloat16,
       {6000},
       33,
       8000,
       kZipf,
       false,
       MomentType::kBFloat16,
       kStochasticRounding | kOwesDecay},
      {"largest second moments", kFloat32, {6000}, 24, 8000, kZipf, false, MomentType::kOwn, kAmsgrad | kOwesDecay},
      {"largest ones, one a row",
       ElementType::kFloat64,
       {5000},
       17,
       6000,
       kZipf,
       false,
       MomentType::kOwn,
       kRowSecond | kAmsgrad | kRowSteps},
      {"wide slots, two sparse dimensions", ElementType::kFloat32, {100, 50}, 4, 17000, Draw::kUniform, true},
  };
}

// Each step reaches rows that the one before it could not: known rows and new ones in all of them.
double reach_of(int number) { return (number + 1.0) / kNumSteps; }

// The tables after each step; `check_step` is called with them and the step's number.
template <class CheckStep>
void run_steps(uint64_t seed, InstructionSet set, int num_threads, CheckStep check_step) {
  const std::vector<TableSpec> specs = mixed_tables();
  std::vector<TableData> tables = make_tables(specs, seed);
  for (int number = 0; number < kNumSteps; ++number) {
    const std::vector<Gradient> gradients =
        make_gradients(specs, seed + 100 * static_cast<uint64_t>(number), reach_of(number));
    const Fault bad = step_tables(tables, gradients, set, num_threads);
    CHECK(bad.table == -1, "step %d found a bad index in table %d", number, static_cast<int>(bad.table));
    check_step(tables, number);
  }
}

void test_same_bits() {
  std::vector<std::vector<TableData>> expected;
  run_steps(1, InstructionSet::kPortable, 1, [&](const std::vector<TableData>& tables, int) {
    for (const TableData& table : tables) {
      const int64_t before =
          expected.empty() ? 0 : expected.back()[static_cast<size_t>(&table - tables.data())].num_slots;
      CHECK(table.num_slots > before || table.spec.num_lookups == 0, "%s: no new rows, so not all phases ran",
            table.spec.name);
    }
    expected.push_back(tables);
  });
  const InstructionSet fastest = instruction_sets().back();
  std::vector<std::pair<InstructionSet, int>> others;
  for (const InstructionSet set : instruction_sets()) others.emplace_back(set, 1);
  for (const int num_threads : {2, 3, 7}) others.emplace_back(fastest, num_threads);
  for (const auto& other : others) {
    run_steps(1, other.first, other.second, [&](const std::vector<TableData>& tables, int number) {
      const std::string where = std::string(name_of(other.first)) + ", " + std::to_string(other.second) +
                                " threads, step " + std::to_string(number);
      check_same(tables, expected[static_cast<size_t>(number)], where.c_str());
    });
  }
}

// Steps that share nothing but the kernel's own memory, each with a team of its own.
void test_steps_at_once() {
  constexpr int kNumCallers = 3;
  const InstructionSet fastest = instruction_sets().back();
  std::vector<std::vector<TableData>> found(kNumCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kNumCallers; ++caller) {
    callers.emplace_back([&, caller] {
      run_steps(10000 * static_cast<uint64_t>(caller), fastest, 2,
                [&](const std::vector<TableData>& tables, int) { found[static_cast<size_t>(caller)] = tables; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int caller = 0; caller < kNumCallers; ++caller) {
    std::vector<TableData> expected;
    run_steps(10000 * static_cast<uint64_t>(caller), fastest, 1,
              [&](const std::vector<TableData>& tables, int) { expected = tables; });
    check_same(found[static_cast<size_t>(caller)], expected, "one of several steps at once");
  }
}

// The first bad index of the last table is reported, though its chunk and a later one have others, and nothing has
// changed.
void test_bad_index_changes_nothing() {
  const InstructionSet fastest = instruction_sets().back();
  const std::vector<TableSpec> specs = mixed_tables();
  std::vector<TableData> tables = make_tables(specs, 5);
  std::vector<Gradient> gradients = make_gradients(specs, 5, 0.5);
  CHECK(step_tables(tables, gradients, fastest, 1).table == -1, "first step");
  const std::vector<TableData> before = tables;

  gradients = make_gradients(specs, 6);
  const int64_t last = static_cast<int64_t>(specs.size()) - 1;
  const int64_t num_lookups = specs.back().num_lookups;
  const int64_t size = specs.back().sparse_shape[1];
  for (const int64_t bad_index : {int64_t{-1}, size, INT64_MIN, INT64_MAX}) {
    std::vector<Gradient> bad_gradients = gradients;
    bad_gradients.back().indices[static_cast<size_t>(num_lookups + num_lookups / 2)] = bad_index;
    bad_gradients.back().indices[static_cast<size_t>(num_lookups + num_lookups / 2 + 1)] = -6;  // of the same chunk
    bad_gradients.back().indices[static_cast<size_t>(num_lookups - 1)] = -7;
    for (const int num_threads : {1, 2, 7}) {
      const Fault bad = step_tables(tables, bad_gradients, fastest, num_threads);
      CHECK(bad.table == last && bad.bad_index.lookup == num_lookups / 2 && bad.bad_index.dim == 1 &&
                bad.bad_index.index == bad_index,
            "found table %d, lookup %d, dim %d", static_cast<int>(bad.table), static_cast<int>(bad.bad_index.lookup),
            static_cast<int>(bad.bad_index.dim));
      check_same(tables, before, "after a bad index");
    }
  }

  std::vector<TableData> expected = before;
  CHECK(step_tables(expected, gradients, fastest, 1).table == -1, "step of one thread");
  CHECK(step_tables(tables, gradients, fastest, 7).table == -1, "step after a bad index");
  check_same(tables, expected, "the step after a bad index");
}

// Makes the value of one lookup a NaN, in a table of any type of elements, of which all ones are one.
void spoil(Gradient& gradient, const TableSpec& spec, int64_t lookup) {
  const auto row_bytes = static_cast<size_t>(spec.width) * static_cast<size_t>(element_bytes(spec.element));
  const auto begin = gradient.values.begin() + static_cast<std::ptrdiff_t>(row_bytes) * lookup;
  std::fill(begin, begin + static_cast<std::ptrdiff_t>(element_bytes(spec.element)), static_cast<unsigned char>(0xFF));
}

// Rows whose gradient is not finite are left out, or keep the whole step from being taken: in tables of all kinds.
void test_rows_that_are_not_finite() {
  const InstructionSet fastest = instruction_sets().back();
  const std::vector<TableSpec> specs = mixed_tables();
  const std::vector<TableData> start = make_tables(specs, 8);
  std::vector<Gradient> gradients = make_gradients(specs, 8);
  int64_t first = -1;
  for (size_t t = 0; t < specs.size(); ++t) {
    if (specs[t].num_lookups == 0) continue;
    if (first < 0) first = static_cast<int64_t>(t);
    for (int64_t i = 0; i < specs[t].num_lookups; i += 1000) spoil(gradients[t], specs[t], i);
  }
  std::vector<TableData> expected = start;
  CHECK(step_tables(expected, gradients, InstructionSet::kPortable, 1, NonFinite::kSkip).table == -1, "one thread");
  for (const TableData& table : expected) {
    CHECK((table.num_skipped > 0) == (table.spec.num_lookups > 0), "%s: %d rows skipped", table.spec.name,
          static_cast<int>(table.num_skipped));
  }
  for (const int num_threads : {1, 2, 7}) {
    std::vector<TableData> found = start;
    CHECK(step_tables(found, gradients, fastest, num_threads, NonFinite::kSkip).table == -1, "%d threads", num_threads);
    check_same(found, expected, "after rows were skipped");

    found = start;
    const Fault fault = step_tables(found, gradients, fastest, num_threads, NonFinite::kRefuse);
    CHECK(fault.table == first && fault.bad_index.lookup == -1 && fault.rows.size() == 5 && !fault.rows_are_behind,
          "table %d, %d rows", static_cast<int>(fault.table), static_cast<int>(fault.rows.size()));
    check_same(found, start, "after rows were refused");
  }
}

// A table whose missed steps are replayed, with what the caller keeps of them.
struct ReplayedTable {
  TableData data;
  std::vector<int32_t> clocks;  // [num_rows, 2]
  std::vector<StepNumbers> steps = {StepNumbers{}};
  MissedSteps missed;
  FoundRows found;

  explicit ReplayedTable(const TableSpec& spec) : data(spec, 3), clocks(static_cast<size_t>(2 * num_rows_of(spec))) {}

  Table view() {
    Table table = data.view();
    table.moments.moment_steps = clocks.data();
    table.moments.weight_steps = clocks.data() + 1;
    table.moments.clock_stride = 2;
    return table;
  }
  History history() { return {steps.data(), 0, static_cast<int64_t>(steps.size()) - 1, &missed, &found}; }

  void catch_up_on(const std::vector<int64_t>& rows, InstructionSet set, int num_threads) {
    steps_alone.store(0);
    const Table table = view();
    RowsRead read{&table, rows.data(), static_cast<int64_t>(rows.size()), history(), 0, data.num_slots};
    const BadIndex bad = catch_up(read, set, num_threads);
    CHECK(bad.lookup == -1, "catching up found a bad row at %d", static_cast<int>(bad.lookup));
    data.num_slots = read.num_slots;
  }

  // Returns the step's fault. Weights decay, so that rows without a slot are behind as well.
  Fault step_on(const Gradient& gradient, InstructionSet set, int num_threads) {
    steps_alone.store(0);
    const Table table = view();
    const auto number = static_cast<double>(steps.size());
    const StepScalars scalars{0.9, 0.1, 0.999, 0.001, 0.01, 2.0, 1e-8, 0.999, 0.01, 0.0, 0.0, 0.0, number};
    std::vector<TableStep> tables{{&table, gradient.indices.data(), gradient.values.data(), data.spec.num_lookups,
                                   scalars, NonFinite::kPropagate, data.num_slots, 0, 0.0, history()}};
    const Fault fault = step(tables, set, num_threads);
    if (fault.table >= 0) return fault;
    data.num_slots = tables[0].num_slots;
    StepNumbers next{0.01, 2.0, 0.9, 0.999, 1e-8, std::log(0.9), std::log(0.999), std::log(0.999)};
    next.log_beta1 += steps.back().log_beta1;
    next.log_beta2 += steps.back().log_beta2;
    next.log_decay += steps.back().log_decay;
    steps.push_back(next);
    return fault;
  }
};

// Each step reaches more rows than the one before, some of them behind and some without a slot.
std::unique_ptr<ReplayedTable> run_replay(const TableSpec& spec, InstructionSet set, int num_threads) {
  auto made = std::make_unique<ReplayedTable>(spec);
  ReplayedTable& table = *made;
  for (int number = 0; number < 2 * kNumSteps; ++number) {
    const Gradient gradient = make_gradient(spec, 70 + static_cast<uint64_t>(number), reach_of(number / 2));
    if (number > 0) {
      const std::vector<int64_t> slots_before = table.data.rows;
      const Fault fault = table.step_on(gradient, set, num_threads);
      CHECK(fault.table == 0 && fault.rows_are_behind && table.data.rows == slots_before,
            "step %d was taken on rows that are behind", number);
    }
    table.catch_up_on(gradient.indices, set, num_threads);
    CHECK(table.step_on(gradient, set, num_threads).table == -1, "step %d", number);
  }
  return made;
}

void test_catching_up(const TableSpec& spec) {
  const std::unique_ptr<ReplayedTable> expected = run_replay(spec, InstructionSet::kPortable, 1);
  CHECK(expected->data.num_slots > 0 && expected->data.num_slots < 20000, "%d slots",
        static_cast<int>(expected->data.num_slots));
  for (const InstructionSet set : instruction_sets()) {
    for (const int num_threads : {1, 2, 7}) {
      const std::unique_ptr<ReplayedTable> found = run_replay(spec, set, num_threads);
      check_same({found->data}, {expected->data}, name_of(set));
      CHECK(found->clocks == expected->clocks, "%s, %d threads", name_of(set), num_threads);
    }
  }
}

// Keeps each of a phase's tasks until all have begun, so that as many threads take part.
void wait_for_all(std::atomic<int>& num_begun, int num_tasks) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  num_begun.fetch_add(1, std::memory_order_relaxed);  // relaxed: it must order nothing that the team should
  while (num_begun.load(std::memory_order_relaxed) < num_tasks) {
    CHECK(std::chrono::steady_clock::now() < deadline, "%d of %d tasks have begun in a minute", num_begun.load(),
          num_tasks);
    std::this_thread::yield();
  }
}

// Phases in which every member of the team takes part, for certain: in each a task waits for all others to have begun.
// The plain variables are what the sanitizer watches: written by tasks, read after the phase and by the next one's.
void test_team_phases() {
  constexpr int kNumThreads = 3;
  constexpr int kNumPhases = 50;
  steps_alone.store(0);
  int written[kNumPhases][kNumThreads] = {};
  auto run = [&](Team& team) {
    for (int phase = 0; phase < kNumPhases; ++phase) {
      std::atomic<int> num_begun{0};
      int ran_on[kNumThreads] = {};
      auto task = [&](int64_t index, int thread) {
        wait_for_all(num_begun, kNumThreads);
        const int next = (static_cast<int>(index) + 1) % kNumThreads;
        written[phase][index] = 1 + (phase == 0 ? 0 : written[phase - 1][next]);
        ran_on[thread] += 1;
      };
      team.for_each(kNumThreads, task);
      for (int thread = 0; thread < kNumThreads; ++thread) {
        CHECK(ran_on[thread] == 1, "phase %d: thread %d ran %d tasks", phase, thread, ran_on[thread]);
        CHECK(written[phase][thread] == phase + 1, "phase %d: task %d", phase, thread);
      }
    }
  };
  with_team(kNumThreads, run);
}

// More tasks than threads, short ones, and phases of none: each task once, whoever takes it.
void test_team_takes_each_task_once() {
  constexpr int kNumPhases = 300;
  steps_alone.store(0);
  auto run = [&](Team& team) {
    std::vector<int> counts;
    for (int phase = 0; phase < kNumPhases; ++phase) {
      counts.assign(static_cast<size_t>(phase % 40), 0);
      auto task = [&](int64_t index, int) { counts[static_cast<size_t>(index)] += 1; };
      team.for_each(static_cast<int64_t>(counts.size()), task);
      for (const int count : counts) CHECK(count == 1, "phase %d: a task ran %d times", phase, count);
    }
  };
  with_team(4, run);
}

// Whichever threads they ran on: the phase ends first, and the next one is as good as any.
void test_team_passes_on_what_tasks_throw() {
  constexpr int64_t kNumTasks = 64;
  steps_alone.store(0);
  auto run = [&](Team& team) {
    std::atomic<int> num_done{0};
    auto task = [&](int64_t index, int) {
      num_done.fetch_add(1);
      if (index % 2 == 1) throw std::bad_alloc();
    };
    bool has_thrown = false;
    try {
      team.for_each(kNumTasks, task);
    } catch (const std::bad_alloc&) {
      has_thrown = true;
    }
    CHECK(has_thrown && num_done.load() == kNumTasks, "thrown: %d, tasks done: %d", has_thrown, num_done.load());
    auto good_task = [&](int64_t, int) { num_done.fetch_add(1); };
    team.for_each(kNumTasks, good_task);
    CHECK(num_done.load() == 2 * kNumTasks, "tasks done: %d", num_done.load());
  };
  with_team(4, run);
}

// What the step itself throws, between its phases or out of one, reaches the caller of a team of any size.
void test_what_a_step_throws_is_not_lost() {
  for (const int num_threads : {1, 2, 4}) {
    for (const bool is_in_task : {false, true}) {
      steps_alone.store(0);
      auto run = [&](Team& team) {
        auto task = [&](int64_t, int) {
          if (is_in_task) throw std::bad_alloc();
        };
        team.for_each(8, task);
        if (!is_in_task) throw std::bad_alloc();
      };
      bool has_thrown = false;
      try {
        with_team(num_threads, run);
      } catch (const std::bad_alloc&) {
        has_thrown = true;
      }
      CHECK(has_thrown, "%d threads, in a task: %d", num_threads, is_in_task);
    }
  }
}

// Helpers round as the caller does while they help, and as before afterwards: they are the threads of others.
void test_helpers_take_the_callers_environment_and_give_it_back() {
  constexpr int kNumThreads = 3;
  steps_alone.store(0);
  const int before = std::fegetround();
  std::fesetround(FE_UPWARD);
  int rounding[kNumThreads] = {};
  auto run = [&](Team& team) {
    std::atomic<int> num_begun{0};
    auto task = [&](int64_t, int thread) {
      rounding[thread] = std::fegetround();
      wait_for_all(num_begun, kNumThreads);
    };
    team.for_each(kNumThreads, task);
  };
  with_team(kNumThreads, run);
  std::fesetround(before);
  for (const int found : rounding) CHECK(found == FE_UPWARD, "a thread rounded by mode %d", found);
  std::atomic<int> num_changed{0};
  fork_join(kNumThreads, [&](int) { num_changed.fetch_add(std::fegetround() == before ? 0 : 1); });
  CHECK(num_changed.load() == 0, "%d threads round otherwise than before", num_changed.load());
}

// ---- rounding ---------------------------------------------------------------------------------------------------

float rounded_to_bfloat16(float value, uint32_t random) {
  BFloat16 to;
  narrow_stochastic(value, random, &to);
  return widen(to);
}

template <class AnyCode>
void test_code_at_the_ends_of_chance() {
  for (const uint32_t random : {uint32_t{0}, ~uint32_t{0}}) {
    for (uint32_t code = 0; code <= AnyCode::kLargest; ++code) {
      const uint32_t found = AnyCode::encode(AnyCode::decode(code), random);
      CHECK(found == code, "code %u became %u by %u", code, found, random);
    }
    // A magnitude times the reciprocal of the largest may come out above what the largest code stands for.
    const uint32_t above = AnyCode::encode(std::nextafter(AnyCode::kTop, 2.0f), random);
    CHECK(above == AnyCode::kLargest, "code %u by %u", above, random);
  }
}

// Bits that a run meets once in millions: what can be stored stays, and nothing is carried past the largest number.
void test_rounding_at_the_ends_of_chance() {
  test_code_at_the_ends_of_chance<ExpAvgCode>();
  test_code_at_the_ends_of_chance<ExpAvgSqCode>();
  CHECK(!goes_up(0.0f, 0), "a whole number went up");
  CHECK(goes_up(0x1p-24f, 0) && !goes_up(1.0f - 0x1p-24f, ~uint32_t{0}), "chance has other ends");
  constexpr float kLargestBFloat16 = 0x1.FEp127f;
  constexpr float kLargestFloat = std::numeric_limits<float>::max();
  for (const uint32_t random : {uint32_t{0}, ~uint32_t{0}}) {
    for (const float stored : {0.0f, -0.0f, 1.0f, -0x1.02p-126f, kLargestBFloat16, -kLargestBFloat16}) {
      CHECK(bits_of(rounded_to_bfloat16(stored, random)) == bits_of(stored), "%g by %u", stored, random);
    }
    CHECK(std::isinf(rounded_to_bfloat16(kLargestFloat, random)), "not to the nearest, by %u", random);
    for (const uint32_t nan : {0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu}) {
      CHECK(std::isnan(rounded_to_bfloat16(from_bits(nan), random)), "%x became a number", nan);
    }
  }
  CHECK(rounded_to_bfloat16(1.0f + 0x1p-23f, ~uint32_t{0}) == 1.0f + 0x1p-7f, "the least above a number never goes up");
#if defined(SPARSEADAM_HAS_FLOAT16)
  for (const uint32_t random : {uint32_t{0}, ~uint32_t{0}}) {
    for (const float stored : {0.0f, -0.0f, 0x1p-24f, -0x3p-24f, 0x1p-14f, 1.0f, 65504.0f, -65504.0f}) {
      Float16 to;
      narrow_stochastic(stored, random, &to);
      CHECK(bits_of(widen(to)) == bits_of(stored), "%g by %u", stored, random);
    }
  }
#endif
}

// A run's steps, in which the learning rate and the weights decay as they are told to.
std::vector<StepNumbers> numbers_of_steps(int64_t first, int64_t count, double beta1, double beta2,
                                          double (*rate_at)(int64_t), double decay) {
  std::vector<StepNumbers> steps = {StepNumbers{}};
  for (int64_t j = first; j < first + count; ++j) {
    const auto t = static_cast<double>(j);
    StepNumbers step{rate_at(j) / (1.0 - std::pow(beta1, t)),
                     1.0 / std::sqrt(1.0 - std::pow(beta2, t)),
                     beta1,
                     beta2,
                     1e-8,
                     steps.back().log_beta1 + std::log(beta1),
                     steps.back().log_beta2 + std::log(beta2),
                     steps.back().log_decay + std::log(decay)};
    steps.push_back(step);
  }
  return steps;
}

// Missed steps are in few blocks, and these leave out no more than they may: otherwise rows are walked step by step,
// which is right as well, but slow.
void test_missed_steps_are_in_few_blocks() {
  struct Run {
    double beta1, beta2;
    int64_t first;
    double tolerance;
    size_t most_blocks;
  };
  const auto constant = [](int64_t) { return 1e-3; };
  const auto warm_up = [](int64_t j) { return 1e-3 * std::min(1.0, static_cast<double>(j) / 50.0); };
  const auto off_and_on = [](int64_t j) { return j / 40 % 2 == 0 ? 0.0 : 1e-3; };
  const auto jumping = [](int64_t j) { return j / 100 % 2 == 0 ? 1e-7 : 1e-3; };
  for (const Run& run : {Run{0.9, 0.999, 3000, kTolerance<float>, 1}, Run{0.9, 0.999, 20000, kTolerance<double>, 1},
                         Run{0.9, 0.999, 1, kTolerance<float>, 12}, Run{0.9, 0.999, 1, kTolerance<double>, 20},
                         Run{0.9, 0.95, 1, kTolerance<float>, 20}, Run{0.5, 0.9, 1, kTolerance<double>, 16},
                         Run{0.95, 0.999, 1, kTolerance<float>, 12}}) {
    for (double (*rate_at)(int64_t) : {+constant, +warm_up, +off_and_on, +jumping}) {
      for (const double decay : {1.0, 0.999, 0.9}) {
        const std::vector<StepNumbers> steps = numbers_of_steps(run.first, 600, run.beta1, run.beta2, rate_at, decay);
        MissedSteps missed;
        missed.advance({steps.data(), 0, static_cast<int64_t>(steps.size()) - 1, nullptr, nullptr}, run.tolerance);
        const size_t spare = rate_at == +constant && decay == 1.0 ? 0 : run.most_blocks;
        for (int64_t s = 0; s < static_cast<int64_t>(steps.size()); ++s) {
          const MissedSums& sums = missed.at(s);
          // Where weights decay as fast as moves do, none of these matters less than the first one.
          CHECK(decay == 0.9 || 1 + sums.more.size() <= run.most_blocks + spare, "betas %g, %g: %d blocks for step %d",
                run.beta1, run.beta2, static_cast<int>(1 + sums.more.size()), static_cast<int>(run.first + s));
          CHECK(sums.left_out <= run.tolerance * sums.total, "betas %g, %g: %g left out of %g for step %d", run.beta1,
                run.beta2, sums.left_out, sums.total, static_cast<int>(run.first + s));
        }
      }
    }
  }
}

void test_threads() {
  test_rounding_at_the_ends_of_chance();
  test_partitions_of_any_size();
  test_what_a_step_throws_is_not_lost();
  test_helpers_take_the_callers_environment_and_give_it_back();
  test_team_phases();
  test_team_takes_each_task_once();
  test_team_passes_on_what_tasks_throw();
  test_same_bits();
  test_steps_at_once();
  test_bad_index_changes_nothing();
  test_missed_steps_are_in_few_blocks();
  test_rows_that_are_not_finite();
  test_catching_up({"replayed", ElementType::kFloat32, {20000}, 32, 20000});
  test_catching_up({"replayed and rounded",
                    ElementType::kBFloat16,
                    {20000},
                    33,
                    20000,
                    Draw::kZipf,
                    false,
                    MomentType::kOwn,
                    kStochasticRounding});
  std::printf("step_test threads: all checks hold\n");
}

// ---- call -------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  std::vector<TableSpec> tables;
  bool are_rows_new = false;
  bool is_index_bad = false;
};

std::vector<Case> cases() {
  constexpr auto kFloat32 = ElementType::kFloat32;
  const TableSpec zipf{"zipf", kFloat32, {20000}, 64, 16384};
  const TableSpec uniform{"uniform", kFloat32, {20000}, 64, 16384, Draw::kUniform};
  return {
      {"zipf-64", {zipf}},
      {"uniform-64", {uniform}},
      {"new-rows-64", {uniform}, true},
      {"bfloat16-64", {{"bfloat16", ElementType::kBFloat16, {20000}, 64, 16384}}},
      {"small-tables-16", std::vector<TableSpec>(26, {"small", kFloat32, {1000}, 16, 256})},
      {"element-wise", {{"element-wise", kFloat32, {500, 80}, 1, 32768}}},
      {"bad-index", {zipf}, false, true},
  };
}

// AVX-512 is left out: valgrind does not know it.
std::vector<InstructionSet> counted_sets() {
  std::vector<InstructionSet> sets = instruction_sets();
  sets.erase(std::remove(sets.begin(), sets.end(), InstructionSet::kAvx512), sets.end());
  return sets;
}

void list_cases() {
  for (const Case& listed : cases()) {
    for (const InstructionSet set : counted_sets()) std::printf("%s %s\n", listed.name, name_of(set));
  }
}

}  // namespace

// Counting is switched on where this function is entered and off where it is left (callgrind's --toggle-collect), so
// it has a plain name and is never inlined.
extern "C" __attribute__((noinline)) void counted_call(std::vector<TableStep>* tables, InstructionSet set, Fault* bad) {
  *bad = step(*tables, set, 1);
}

namespace {

void call(const Case& called, InstructionSet set) {
  std::vector<TableData> tables = make_tables(called.tables, 7);
  std::vector<Gradient> gradients = make_gradients(called.tables, 7);
  // A step beforehand reserves the kernel's memory and gives the rows their slots; where rows are to be new, a copy's.
  std::vector<TableData> untouched = tables;
  CHECK(step_tables(tables, gradients, set, 1).table == -1, "first step");
  if (called.are_rows_new) tables = untouched;
  if (called.is_index_bad) gradients.back().indices.back() = -1;

  PreparedStep prepared = prepare(tables, gradients);
  Fault bad;
  counted_call(&prepared.tables, set, &bad);
  CHECK((bad.table >= 0) == called.is_index_bad, "table %d", static_cast<int>(bad.table));
}

int call_named(const std::string& name, const std::string& set_name) {
  for (const Case& called : cases()) {
    for (const InstructionSet set : counted_sets()) {
      if (name != called.name || set_name != name_of(set)) continue;
      call(called, set);
      return 0;
    }
  }
  std::fprintf(stderr, "step_test: no case '%s %s' on this processor; `step_test cases` lists them\n", name.c_str(),
               set_name.c_str());
  return 2;
}

}  // namespace

}  // namespace sparseadam

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 1 && arguments[0] == "threads") {
    sparseadam::test_threads();
    return 0;
  }
  if (arguments.size() == 1 && arguments[0] == "cases") {
    sparseadam::list_cases();
    return 0;
  }
  if (arguments.size() == 3 && arguments[0] == "call") return sparseadam::call_named(arguments[1], arguments[2]);
  std::fprintf(stderr, "usage: step_test threads | cases | call CASE SET\n");
  return 2;
}
