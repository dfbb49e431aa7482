#include "step.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
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

// Rows that an error names. As in sparseadam/update/_types.py.
constexpr size_t kRowsNamed = 5;

// What one thread needs while it walks a partition. That partition's rows are there too, as it is the next one's turn
// when they are done: the memory stays in the thread's caches. With memory of its own for each partition, 65,536
// lookups into 1,000,000 x 64 took up to 4 % more time on an AMD EPYC (Zen 5).
struct ThreadScratch {
  std::vector<Entry> sorted;
  std::vector<Entry> entries;  // to sort with
  std::vector<uint32_t> begins;
  std::vector<uint32_t> ends;
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

// What one table needs during a step. Where rows are looked at before the walk, each partition's are kept, delimited by
// `begins` and `ends` in its kept entries, and with their slots: to find those again would take a cache line a row.
// Once a partition is walked, its part of all but the slots holds the new rows that wait for theirs.
struct TableScratch {
  Partitioning lookups;
  uint32_t* begins;
  uint32_t* ends;
  int64_t* num_new_rows;  // per partition
  int64_t* first_slots;   // of a partition's new rows
  int64_t* num_skipped;   // per partition
  int64_t* num_rows;      // per partition, and the slots of its rows, where they are found before the walk
  int64_t* slots;
  Order order;
};

struct Task {
  int64_t table;
  int64_t part;  // chunk or partition
};

// Addresses of a table or of values.
struct Range {
  uintptr_t begin, end;
};

// Memory of a step, kept from step to step so that a step in steady state allocates nothing.
struct Workspace {
  Arena arena;
  std::vector<Range> ranges;  // of the tables
  std::vector<RowKernels> kernels;
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

// The rows of a partition while they are walked: a RowRun that can be written.
struct PartitionRows {
  Entry* sorted;
  uint32_t* begins;
  uint32_t* ends;
  int64_t* slots;
  int64_t num_rows;
};

RowRun run_of(const Partitioning& lookups, const PartitionRows& rows) {
  return {&lookups, rows.sorted, rows.begins, rows.ends, rows.slots, rows.num_rows};
}

// Where the rows of a table are kept whose partitions are looked at before the walk.
PartitionRows kept_rows(const TableScratch& scratch, int64_t partition, int64_t num_rows) {
  const int64_t at = scratch.lookups.partition_begin(partition);
  return {scratch.lookups.kept(partition), scratch.begins + at, scratch.ends + at, scratch.slots + at, num_rows};
}

// Fills in the rows of a partition; returns how many there are.
int64_t sort_and_find(const TableStep& step, const Partitioning& lookups, int64_t partition, const PartitionRows& rows,
                      ThreadScratch& thread) {
  lookups.sort_partition(partition, rows.sorted, thread.entries.data());
  return find_slots(*step.table, lookups, rows.sorted, lookups.partition_size(partition), rows.begins, rows.ends,
                    rows.slots);
}

// Takes rows whose gradient is not finite out of a partition's; returns how many.
int64_t drop_nonfinite_rows(const TableStep& step, const Partitioning& lookups, PartitionRows& rows,
                            const RowKernels& kernels, ThreadScratch& thread) {
  kernels.find_finite_rows(memory_of(step), run_of(lookups, rows), thread.is_finite.data(), thread.rows.data());
  int64_t num_kept = 0;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    if (thread.is_finite[static_cast<size_t>(r)] == 0) continue;
    rows.begins[num_kept] = rows.begins[r];
    rows.ends[num_kept] = rows.ends[r];
    rows.slots[num_kept] = rows.slots[r];
    ++num_kept;
  }
  const int64_t num_dropped = rows.num_rows - num_kept;
  rows.num_rows = num_kept;
  return num_dropped;
}

// Sets rows without a slot aside, with their entries, until they have one; returns how many. Where a partition's rows
// are kept, this moves them to the front of their own place.
int64_t set_new_rows_aside(const PartitionRows& rows, const TableScratch& scratch, int64_t partition) {
  Entry* sorted = scratch.lookups.kept(partition);
  uint32_t* begins = scratch.begins + scratch.lookups.partition_begin(partition);
  uint32_t* ends = scratch.ends + scratch.lookups.partition_begin(partition);
  int64_t num_new_rows = 0;
  uint32_t next = 0;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    if (rows.slots[r] >= 0) continue;
    const uint32_t begin = rows.begins[r];
    const uint32_t end = rows.ends[r];
    begins[num_new_rows] = next;
    for (uint32_t i = begin; i < end; ++i) sorted[next++] = rows.sorted[i];
    ends[num_new_rows] = next;
    ++num_new_rows;
  }
  return num_new_rows;
}

// Sorts a partition, updates its rows that have a slot and sets the new ones aside.
void walk_partition(const TableStep& step, TableScratch& scratch, int64_t partition, const RowKernels& kernels,
                    ThreadScratch& thread) {
  const Partitioning& lookups = scratch.lookups;
  PartitionRows rows{};
  if (scratch.order == Order::kPartitioned) {
    const bool fits = lookups.partition_size(partition) <= static_cast<int64_t>(thread.sorted.size());
    rows = {fits ? thread.sorted.data() : lookups.kept(partition), thread.begins.data(), thread.ends.data(),
            thread.slots.data(), 0};
    rows.num_rows = sort_and_find(step, lookups, partition, rows, thread);
  } else {
    rows = kept_rows(scratch, partition, scratch.num_rows[partition]);
  }
  scratch.num_skipped[partition] =
      step.nonfinite == NonFinite::kSkip ? drop_nonfinite_rows(step, lookups, rows, kernels, thread) : 0;
  kernels.update_rows(memory_of(step), run_of(lookups, rows), step.scalars, thread.rows.data());
  scratch.num_new_rows[partition] = set_new_rows_aside(rows, scratch, partition);
}

// The first rows of a sorted partition that a step is refused for, up to kRowsNamed, and why.
struct Refused {
  std::vector<int64_t> behind, nonfinite;
};

Refused find_refused_rows(const TableStep& step, TableScratch& scratch, int64_t partition, const RowKernels& kernels,
                          ThreadScratch& thread) {
  const Partitioning& lookups = scratch.lookups;
  if (scratch.order == Order::kLookedAt) {
    scratch.num_rows[partition] = sort_and_find(step, lookups, partition, kept_rows(scratch, partition, 0), thread);
  }
  const PartitionRows rows = kept_rows(scratch, partition, scratch.num_rows[partition]);
  const auto name = [&](std::vector<int64_t>& found, int64_t r) {
    if (found.size() < kRowsNamed) found.push_back(lookups.row_of(rows.sorted[rows.begins[r]]));
  };
  Refused refused;
  if (step.history.steps != nullptr && scratch.order == Order::kLookedAt) {
    find_rows_behind(*step.table, step.history, rows.slots, rows.num_rows, [&](int64_t r) { name(refused.behind, r); });
  }
  if (step.nonfinite == NonFinite::kRefuse) {
    kernels.find_finite_rows(memory_of(step), run_of(lookups, rows), thread.is_finite.data(), thread.rows.data());
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      if (thread.is_finite[static_cast<size_t>(r)] == 0) name(refused.nonfinite, r);
    }
  }
  return refused;
}

// Gives slots to a partition's new rows, in row order, and updates them.
void walk_new_rows(const TableStep& step, const TableScratch& scratch, int64_t partition, const RowKernels& kernels,
                   ThreadScratch& thread) {
  const Table& table = *step.table;
  const int64_t first_slot = scratch.first_slots[partition];
  const int64_t num_new_rows = scratch.num_new_rows[partition];
  const Partitioning& lookups = scratch.lookups;
  const Entry* sorted = lookups.kept(partition);
  const uint32_t* begins = scratch.begins + lookups.partition_begin(partition);
  const uint32_t* ends = scratch.ends + lookups.partition_begin(partition);
  for (int64_t r = 0; r < num_new_rows; ++r) {
    const int64_t row = lookups.row_of(sorted[begins[r]]);
    thread.slots[static_cast<size_t>(r)] = first_slot + r;
    table.rows[first_slot + r] = table.row_names != nullptr ? table.row_names[row] : row;
    write_slot(table, row, first_slot + r);
  }
  const RowRun run{&lookups, sorted, begins, ends, thread.slots.data(), num_new_rows};
  kernels.update_rows(memory_of(step), run, step.scalars, thread.rows.data());
}

Range range_of(const void* begin, int64_t num_elements, ElementType element) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {address, address + static_cast<uintptr_t>(num_elements * element_bytes(element))};
}

// Finds where the tables are, in the order of their addresses; returns whether any overlap. (Columns of one tensor do
// in range only; they lose nothing but speed.) Each `end` is made the largest up to there.
bool find_ranges(const std::vector<TableStep>& tables, std::vector<Range>& ranges) {
  ranges.clear();
  for (const TableStep& step : tables) {
    const Table& table = *step.table;
    if (table.num_rows == 0) continue;
    const int64_t num_elements = (table.num_rows - 1) * table.table_stride + table.width;
    ranges.push_back(range_of(table.table, num_elements, table.element));
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  bool any_overlap = false;
  for (size_t i = 1; i < ranges.size(); ++i) {
    any_overlap = any_overlap || ranges[i].begin < ranges[i - 1].end;
    ranges[i].end = std::max(ranges[i].end, ranges[i - 1].end);
  }
  return any_overlap;
}

// Copies values that lie in a table's own memory: rows would be written before all values are read.
void set_values_apart(std::vector<TableStep>& tables, Workspace& workspace) {
  const std::vector<Range>& ranges = workspace.ranges;
  for (TableStep& step : tables) {
    const Range values = range_of(step.values, step.num_lookups * step.table->width, step.table->element);
    const auto begins_behind = [](uintptr_t end, const Range& range) { return end <= range.begin; };
    const auto behind = std::upper_bound(ranges.begin(), ranges.end(), values.end, begins_behind);
    if (behind == ranges.begin() || std::prev(behind)->end <= values.begin) continue;
    const auto num_bytes = static_cast<int64_t>(values.end - values.begin);
    auto* copy = workspace.arena.take<std::byte>(num_bytes);
    std::copy_n(static_cast<const std::byte*>(step.values), num_bytes, copy);
    step.values = copy;
  }
}

int choose_num_threads(const std::vector<TableStep>& tables, int max_threads) {
  int64_t num_bytes = 0;
  for (const TableStep& step : tables) {
    num_bytes += step.num_lookups * (step.table->row_bytes() + static_cast<int64_t>(sizeof(Entry)));
  }
  return threads_for(num_bytes, max_threads);
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
    scratch.lookups.plan(lookups, table.num_rows, table.row_bytes(), num_threads, num_lookups_in_all, arena);
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
  scratch.first_slots = arena.take<int64_t>(scratch.lookups.num_partitions());
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
  int64_t sort_scratch = 0;
  int64_t max_rows = 0;
  int64_t largest_width = 0;
  for (size_t t = 0; t < tables.size(); ++t) {
    if (tables[t].num_lookups == 0) continue;
    TableScratch& scratch = workspace.tables[t];
    if (scratch.order != Order::kFound) scratch.lookups.finish_partitioning(workspace.arena);
    sort_scratch = std::max(sort_scratch, scratch.lookups.sort_scratch());
    max_rows = std::max(max_rows, scratch.lookups.max_rows());
    largest_width = std::max(largest_width, tables[t].table->width);
  }
  for (ThreadScratch& thread : workspace.threads) {
    grow(thread.sorted, sort_scratch);
    grow(thread.entries, sort_scratch);
    grow(thread.begins, max_rows + 1);
    grow(thread.ends, max_rows + 1);
    grow(thread.slots, max_rows);
    grow(thread.is_finite, max_rows);
    grow(thread.rows, kScratchRows * largest_width);
  }
}

// Looks at the rows of tables that may refuse some, before anything is written. The fault is that of the first such
// table; where rows of it are behind, their gradients do not matter.
Fault look_at_rows(const std::vector<TableStep>& tables, Workspace& workspace, Team& team) {
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
        find_refused_rows(tables[t], workspace.tables[t], task.part, workspace.kernels[t], scratch);
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

// Sets the first slot of each partition's new rows, for partitions [begin, end), and adds up what the tables' counters
// say; returns whether there are new rows.
bool assign_first_slots(std::vector<TableStep>& tables, Workspace& workspace, int64_t begin, int64_t end) {
  bool any = false;
  for (int64_t i = begin; i < end; ++i) {
    const Task& task = workspace.partitions[static_cast<size_t>(i)];
    TableStep& step = tables[static_cast<size_t>(task.table)];
    TableScratch& scratch = workspace.tables[static_cast<size_t>(task.table)];
    scratch.first_slots[task.part] = step.num_slots;
    step.num_slots += scratch.num_new_rows[task.part];
    step.num_skipped += scratch.num_skipped[task.part];
    any = any || scratch.num_new_rows[task.part] > 0;
  }
  return any;
}

// Walks partitions [begin, end): their rows that have slots, then the others.
void walk_partitions(Team& team, std::vector<TableStep>& tables, Workspace& workspace, int64_t begin, int64_t end) {
  auto walk = [&](int64_t index, int thread) {
    const Task& task = workspace.partitions[static_cast<size_t>(begin + index)];
    const auto t = static_cast<size_t>(task.table);
    walk_partition(tables[t], workspace.tables[t], task.part, workspace.kernels[t],
                   workspace.threads[static_cast<size_t>(thread)]);
  };
  team.for_each(end - begin, walk);
  if (!assign_first_slots(tables, workspace, begin, end)) return;

  auto walk_new = [&](int64_t index, int thread) {
    const Task& task = workspace.partitions[static_cast<size_t>(begin + index)];
    const auto t = static_cast<size_t>(task.table);
    if (workspace.tables[t].num_new_rows[task.part] == 0) return;
    walk_new_rows(tables[t], workspace.tables[t], task.part, workspace.kernels[t],
                  workspace.threads[static_cast<size_t>(thread)]);
  };
  team.for_each(end - begin, walk_new);
}

Fault step_with(Team& team, std::vector<TableStep>& tables, bool is_one_by_one, InstructionSet instruction_set,
                Workspace& workspace) {
  Fault fault = partition_lookups(workspace, team);
  if (fault.table >= 0) return fault;
  reserve_threads(tables, workspace);

  workspace.kernels.clear();
  for (const TableStep& step : tables) {
    const Table& table = *step.table;
    workspace.kernels.push_back(
        row_kernels_for(table.element, table.moments, table.stochastic_rounding, instruction_set));
  }
  fault = look_at_rows(tables, workspace, team);
  if (fault.table >= 0) return fault;
  const auto first = workspace.partitions.begin();
  const auto last = workspace.partitions.end();
  for (auto begin = first, end = last; begin != last; begin = end) {
    const auto is_of_another_table = [&](const Task& task) { return task.table != begin->table; };
    end = is_one_by_one ? std::find_if(begin, last, is_of_another_table) : last;
    walk_partitions(team, tables, workspace, begin - first, end - first);
  }
  return {};
}

}  // namespace

Fault step(std::vector<TableStep>& tables, InstructionSet instruction_set, int max_threads) {
  for (const TableStep& table : tables) {
    if (table.history.missed != nullptr)
      table.history.missed->advance(table.history, tolerance_of(table.table->element));
  }
  Borrowed<Workspace> borrowed;
  const bool is_one_by_one = find_ranges(tables, (*borrowed).ranges);
  const int num_threads = choose_num_threads(tables, is_one_by_one ? 1 : max_threads);
  plan(tables, num_threads, *borrowed);
  set_values_apart(tables, *borrowed);
  Fault fault;
  auto run = [&](Team& team) { fault = step_with(team, tables, is_one_by_one, instruction_set, *borrowed); };
  with_team(num_threads, run);
  if (fault.table < 0) {
    for (TableStep& table : tables) table.log_decay += table.scalars.log_decay;
  }
  return fault;
}

}  // namespace sparseadam
