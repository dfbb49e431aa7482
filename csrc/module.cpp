// Python bindings, nothing else. Memory arrives as addresses: a torch tensor costs more than a microsecond to convert
// through DLPack and an address 50 ns, in a call whose fixed cost is a few microseconds a table. The price is that the
// one caller, sparseadam/update/native.py, answers for dtypes, strides and lifetimes; nothing is ever converted or
// copied on the way, so what is written is the caller's own memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "catch_up.h"
#include "coalesce.h"
#include "found_rows.h"
#include "initial.h"
#include "steady_step.h"
#include "step.h"
#include "thread_team.h"

namespace nb = nanobind;
using namespace sparseadam;

namespace {

template <class T>
T* at_address(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT: the address is a tensor's data_ptr()
}

const std::vector<std::pair<std::string, ElementType>> kElementTypes = {{"float32", ElementType::kFloat32},
                                                                        {"float64", ElementType::kFloat64},
                                                                        {"bfloat16", ElementType::kBFloat16},
                                                                        {"float16", ElementType::kFloat16}};
const std::vector<std::pair<std::string, Distribution>> kDistributions = {{"normal", Distribution::kNormal},
                                                                          {"uniform", Distribution::kUniform}};
const std::vector<std::pair<std::string, InstructionSet>> kInstructionSets = {
    {"portable", InstructionSet::kPortable}, {"avx2", InstructionSet::kAvx2}, {"avx512", InstructionSet::kAvx512}};

const std::vector<std::pair<std::string, MomentType>> kMomentTypes = {
    {"own", MomentType::kOwn}, {"bfloat16", MomentType::kBFloat16}, {"uint8", MomentType::kCode8}};

template <class T>
T by_name(const std::vector<std::pair<std::string, T>>& names, const std::string& name) {
  for (const auto& [known, value] : names) {
    if (known == name) return value;
  }
  throw std::invalid_argument("unknown name " + name);
}

std::vector<std::string> element_types() {
  std::vector<std::string> names;
  for (const auto& [name, element] : kElementTypes) {
    if (row_kernels_for(element, {}, false, InstructionSet::kPortable).update_rows != nullptr) names.push_back(name);
  }
  return names;
}

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const InstructionSet found : instruction_sets()) {
    for (const auto& [name, instruction_set] : kInstructionSets) {
      if (instruction_set == found) names.push_back(name);
    }
  }
  return names;
}

int64_t count_rows(const std::vector<int64_t>& sparse_shape) {
  int64_t num_rows = 1;
  for (const int64_t size : sparse_shape) num_rows *= size;
  return num_rows;
}

MomentMemory make_moments(const std::string& type, bool one_exp_avg_sq_a_row, uintptr_t exp_avg, uintptr_t exp_avg_sq,
                          uintptr_t max_exp_avg_sq, int64_t exp_avg_stride, int64_t exp_avg_sq_stride,
                          uintptr_t exp_avg_scale, uintptr_t exp_avg_sq_scale, int64_t scale_stride,
                          uintptr_t row_steps, uintptr_t paid_log_decay, uintptr_t moment_steps, uintptr_t weight_steps,
                          int64_t clock_stride) {
  return {by_name(kMomentTypes, type),
          one_exp_avg_sq_a_row,
          at_address<void>(exp_avg),
          at_address<void>(exp_avg_sq),
          at_address<void>(max_exp_avg_sq),
          exp_avg_stride,
          exp_avg_sq_stride,
          at_address<float>(exp_avg_scale),
          at_address<float>(exp_avg_sq_scale),
          scale_stride,
          at_address<int32_t>(row_steps),
          at_address<double>(paid_log_decay),
          at_address<int32_t>(moment_steps),
          at_address<int32_t>(weight_steps),
          clock_stride};
}

Table make_table(uintptr_t table, int64_t table_stride, const std::string& element_type,
                 std::vector<int64_t> sparse_shape, int64_t width, const MomentMemory& moments, uintptr_t slot_of_row,
                 bool wide_slots, uintptr_t rows, bool stochastic_rounding, uint64_t stream, uintptr_t row_names) {
  const int64_t num_rows = count_rows(sparse_shape);
  return {at_address<void>(table),
          table_stride,
          by_name(kElementTypes, element_type),
          std::move(sparse_shape),
          num_rows,
          width,
          moments,
          at_address<void>(slot_of_row),
          wide_slots,
          at_address<int64_t>(rows),
          stochastic_rounding,
          stream,
          at_address<const int64_t>(row_names)};
}

// (table, address of indices, address of values, number of lookups, scalars, counters, history)
using StepTuple = std::tuple<const Table*, uintptr_t, uintptr_t, int64_t, ScalarArray, Counters, HistoryTuple>;
// (table, (dimension, index) if an index is out of range, rows that are refused, whether because they are behind)
using FaultTuple = std::tuple<int64_t, std::optional<std::pair<int64_t, int64_t>>, std::vector<int64_t>, bool>;

std::optional<FaultTuple> run_step(const std::vector<StepTuple>& tuples, const std::string& instruction_set,
                                   int num_threads) {
  std::vector<TableStep> tables;
  tables.reserve(tuples.size());
  for (const auto& [table, indices, values, num_lookups, scalars, counters, history] : tuples) {
    tables.push_back(make_table_step(*table, at_address<const int64_t>(indices), at_address<const void>(values),
                                     num_lookups, scalars, counters, make_history(history)));
  }
  const InstructionSet chosen = by_name(kInstructionSets, instruction_set);
  Fault fault;
  {
    const nb::gil_scoped_release release;
    fault = step(tables, chosen, num_threads);
  }
  if (fault.table >= 0) {
    std::optional<std::pair<int64_t, int64_t>> bad_index;
    if (fault.bad_index.lookup >= 0) bad_index = {fault.bad_index.dim, fault.bad_index.index};
    return FaultTuple{fault.table, bad_index, std::move(fault.rows), fault.rows_are_behind};
  }
  for (size_t i = 0; i < tables.size(); ++i) advance(std::get<Counters>(tuples[i]), tables[i]);
  return std::nullopt;
}

bool run_catch_up(const Table& table, uintptr_t rows, int64_t num_rows_read, const Counters& counters,
                  const HistoryTuple& history, uint64_t seed, const std::string& instruction_set, int num_threads) {
  int64_t& num_slots = at_address<int64_t>(counters.first)[1];
  RowsRead read{&table, at_address<const int64_t>(rows), num_rows_read, make_history(history), seed, num_slots};
  const InstructionSet chosen = by_name(kInstructionSets, instruction_set);
  BadIndex bad;
  {
    const nb::gil_scoped_release release;
    bad = catch_up(read, chosen, num_threads);
  }
  if (bad.lookup >= 0) return false;
  num_slots = read.num_slots;  // before Python can answer a signal: rows have these slots already
  return true;
}

std::unique_ptr<Coalescing> make_coalescing(uintptr_t indices, const std::vector<int64_t>& sparse_shape,
                                            int64_t num_lookups, int num_threads) {
  const int64_t num_rows = count_rows(sparse_shape);
  const nb::gil_scoped_release release;
  const Lookups lookups{at_address<const int64_t>(indices), sparse_shape.data(),
                        static_cast<int64_t>(sparse_shape.size()), num_lookups};
  return std::make_unique<Coalescing>(lookups, num_rows, num_threads);
}

void sum_lookups(const Coalescing& rows_of, uintptr_t values, int64_t width, const std::string& element_type,
                 const std::string& instruction_set, uintptr_t rows, uintptr_t sums, int num_threads) {
  const ElementType element = by_name(kElementTypes, element_type);
  const InstructionSet chosen = by_name(kInstructionSets, instruction_set);
  const nb::gil_scoped_release release;
  rows_of.sum(at_address<const void>(values), width, element, chosen, at_address<int64_t>(rows), at_address<void>(sums),
              num_threads);
}

int visit_steady_step(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<SteadyStep>(self)->visit_objects(visit, arg) : 0;
}

int release_steady_step(PyObject* self) {
  nb::inst_ptr<SteadyStep>(self)->release_objects();
  return 0;
}

PyType_Slot steady_step_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&visit_steady_step)},
                                   {Py_tp_clear, reinterpret_cast<void*>(&release_steady_step)},
                                   {0, nullptr}};

std::optional<SteadyStep> make_steady_step(nb::handle tensor_type) {
  const ReadTensor reader = find_reader(tensor_type);
  if (reader == nullptr) return std::nullopt;
  return SteadyStep(reader);
}

void write_initial_values(const std::string& distribution, double scale, uint64_t seed, uintptr_t rows,
                          int64_t num_rows, int64_t width, const std::string& element_type, uintptr_t values) {
  const Distribution drawn = by_name(kDistributions, distribution);
  const ElementType element = by_name(kElementTypes, element_type);
  const nb::gil_scoped_release release;
  if (element == ElementType::kFloat64) {
    initial_values(drawn, scale, seed, at_address<const int64_t>(rows), num_rows, width, at_address<double>(values));
  } else {
    initial_values(drawn, scale, seed, at_address<const int64_t>(rows), num_rows, width, at_address<float>(values));
  }
}

}  // namespace

NB_MODULE(_native, m) {
  watch_for_forks();
  // An optimizer that steps from its parameters' hooks lives until the interpreter ends, and so do its handles.
  nb::set_leak_warnings(false);
  m.doc() = "The sparse Adam step on the CPU. Private: called by sparseadam.update.native alone.";
  nb::class_<MomentMemory>(m, "MomentMemory", "Where a table's moments are, by address; 0 for those it does without.")
      .def(nb::new_(&make_moments), nb::kw_only(), nb::arg("type"), nb::arg("one_exp_avg_sq_a_row"), nb::arg("exp_avg"),
           nb::arg("exp_avg_sq"), nb::arg("max_exp_avg_sq"), nb::arg("exp_avg_stride"), nb::arg("exp_avg_sq_stride"),
           nb::arg("exp_avg_scale"), nb::arg("exp_avg_sq_scale"), nb::arg("scale_stride"), nb::arg("row_steps"),
           nb::arg("paid_log_decay"), nb::arg("moment_steps"), nb::arg("weight_steps"), nb::arg("clock_stride"));
  nb::class_<Table>(m, "Table", "A table and its compact moments, by address.")
      .def(nb::new_(&make_table), nb::kw_only(), nb::arg("table"), nb::arg("table_stride"), nb::arg("element_type"),
           nb::arg("sparse_shape"), nb::arg("width"), nb::arg("moments"), nb::arg("slot_of_row"), nb::arg("wide_slots"),
           nb::arg("rows"), nb::arg("stochastic_rounding"), nb::arg("stream"), nb::arg("row_names"));
  m.def("element_types", &element_types, "Names of the table dtypes that this build can update.");
  m.def("instruction_sets", &instruction_set_names, "Names of the instruction sets at hand, slowest first.");
  m.def("fits", &Partitioning::fits, nb::arg("num_rows"), nb::arg("num_lookups"),
        "Whether a step of this size fits the packed (row, position) entries.");
  m.def("step", &run_step, nb::arg("tables"), nb::arg("instruction_set"), nb::arg("num_threads"),
        "Update all tables and their counters (addresses of step, num_slots and num_skipped, and of log_decay), or\n"
        "none. Returns None, or why not: (table, (dimension, index) or None, rows that are refused, whether because\n"
        "they are behind; otherwise their gradient is not finite). A history is (address, base, number of steps,\n"
        "its cache), (0, 0, 0, None) where missed steps are not replayed.");
  nb::class_<HistoryCache>(m, "HistoryCache",
                           "What the steps of one history add up to, taken in as catch_up needs it, and what it found\n"
                           "of the rows last read.")
      .def(nb::init<>());
  m.def("catch_up", &run_catch_up, nb::kw_only(), nb::arg("table"), nb::arg("rows"), nb::arg("num_rows_read"),
        nb::arg("counters"), nb::arg("history"), nb::arg("seed"), nb::arg("instruction_set"), nb::arg("num_threads"),
        "Move the rows that are behind, and count the slots that some may have got; or none of them. Returns whether\n"
        "all rows are inside the table.");
  nb::class_<Coalescing>(m, "Coalescing", "The rows of a gradient's lookups, sorted, which are not kept alive.")
      .def(nb::new_(&make_coalescing), nb::kw_only(), nb::arg("indices"), nb::arg("sparse_shape"),
           nb::arg("num_lookups"), nb::arg("num_threads"))
      .def_prop_ro("num_touched", &Coalescing::num_touched)
      .def_prop_ro("has_bad_index", [](const Coalescing& self) { return self.bad_index().lookup >= 0; })
      .def("sum", &sum_lookups, nb::kw_only(), nb::arg("values"), nb::arg("width"), nb::arg("element_type"),
           nb::arg("instruction_set"), nb::arg("rows"), nb::arg("sums"), nb::arg("num_threads"),
           "Write the touched rows and the sums of their values, in the dtype of their moments.");
  nb::class_<SteadyStep>(m, "SteadyStep", nb::type_slots(steady_step_slots),
                         "A step whose tables all look as they did when they were listed here.")
      .def("add_group", &SteadyStep::add_group)
      .def(
          "add_table",
          [](SteadyStep& self, nb::object parameter, nb::object native_table, Counters counters,
             nb::object history_of) {
            self.add_table(std::move(parameter), std::move(native_table), counters, std::move(history_of));
          },
          nb::kw_only(), nb::arg("parameter"), nb::arg("native_table"), nb::arg("counters"),
          nb::arg("history_of").none())
      .def("add_idle", &SteadyStep::add_idle, nb::arg("parameter"))
      .def("add_dense", &SteadyStep::add_dense, nb::arg("parameter"), nb::arg("state"),
           nb::sig("def add_dense(self, parameter: object, state: dict[str, object]) -> None"))
      .def("remember_state", &SteadyStep::remember_state, nb::arg("state"),
           nb::sig("def remember_state(self, state: dict[object, object]) -> None"))
      .def("remember_options", &SteadyStep::remember_options, nb::arg("groups"),
           nb::sig("def remember_options(self, groups: list[dict[str, object]]) -> None"))
      .def("are_options_as_before", &SteadyStep::are_options_as_before, nb::arg("groups"),
           nb::sig("def are_options_as_before(self, groups: list[dict[str, object]]) -> bool"))
      .def(
          "run",
          [](const SteadyStep& self, nb::dict state, nb::list groups, nb::list scalars_at, nb::callable report_writes,
             const std::string& instruction_set, int num_threads) {
            return self.run(std::move(state), std::move(groups), std::move(scalars_at), std::move(report_writes),
                            by_name(kInstructionSets, instruction_set), num_threads);
          },
          nb::arg("state"), nb::arg("groups"), nb::arg("scalars_at"), nb::arg("report_writes"),
          nb::arg("instruction_set"), nb::arg("num_threads"),
          nb::sig("def run(self, state: dict[object, object], groups: list[object], scalars_at: list[object], "
                  "report_writes: object, instruction_set: str, num_threads: int) -> list[object] | None"),
          "Step all tables that have a gradient and report those that were written: the gradients of the dense\n"
          "parameters (None where there is none); or None and nothing written where something is not as it was.");
  m.def("initial_values", &write_initial_values, nb::kw_only(), nb::arg("distribution"), nb::arg("scale"),
        nb::arg("seed"), nb::arg("rows"), nb::arg("num_rows"), nb::arg("width"), nb::arg("element_type"),
        nb::arg("values"), "Write the initial values of rows, in float32 or float64.");
  m.def("steady_step", &make_steady_step, nb::arg("tensor_type"),
        "An empty SteadyStep, or None where the tensors of this type cannot be read through DLPack's C interface.");
}
