#include "steady_step.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace nb = nanobind;

namespace sparseadam {

namespace {

// DLPack's table of functions, major version 1: what stands before the one that is used here, and that one.
struct DLPackVersion {
  uint32_t major, minor;
};
struct DLPackFunctions {
  DLPackVersion version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  ReadTensor tensor_from_object;
};
constexpr uint32_t kDLPackMajor = 1;

// Names of attributes and methods, made once.
struct Names {
  nb::object grad = nb::steal(PyUnicode_InternFromString("grad"));
  nb::object indices = nb::steal(PyUnicode_InternFromString("_indices"));
  nb::object values = nb::steal(PyUnicode_InternFromString("_values"));
  nb::object params = nb::steal(PyUnicode_InternFromString("params"));
};
const Names& names() {
  static const Names* made = new Names();  // never destroyed: the interpreter may be gone before it
  return *made;
}

// object.name(), or an empty object where it raised, as it does on a gradient that is not a sparse one.
nb::object call_method(nb::handle object, nb::handle name) {
  PyObject* arguments[1] = {object.ptr()};
  nb::object result = nb::steal(PyObject_VectorcallMethod(name.ptr(), arguments, 1, nullptr));
  if (!result.is_valid()) PyErr_Clear();
  return result;
}

bool is_cpu(const nb::dlpack::dltensor& tensor) { return tensor.device.device_type == nb::device::cpu::value; }

bool is_int64(const nb::dlpack::dltensor& tensor) {
  return tensor.dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int) && tensor.dtype.bits == 64;
}

bool is_contiguous(const nb::dlpack::dltensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t dim = tensor.ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] != 1 && tensor.strides[dim] != expected) return false;
    expected *= tensor.shape[dim];
  }
  return true;
}

void* memory_of(const nb::dlpack::dltensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// Whether an object is of a type that cannot change: a tensor can, that holds an option's number, or a list of betas.
bool is_fixed(nb::handle value) {
  PyObject* object = value.ptr();
  if (PyTuple_CheckExact(object)) {
    for (nb::handle part : nb::borrow<nb::tuple>(value)) {
      if (!is_fixed(part)) return false;
    }
    return true;
  }
  return object == Py_None || PyBool_Check(object) || PyFloat_CheckExact(object) || PyLong_CheckExact(object) ||
         PyUnicode_CheckExact(object);
}

bool has_fixed_options(nb::dict group) {
  for (const auto& [name, value] : group) {
    if (!is_fixed(value) && !name.is(names().params)) return false;
  }
  return true;
}

enum Counter { kStep, kNumSlots, kNumSkipped };
int64_t* counter_at(const Counters& counters, Counter which) {
  return reinterpret_cast<int64_t*>(counters.first) + which;  // NOLINT: an address that Python gave
}
double* log_decay_at(const Counters& counters) {
  return reinterpret_cast<double*>(counters.second);  // NOLINT: as above
}

bool is_same_dtype(nb::dlpack::dtype a, nb::dlpack::dtype b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

}  // namespace

History make_history(const HistoryTuple& tuple) {
  const auto& [steps, base, num_steps, cache] = tuple;
  if (cache == nullptr) return {};
  return {reinterpret_cast<const StepNumbers*>(steps), base, num_steps, &cache->missed, &cache->found};  // NOLINT
}

TableStep make_table_step(const Table& table, const int64_t* indices, const void* values, int64_t num_lookups,
                          const ScalarArray& s, const Counters& counters, const History& history) {
  const StepScalars scalars{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12]};
  return {&table,
          indices,
          values,
          num_lookups,
          scalars,
          static_cast<NonFinite>(static_cast<int>(s[13])),
          *counter_at(counters, kNumSlots),
          *counter_at(counters, kNumSkipped),
          *log_decay_at(counters),
          history};
}

void advance(const Counters& counters, const TableStep& done) {
  *counter_at(counters, kStep) += 1;
  *counter_at(counters, kNumSlots) = done.num_slots;
  *counter_at(counters, kNumSkipped) = done.num_skipped;
  *log_decay_at(counters) = done.log_decay;
}

// The last numbers asked for are kept: the tables of a group are mostly at the same step.
struct SteadyStep::Reading {
  std::vector<TableStep> steps;
  std::vector<const Parameter*> parameters;
  std::vector<nb::object> gradients;  // keep alive what `steps` point to
  nb::list dense_gradients;
  nb::handle scalars_at;
  int64_t scalars_step = 0;
  ScalarArray scalars{};

  const ScalarArray& at_step(int64_t step) {
    if (step != scalars_step) {
      scalars = nb::cast<ScalarArray>(nb::borrow<nb::callable>(scalars_at)(step));
      scalars_step = step;
    }
    return scalars;
  }
};

ReadTensor find_reader(nb::handle tensor_type) {
  nb::object capsule = nb::getattr(tensor_type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* functions =
      static_cast<const DLPackFunctions*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return functions->version.major == kDLPackMajor ? functions->tensor_from_object : nullptr;
}

bool SteadyStep::Look::has_form_of(const nb::dlpack::dltensor& tensor) const {
  return tensor.device.device_type == device.device_type && tensor.device.device_id == device.device_id &&
         is_same_dtype(tensor.dtype, dtype) && static_cast<size_t>(tensor.ndim) == shape.size() &&
         std::equal(shape.begin(), shape.end(), tensor.shape);
}

bool SteadyStep::Look::fits(const nb::dlpack::dltensor& tensor) const {
  return memory_of(tensor) == data && has_form_of(tensor) && std::equal(strides.begin(), strides.end(), tensor.strides);
}

bool SteadyStep::Look::is_like(const nb::dlpack::dltensor& tensor) const {
  if (!has_form_of(tensor)) return false;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (shape[dim] != 1 && tensor.strides[dim] != strides[dim]) return false;
  }
  return true;
}

SteadyStep::Look SteadyStep::look_at(nb::handle object) const {
  nb::dlpack::dltensor tensor;
  if (read_tensor_(object.ptr(), &tensor) != 0) throw nb::python_error();
  Look look{memory_of(tensor), tensor.device, tensor.dtype, {}, {}};
  look.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  look.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  return look;
}

// Whether an object is a tensor with memory that can be read: a sparse one is not.
bool SteadyStep::read(nb::handle object, nb::dlpack::dltensor& tensor) const {
  if (read_tensor_(object.ptr(), &tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool SteadyStep::looks_like(nb::handle object, const Look& look) const {
  nb::dlpack::dltensor tensor;
  return read(object, tensor) && look.is_like(tensor);
}

void SteadyStep::add_table(nb::object parameter, nb::object native_table, const Counters& counters,
                           nb::object history_of) {
  const auto* table = nb::cast<const Table*>(native_table);
  Look look = look_at(parameter);
  groups_.back().push_back(
      {std::move(parameter), std::move(native_table), table, counters, std::move(history_of), std::move(look), {}, {}});
}

void SteadyStep::add_idle(nb::object parameter) {
  groups_.back().push_back({std::move(parameter), {}, nullptr, {}, {}, {}, {}, {}});
}

void SteadyStep::add_dense(nb::object parameter, nb::dict state) {
  std::vector<Part> parts;
  for (const auto& [name, part] : state) parts.push_back({nb::borrow(part), look_at(part)});
  Look look = look_at(parameter);
  groups_.back().push_back(
      {std::move(parameter), {}, nullptr, {}, {}, std::move(look), std::move(state), std::move(parts)});
}

void SteadyStep::remember_state(nb::dict state) { state_ = DictLook(std::move(state)); }

void SteadyStep::remember_options(nb::list groups) {
  options_.clear();
  for (nb::handle group : groups) {
    if (!has_fixed_options(nb::borrow<nb::dict>(group))) return options_.clear();
    options_.emplace_back(nb::borrow<nb::dict>(group));
  }
}

bool SteadyStep::are_options_as_before(nb::list groups) const {
  if (groups.size() != options_.size()) return false;
  auto before = options_.begin();
  for (nb::handle group : groups) {
    if (!nb::isinstance<nb::dict>(group) || !before->is_as_before(nb::borrow<nb::dict>(group))) return false;
    ++before;
  }
  return true;
}

SteadyStep::DictLook::DictLook(nb::dict dict) {
  for (const auto& [key, value] : dict) entries_.emplace_back(nb::borrow(key), nb::borrow(value));
}

// One walk along the dict, which touches neither keys nor values. To look parameters up in it would call
// `Tensor.__hash__`, which is a function in Python: a further table cost 2.8 us so, in place of 2.6.
bool SteadyStep::DictLook::is_as_before(nb::dict dict) const {
  if (dict.size() != entries_.size()) return false;
  auto before = entries_.begin();
  for (const auto& [key, value] : dict) {
    if (!key.is(before->first) || !value.is(before->second)) return false;
    ++before;
  }
  return true;
}

int SteadyStep::DictLook::visit_objects(visitproc visit, void* arg) const {
  for (const auto& [key, value] : entries_) {
    Py_VISIT(key.ptr());
    Py_VISIT(value.ptr());
  }
  return 0;
}

int SteadyStep::visit_objects(visitproc visit, void* arg) const {
  for (const std::vector<Parameter>& group : groups_) {
    for (const Parameter& parameter : group) {
      Py_VISIT(parameter.object.ptr());
      Py_VISIT(parameter.native_table.ptr());
      Py_VISIT(parameter.history_of.ptr());
      Py_VISIT(parameter.dense_state.ptr());
      for (const Part& part : parameter.parts) Py_VISIT(part.tensor.ptr());
    }
  }
  for (const DictLook& look : options_) {
    if (const int found = look.visit_objects(visit, arg)) return found;
  }
  return state_.visit_objects(visit, arg);
}

// What letting go of the objects calls may look at this again, and finds it empty.
void SteadyStep::release_objects() {
  const auto groups = std::exchange(groups_, {});
  const auto state = std::exchange(state_, {});
  const auto options = std::exchange(options_, {});
}

bool SteadyStep::read_group(const std::vector<Parameter>& group, nb::handle parameters, nb::handle scalars_at,
                            Reading& reading) const {
  if (!nb::isinstance<nb::list>(parameters)) return false;
  const auto listed = nb::borrow<nb::list>(parameters);
  if (listed.size() != group.size()) return false;
  reading.scalars_at = scalars_at;
  reading.scalars_step = 0;
  for (size_t i = 0; i < group.size(); ++i) {
    const Parameter& parameter = group[i];
    if (!listed[i].is(parameter.object)) return false;
    nb::object gradient = nb::steal(PyObject_GetAttr(parameter.object.ptr(), names().grad.ptr()));
    if (!gradient.is_valid()) throw nb::python_error();
    const bool is_dense = !parameter.parts.empty();
    if (is_dense) reading.dense_gradients.append(gradient);
    if (gradient.is_none()) continue;
    if (parameter.table == nullptr && !is_dense) return false;
    if (is_dense ? !is_dense_as_before(parameter, gradient) : !read_table(parameter, gradient, reading)) return false;
    reading.gradients.push_back(std::move(gradient));
  }
  return true;
}

bool SteadyStep::is_dense_as_before(const Parameter& parameter, nb::handle gradient) const {
  if (!looks_like(parameter.object, parameter.look) || !looks_like(gradient, parameter.look)) return false;
  const auto state = nb::borrow<nb::dict>(parameter.dense_state);
  if (state.size() != parameter.parts.size()) return false;
  auto before = parameter.parts.begin();
  for (const auto& [name, part] : state) {
    if (!part.is(before->tensor) || !looks_like(part, before->look)) return false;
    ++before;
  }
  return true;
}

bool SteadyStep::read_table(const Parameter& parameter, nb::handle gradient, Reading& reading) const {
  nb::dlpack::dltensor table;
  if (!read(parameter.object, table) || !parameter.look.fits(table)) return false;
  // Both share the gradient's memory, so nothing is lost when they go; kept, they would soon call the garbage
  // collector.
  const nb::object indices = call_method(gradient, names().indices);
  const nb::object values = indices.is_valid() ? call_method(gradient, names().values) : nb::object();
  if (!values.is_valid()) return false;
  const int64_t next_step = *counter_at(parameter.counters, kStep) + 1;
  if (!read_lookups(parameter, indices, values, reading.at_step(next_step), reading)) return false;
  reading.parameters.push_back(&parameter);
  return true;
}

bool SteadyStep::read_lookups(const Parameter& parameter, nb::handle indices, nb::handle values,
                              const ScalarArray& scalars, Reading& reading) const {
  nb::dlpack::dltensor index, value;
  if (!read(indices, index) || !read(values, value)) return false;
  const Look& look = parameter.look;
  const size_t sparse_dim = parameter.table->sparse_shape.size();
  const bool fits =
      is_cpu(index) && is_int64(index) && is_contiguous(index) && index.ndim == 2 &&
      static_cast<size_t>(index.shape[0]) == sparse_dim && is_cpu(value) && is_contiguous(value) &&
      is_same_dtype(value.dtype, look.dtype) && static_cast<size_t>(value.ndim) == 1 + look.shape.size() - sparse_dim &&
      value.shape[0] == index.shape[1] &&
      std::equal(look.shape.begin() + static_cast<int64_t>(sparse_dim), look.shape.end(), value.shape + 1);
  if (!fits || !Partitioning::fits(parameter.table->num_rows, index.shape[1])) return false;
  History history;
  if (!parameter.history_of.is_none()) {
    history = make_history(nb::cast<HistoryTuple>(parameter.history_of()));
    if (history.step() >= std::numeric_limits<int32_t>::max()) return false;  // the clocks of its slots end there
  }
  reading.steps.push_back(make_table_step(*parameter.table, static_cast<const int64_t*>(memory_of(index)),
                                          memory_of(value), index.shape[1], scalars, parameter.counters, history));
  return true;
}

nb::object SteadyStep::run(nb::dict state, nb::list groups, nb::list scalars_at, nb::callable report_writes,
                           InstructionSet instruction_set, int num_threads) const {
  Reading reading;
  if (groups.size() != groups_.size() || !state_.is_as_before(state)) return nb::none();
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (!read_group(groups_[g], groups[g], scalars_at[g], reading)) return nb::none();
  }
  Fault fault;
  {
    const nb::gil_scoped_release release;
    fault = step(reading.steps, instruction_set, num_threads);
  }
  if (fault.table >= 0) return nb::none();
  for (size_t i = 0; i < reading.steps.size(); ++i) advance(reading.parameters[i]->counters, reading.steps[i]);
  nb::list written;
  for (size_t i = 0; i < reading.steps.size(); ++i) {
    if (reading.steps[i].num_lookups > 0) written.append(reading.parameters[i]->object);
  }
  if (written.size() > 0) report_writes(written);
  return reading.dense_gradients;
}

}  // namespace sparseadam
