// A step whose tables all look as they did when they were last checked, read without a line of Python for each.
//
// The general step takes some four microseconds of Python for each further table: reading its gradient, comparing the
// table with what was checked before, building the arguments. This file does the same reading through DLPack's C
// interface (a tensor's memory, shape and strides in some 20 ns), which newer versions of PyTorch offer. It decides
// nothing: whatever is not as it was when `update/native.py` listed the tables here is left to the general step, which
// checks and explains.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "found_rows.h"
#include "history.h"
#include "step.h"

namespace sparseadam {

// Fills in the memory, shape and strides of a Python tensor, owning none of it; 0, or -1 with a Python error set.
using ReadTensor = int (*)(void* tensor, nanobind::dlpack::dltensor* out);

// The reader that a tensor type offers, or nullptr.
ReadTensor find_reader(nanobind::handle tensor_type);

// The numbers of a table's step as Python gives them: the fields of StepScalars in their order, then NonFinite.
using ScalarArray = std::array<double, 14>;
// Addresses of a table's counters: step, num_slots and num_skipped as three int64, and log_decay as a double.
using Counters = std::pair<uintptr_t, uintptr_t>;

// What is kept for one history from call to call.
struct HistoryCache {
  MissedSteps missed;
  FoundRows found;
};

// (address, base, number of steps, cache) of a history; 0 and None where missed steps are not replayed
using HistoryTuple = std::tuple<uintptr_t, int64_t, int64_t, HistoryCache*>;
History make_history(const HistoryTuple& tuple);

TableStep make_table_step(const Table& table, const int64_t* indices, const void* values, int64_t num_lookups,
                          const ScalarArray& scalars, const Counters& counters, const History& history);
// After a step.
void advance(const Counters& counters, const TableStep& done);

class SteadyStep {
 public:
  explicit SteadyStep(ReadTensor read_tensor) : read_tensor_(read_tensor) {}

  void add_group() { groups_.emplace_back(); }

  // Append a parameter to the last group: one that has moments; one that has none, which must not have a gradient
  // either when the step is taken; or one with dense gradients and a dict of tensors for its state, which is only
  // looked at, for the caller to step. `history_of` gives a table's HistoryTuple, and is None where missed steps are
  // not replayed; the caller appends each step to the history.
  void add_table(nanobind::object parameter, nanobind::object native_table, const Counters& counters,
                 nanobind::object history_of);
  void add_idle(nanobind::object parameter);
  void add_dense(nanobind::object parameter, nanobind::dict state);

  // Take note of the optimizer's state: when the step is taken it must have the same objects under the same keys.
  void remember_state(nanobind::dict state);

  // Take note of the groups with their options, and tell whether they still have the very objects under the same keys.
  // Which parameters they list does not matter here. They never have where an option can change in place.
  void remember_options(nanobind::list groups);
  bool are_options_as_before(nanobind::list groups) const;

  // Steps all tables that have a gradient and returns the gradients of the dense parameters (None where there is none);
  // or None where something is not as it was, or an index out of range: then nothing was written. `groups` are the
  // groups' lists of parameters as they are now, and `scalars_at` gives the numbers of each group's step.
  // `report_writes` is told the parameters that were written. From here and not from Python, where a KeyboardInterrupt
  // that came meanwhile would be raised before.
  nanobind::object run(nanobind::dict state, nanobind::list groups, nanobind::list scalars_at,
                       nanobind::callable report_writes, InstructionSet instruction_set, int num_threads) const;

  // For Python's garbage collector: a parameter may hold the optimizer, which holds this, which holds the parameter.
  int visit_objects(visitproc visit, void* arg) const;
  void release_objects();

 private:
  struct Look {
    void* data = nullptr;
    nanobind::dlpack::device device{};
    nanobind::dlpack::dtype dtype{};
    std::vector<int64_t> shape, strides;
    bool has_form_of(const nanobind::dlpack::dltensor& tensor) const;
    bool fits(const nanobind::dlpack::dltensor& tensor) const;
    bool is_like(const nanobind::dlpack::dltensor& tensor) const;  // at any address
  };
  struct Part {
    nanobind::object tensor;
    Look look;
  };
  struct Parameter {
    nanobind::object object, native_table;
    const Table* table = nullptr;
    Counters counters{};
    nanobind::object history_of;
    Look look;
    nanobind::object dense_state;  // of a parameter with dense gradients, as are its parts
    std::vector<Part> parts;
  };
  // What a dict holds, in its own order.
  class DictLook {
   public:
    DictLook() = default;
    explicit DictLook(nanobind::dict dict);
    bool is_as_before(nanobind::dict dict) const;
    int visit_objects(visitproc visit, void* arg) const;

   private:
    std::vector<std::pair<nanobind::object, nanobind::object>> entries_;
  };
  struct Reading;  // what a run collects

  bool read_group(const std::vector<Parameter>& group, nanobind::handle parameters, nanobind::handle scalars_at,
                  Reading& reading) const;
  bool read_table(const Parameter& parameter, nanobind::handle gradient, Reading& reading) const;
  bool read_lookups(const Parameter& parameter, nanobind::handle indices, nanobind::handle values,
                    const ScalarArray& scalars, Reading& reading) const;
  bool is_dense_as_before(const Parameter& parameter, nanobind::handle gradient) const;
  bool looks_like(nanobind::handle tensor, const Look& look) const;
  Look look_at(nanobind::handle tensor) const;

  bool read(nanobind::handle object, nanobind::dlpack::dltensor& tensor) const;

  ReadTensor read_tensor_;
  std::vector<std::vector<Parameter>> groups_;
  DictLook state_;
  std::vector<DictLook> options_;
};

}  // namespace sparseadam
