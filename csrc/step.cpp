#include "step.h"

#include <algorithm>
#include <utility>

#include "arena.h"
#include "found_rows.h"
#include "partition.h"
#include "pool.h"
#include "rounding.h"
#include "slot_index.h"
#include "thread_team.h"

namespace sparseadam {

namespace {

// Rows that an error names.
constexpr size_t kRowsNamed = 5;

// What one thread needs while it walks a partition.
struct ThreadScratch {
  std::vector<Entry> entries;
  std::vector<int64_t> slots;
  std::vector<uint8_t> is_finite;
  std::vector<double> rows;  // doubles, so that it is aligned for, and large enough for, either type of moments
};

// How far the lookups of a table have come before the walk.
enum class Order {
  kPartitioned,  // the walk sorts them
  kLookedAt,     // they are sorted, their rows found and looked at
  kFound,        // as catch_up left them, which has brought their rows up to date
};

// What one table needs during a step. `begins` and `ends` delimit the rows of each partition in the sorted lookups;
// once a partition is walked, its part of both holds the new rows that wait for their slots. Where rows are looked at
// before the walk, they are kept with their slots: to find those again would take a cache line a row.
struct TableScratch {
  Partitioning lookups;
  uint32_t* begins;
  uint32_t* ends;
  int64_t* num_new_rows;  // per partition; then the first slot of its new rows
  int64_t* num_skipped;   // per partition
  int64_t* num_rows;      // per partition, and the slots of its rows, where they are found before the walk
  int64_t* slots;
  Order order;
};

struct Task {
  int64_t table;
  int64_t part;  // chunk or partition
};

// Memory of a step, kept from step to step so that a step in steady state allocates nothing.
struct Workspace {
  Arena arena;
  std::vector<TableScratch> tables;
  std::vector<ThreadScratch> threads;
  std::vector<Task> chunks;
  std::vector<Task> partitions;
  std::vector<BadIndex> bad;  // per chunk
};

TableMemory memory_of(const TableStep& step) {
  const Table& table = *step.table;
  const uint64_t key =
      step_key(static_cast<uint64_t>(step.scalars.seed), table.stream, static_cast<uint64_t>(step.scalars.step));
  return {table.table,     table.table_stride, table.moments, table.stochastic_rounding,
          step.values,     table.width,        key,           step.log_decay + step.scalars.log_decay,
          table.row_names, step.history};
}

// Takes rows whose gradient is not finite out of a run; returns how many.
int64_t drop_nonfinite_rows(const TableStep& step, const RowRun& run, uint32_t* begins, uint32_t* ends, int64_t* slots,
                            const RowKernels& kernels, ThreadScratch& thread) {
  kernels.find_finite_rows(memory_of(step), run, thread.is_finite.data(), thread.rows.data());
  int64_t num_kept = 0;
  for (int64_t r = 0; r < run.num_rows; ++r) {
    if (thread.is_finite[static_cast<size_t>(r)] == 0) continue;
    begins[num_kept] = begins[r];
    ends[num_kept] = ends[r];
    slots[num_kept] = slots[r];
    ++num_kept;
  }
  return run.num_rows - num_kept;
}

// Sorts a partition, updates its rows that have a slot and sets the new ones aside.
void walk_partition(const TableStep& step, TableScratch& scratch, int64_t partition, const RowKernels& kernels,
                    ThreadScratch& thread) {
  const int64_t at = scratch.lookups.partition_begin(partition);
  uint32_t* begins = scratch.begins + at;
  uint32_t* ends = scratch.ends + at;
  const bool are_found = scratch.order != Order::kPartitioned;
  int64_t* slots = are_found ? scratch.slots + at : thread.slots.data();
  RowRun run{&scratch.lookups, begins, ends, slots, 0};
  if (are_found) {
    run.num_rows = scratch.num_rows[partition];
  } else {
    scratch.lookups.sort_partition(partition, thread.entries.data());
    run.num_rows = find_slots(*step.table, scratch.lookups, partition, begins, ends, slots);
  }
  scratch.num_skipped[partition] = 0;
  if (step.nonfinite == NonFinite::kSkip) {
    scratch.num_skipped[partition] = drop_nonfinite_rows(step, run, begins, ends, slots, kernels, thread);
    run.num_rows -= scratch.num_skipped[partition];
  }
  kernels.update_rows(memory_of(step), run, step.scalars, thread.rows.data());

  int64_t num_new_rows = 0;
  for (int64_t r = 0; r < run.num_rows; ++r) {
    if (slots[r] >= 0) continue;
    begins[num_new_rows] = begins[r];
    ends[num_new_rows] = ends[r];
    ++num_new_rows;
  }
  scratch.num_new_rows[partition] = num_new_rows;
}

// The first rows of a sorted partition that a step is refused for, up to kRowsNamed, and why.
struct Refused {
  std::vector<int64_t> behind, nonfinite;
};

Refused find_refused_rows(const TableStep& step, TableScratch& scratch, int64_t partition, const RowKernels& kernels,
                          ThreadScratch& thread) {
  Partitioning& lookups = scratch.lookups;
  uint32_t* begins = scratch.begins + lookups.partition_begin(partition);
  uint32_t* ends = scratch.ends + lookups.partition_begin(partition);
  int64_t* slots = scratch.slots + lookups.partition_begin(partition);
  if (scratch.order == Order::kLookedAt) {
    lookups.sort_partition(partition, thread.entries.data());
    scratch.num_rows[partition] = find_slots(*step.table, lookups, partition, begins, ends, slots);
  }
  const int64_t num_rows = scratch.num_rows[partition];
  const auto name = [&](std::vector<int64_t>& found, int64_t r) {
    if (found.size() < kRowsNamed) found.push_back(lookups.row_of(lookups.sorted()[begins[r]]));
  };
  Refused refused;
  if (step.history.steps != nullptr && scratch.order == Order::kLookedAt) {
    find_rows_behind(*step.table, step.history, slots, num_rows, [&](int64_t r) { name(refused.behind, r); });
  }
  if (step.nonfinite == NonFinite::kRefuse) {
    const RowRun run{&lookups, begins, ends, nullptr, num_rows};
    kernels.find_finite_rows(memory_of(step), run, thread.is_finite.data(), thread.rows.data());
    for (int64_t r = 0; r < num_rows; ++r) {
      if (thread.is_finite[static_cast<size_t>(r)] == 0) name(refused.nonfinite, r);
    }
  }
  return refused;
}

// Gives slots to a partition's new rows, in row order from `first_slot`, and updates them.
void walk_new_rows(const TableStep& step, TableScratch& scratch, int64_t partition, int64_t first_slot,
                   int64_t num_new_rows, const RowKernels& kernels, ThreadScratch& thread) {
  const Table& table = *step.table;
  const Partitioning& lookups = scratch.lookups;
  const uint32_t* begins = scratch.begins + lookups.partition_begin(partition);
  const uint32_t* ends = scratch.ends + lookups.partition_begin(partition);
  for (int64_t r = 0; r < num_new_rows; ++r) {
    const int64_t row = lookups.row_of(lookups.sorted()[begins[r]]);
    thread.slots[static_cast<size_t>(r)] = first_slot + r;
    table.rows[first_slot + r] = table.row_names != nullptr ? table.row_names[row] : row;
    write_slot(table, row, first_slot + r);
  }
  const RowRun run{&lookups, begins, ends, thread.slots.data(), num_new_rows};
  kernels.update_rows(memory_of(step), run, step.scalars, thread.rows.data());
}

// Whether the address ranges of two tables overlap. Views of one tensor may; updated at the same time, their result
// would depend on the threads. (Columns of one tensor overlap in range only; they lose nothing but speed.)
bool tables_overlap(const std::vector<TableStep>& tables) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const TableStep& step : tables) {
    const Table& table = *step.table;
    if (table.num_rows == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(table.table);
    const int64_t num_elements = (table.num_rows - 1) * table.table_stride + table.width;
    ranges.emplace_back(begin, begin + static_cast<uintptr_t>(num_elements * element_bytes(table.element)));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

int choose_num_threads(const std::vector<TableStep>& tables, int num_threads) {
  if (tables_overlap(tables)) return 1;
  int64_t num_bytes = 0;
  for (const TableStep& step : tables) {
    const int64_t row_bytes = step.table->width * element_bytes(step.table->element);
    num_bytes += step.num_lookups * (row_bytes + static_cast<int64_t>(sizeof(Entry)));
  }
  return threads_for(num_bytes, num_threads);
}

// Whether rows of a table may be refused, so that all are looked at before any is written.
bool is_looked_at(const TableStep& step, Order order) {
  return step.nonfinite == NonFinite::kRefuse || (step.history.steps != nullptr && order != Order::kFound);
}

// Takes over what catch_up has found; a walk uses it up. Returns whether it is of these lookups.
bool take_found_rows(const TableStep& step, const Lookups& lookups, TableScratch& scratch) {
  FoundRows* found = step.history.found;
  if (found == nullptr) return false;
  const bool is_same = found->are_those_of(lookups, step.history.step(), step.num_slots);
  found->step = -1;
  if (!is_same) return false;
  scratch.lookups = found->lookups;
  scratch.begins = found->begins;
  scratch.ends = found->ends;
  scratch.num_rows = found->num_rows;
  scratch.slots = found->slots;
  return true;
}

// Plans the way from a table's lookups to its rows and takes memory for it.
void plan_table(const TableStep& step, TableScratch& scratch, int num_threads, int64_t num_lookups_in_all,
                Arena& arena) {
  const Table& table = *step.table;
  const Lookups lookups{step.indices, table.sparse_shape.data(), static_cast<int64_t>(table.sparse_shape.size()),
                        step.num_lookups};
  if (take_found_rows(step, lookups, scratch)) {
    scratch.order = Order::kFound;
  } else {
    scratch.lookups.plan(lookups, table.num_rows, num_threads, num_lookups_in_all, arena);
    scratch.begins = arena.take<uint32_t>(step.num_lookups);
    scratch.ends = arena.take<uint32_t>(step.num_lookups);
    scratch.order = Order::kPartitioned;
    if (is_looked_at(step, scratch.order)) {
      scratch.order = Order::kLookedAt;
      scratch.num_rows = arena.take<int64_t>(scratch.lookups.num_partitions());
      scratch.slots = arena.take<int64_t>(step.num_lookups);
    }
  }
  scratch.num_new_rows = arena.take<int64_t>(scratch.lookups.num_partitions());
  scratch.num_skipped = arena.take<int64_t>(scratch.lookups.num_partitions());
}

// Plans all tables and lists their chunks and partitions. All memory of the step's first half is reserved here.
void plan(const std::vector<TableStep>& tables, int num_threads, Workspace& workspace) {
  workspace.arena.reset();
  workspace.chunks.clear();
  workspace.partitions.clear();
  grow(workspace.tables, static_cast<int64_t>(tables.size()));
  grow(workspace.threads, num_threads);
  int64_t num_lookups_in_all = 0;
  for (const TableStep& step : tables) num_lookups_in_all += step.num_lookups;
  for (size_t t = 0; t < tables.size(); ++t) {
    const TableStep& step = tables[t];
    if (step.num_lookups == 0) continue;
    TableScratch& scratch = workspace.tables[t];
    plan_table(step, scratch, num_threads, num_lookups_in_all, workspace.arena);
    const auto table_index = static_cast<int64_t>(t);
    const int64_t num_chunks = scratch.order == Order::kFound ? 0 : scratch.lookups.num_chunks();
    for (int64_t c = 0; c < num_chunks; ++c) workspace.chunks.push_back({table_index, c});
    for (int64_t p = 0; p < scratch.lookups.num_partitions(); ++p) workspace.partitions.push_back({table_index, p});
  }
  workspace.bad.assign(workspace.chunks.size(), BadIndex{});
}

// Checks and partitions all lookups; finds the first bad index in the order of tables and lookups.
Fault partition_lookups(Workspace& workspace, Team& team) {
  auto partition_chunk = [&](int64_t index, int) {
    const auto i = static_cast<size_t>(index);
    const Task& task = workspace.chunks[i];
    workspace.bad[i] = workspace.tables[static_cast<size_t>(task.table)].lookups.partition_chunk(task.part);
  };
  team.for_each(static_cast<int64_t>(workspace.chunks.size()), partition_chunk);
  for (size_t i = 0; i < workspace.bad.size(); ++i) {
    if (workspace.bad[i].lookup >= 0) return {workspace.chunks[i].table, workspace.bad[i], {}, false};
  }
  return {};
}

// Reserves what the walk needs, before anything is written.
void reserve_threads(const std::vector<TableStep>& tables, Workspace& workspace) {
  int64_t largest_partition = 0;
  int64_t largest_width = 0;
  for (size_t t = 0; t < tables.size(); ++t) {
    if (tables[t].num_lookups == 0) continue;
    Partitioning& lookups = workspace.tables[t].lookups;
    lookups.finish_partitioning();
    largest_partition = std::max(largest_partition, lookups.largest_partition());
    largest_width = std::max(largest_width, tables[t].table->width);
  }
  for (ThreadScratch& thread : workspace.threads) {
    grow(thread.entries, largest_partition);
    grow(thread.slots, largest_partition);
    grow(thread.is_finite, largest_partition);
    grow(thread.rows, kScratchRows * largest_width);
  }
}

// Looks at the rows of tables that may refuse some, before anything is written. The fault is that of the first such
// table; where rows of it are behind, their gradients do not matter.
Fault look_at_rows(const std::vector<TableStep>& tables, const std::vector<RowKernels>& kernels, Workspace& workspace,
                   Team& team) {
  std::vector<Task> tasks;
  for (const Task& task : workspace.partitions) {
    const auto t = static_cast<size_t>(task.table);
    if (is_looked_at(tables[t], workspace.tables[t].order)) tasks.push_back(task);
  }
  if (tasks.empty()) return {};
  std::vector<Refused> found(tasks.size());
  auto look = [&](int64_t index, int thread) {
    const Task& task = tasks[static_cast<size_t>(index)];
    const auto t = static_cast<size_t>(task.table);
    ThreadScratch& scratch = workspace.threads[static_cast<size_t>(thread)];
    found[static_cast<size_t>(index)] =
        find_refused_rows(tables[t], workspace.tables[t], task.part, kernels[t], scratch);
  };
  team.for_each(static_cast<int64_t>(tasks.size()), look);
  Fault fault;
  std::vector<int64_t> nonfinite;
  const auto take_over = [](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
    for (const int64_t row : from) {
      if (to.size() < kRowsNamed) to.push_back(row);
    }
  };
  for (size_t i = 0; i < tasks.size(); ++i) {
    const bool is_refused = !found[i].behind.empty() || !found[i].nonfinite.empty();
    if (!is_refused || (fault.table >= 0 && fault.table != tasks[i].table)) continue;
    fault.table = tasks[i].table;
    take_over(fault.rows, found[i].behind);
    take_over(nonfinite, found[i].nonfinite);
  }
  fault.rows_are_behind = !fault.rows.empty();
  if (!fault.rows_are_behind) fault.rows = std::move(nonfinite);
  return fault;
}

// Turns each partition's count of new rows into its first new slot and adds up what the tables' counters say; returns
// how many new rows there are in all.
int64_t assign_first_slots(std::vector<TableStep>& tables, Workspace& workspace, std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (size_t i = 0; i < workspace.partitions.size(); ++i) {
    const Task& task = workspace.partitions[i];
    TableStep& step = tables[static_cast<size_t>(task.table)];
    TableScratch& scratch = workspace.tables[static_cast<size_t>(task.table)];
    int64_t& new_rows = scratch.num_new_rows[task.part];
    counts[i] = new_rows;
    total += new_rows;
    new_rows = step.num_slots;
    step.num_slots += counts[i];
    step.num_skipped += scratch.num_skipped[task.part];
  }
  return total;
}

Fault step_with(Team& team, std::vector<TableStep>& tables, InstructionSet instruction_set, Workspace& workspace) {
  Fault fault = partition_lookups(workspace, team);
  if (fault.table >= 0) return fault;
  reserve_threads(tables, workspace);

  std::vector<RowKernels> kernels;
  for (const TableStep& step : tables) {
    const Table& table = *step.table;
    kernels.push_back(row_kernels_for(table.element, table.moments, table.stochastic_rounding, instruction_set));
  }
  fault = look_at_rows(tables, kernels, workspace, team);
  if (fault.table >= 0) return fault;
  const auto num_partitions = static_cast<int64_t>(workspace.partitions.size());
  std::vector<int64_t> num_new_rows(workspace.partitions.size());

  auto walk = [&](int64_t index, int thread) {
    const Task& task = workspace.partitions[static_cast<size_t>(index)];
    const auto t = static_cast<size_t>(task.table);
    walk_partition(tables[t], workspace.tables[t], task.part, kernels[t],
                   workspace.threads[static_cast<size_t>(thread)]);
  };
  team.for_each(num_partitions, walk);
  if (assign_first_slots(tables, workspace, num_new_rows) == 0) return {};

  auto walk_new = [&](int64_t index, int thread) {
    const auto i = static_cast<size_t>(index);
    if (num_new_rows[i] == 0) return;
    const Task& task = workspace.partitions[i];
    const auto t = static_cast<size_t>(task.table);
    TableScratch& scratch = workspace.tables[t];
    walk_new_rows(tables[t], scratch, task.part, scratch.num_new_rows[task.part], num_new_rows[i], kernels[t],
                  workspace.threads[static_cast<size_t>(thread)]);
  };
  team.for_each(num_partitions, walk_new);
  return {};
}

}  // namespace

Fault step(std::vector<TableStep>& tables, InstructionSet instruction_set, int max_threads) {
  for (const TableStep& table : tables) {
    if (table.history.missed != nullptr) table.history.missed->advance(table.history);
  }
  Borrowed<Workspace> borrowed;
  const int num_threads = choose_num_threads(tables, max_threads);
  plan(tables, num_threads, *borrowed);
  Fault fault;
  auto run = [&](Team& team) { fault = step_with(team, tables, instruction_set, *borrowed); };
  with_team(num_threads, run);
  if (fault.table < 0) {
    for (TableStep& table : tables) table.log_decay += table.scalars.log_decay;
  }
  return fault;
}

}  // namespace sparseadam
