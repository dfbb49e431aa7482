#include "catch_up.h"

#include <algorithm>
#include <vector>

#include "arena.h"
#include "catch_up_rows.h"
#include "found_rows.h"
#include "pool.h"
#include "rounding.h"
#include "slot_index.h"
#include "thread_team.h"

namespace sparseadam {

namespace {

// What one thread needs while it works on a partition.
struct ThreadScratch {
  std::vector<Entry> entries;
  std::vector<int64_t> rows, slots;
  std::vector<double> weights;  // of a row, see UpdateRows' scratch
};

// Memory of a call, kept from call to call.
struct Workspace {
  Arena arena;
  uint32_t* new_rows;     // of each partition, which of its rows wait for a slot
  int64_t* num_new_rows;  // per partition
  int64_t* first_slots;   // of a partition's new rows
  std::vector<BadIndex> bad;
  std::vector<ThreadScratch> threads;
};

class Call {
 public:
  Call(RowsRead& read, InstructionSet instruction_set, Workspace& workspace)
      : read_(read), table_(*read.table), workspace_(workspace), found_(*read.history.found), lookups_(found_.lookups) {
    const uint64_t key = step_key(read.seed, table_.stream, static_cast<uint64_t>(read.history.step()));
    memory_ = {
        table_.table, table_.table_stride, table_.moments, table_.stochastic_rounding, nullptr, table_.width, key, 0.0,
        nullptr,      read.history};
    catch_up_rows_ = catch_up_rows_for(table_.element, table_.stochastic_rounding, instruction_set);
  }

  void plan(int num_threads) {
    found_.step = -1;
    found_.arena.reset();
    const int64_t num_lookups = read_.num_rows_read;
    lookups_.plan({read_.rows, &table_.num_rows, 1, num_lookups}, table_.num_rows, table_.row_bytes(), num_threads,
                  num_lookups, found_.arena);
    found_.begins = found_.arena.take<uint32_t>(read_.num_rows_read);
    found_.ends = found_.arena.take<uint32_t>(read_.num_rows_read);
    found_.slots = found_.arena.take<int64_t>(read_.num_rows_read);
    found_.num_rows = found_.arena.take<int64_t>(lookups_.num_partitions());
    found_.rows = found_.arena.take<int64_t>(read_.num_rows_read);
    workspace_.arena.reset();
    workspace_.new_rows = workspace_.arena.take<uint32_t>(read_.num_rows_read);
    workspace_.num_new_rows = workspace_.arena.take<int64_t>(lookups_.num_partitions());
    workspace_.first_slots = workspace_.arena.take<int64_t>(lookups_.num_partitions());
    workspace_.bad.assign(static_cast<size_t>(lookups_.num_chunks()), BadIndex{});
    grow(workspace_.threads, num_threads);
  }

  BadIndex run(Team& team) {
    auto partition_chunk = [&](int64_t chunk, int) {
      workspace_.bad[static_cast<size_t>(chunk)] = lookups_.partition_chunk(chunk);
      const int64_t begin = lookups_.chunk_begin(chunk);
      std::copy(read_.rows + begin, read_.rows + lookups_.chunk_begin(chunk + 1), found_.rows + begin);
    };
    team.for_each(lookups_.num_chunks(), partition_chunk);
    for (const BadIndex& bad : workspace_.bad) {
      if (bad.lookup >= 0) return bad;
    }
    lookups_.finish_partitioning(found_.arena);
    for (ThreadScratch& thread : workspace_.threads) {
      grow(thread.entries, lookups_.sort_scratch());
      grow(thread.rows, lookups_.max_rows());
      grow(thread.slots, lookups_.max_rows());
      grow(thread.weights, kScratchRows * table_.width);
    }
    // The last partition first: the step that follows starts with the first one, whose rows are then still in cache.
    auto move_rows = [&](int64_t index, int thread) {
      move_partition(lookups_.num_partitions() - 1 - index, workspace_.threads[static_cast<size_t>(thread)]);
    };
    team.for_each(lookups_.num_partitions(), move_rows);
    if (assign_slots()) {
      auto move_new_rows = [&](int64_t partition, int thread) {
        move_new_partition(partition, workspace_.threads[static_cast<size_t>(thread)]);
      };
      team.for_each(lookups_.num_partitions(), move_new_rows);
    }
    keep_found_rows();
    return {};
  }

 private:
  // Sorts a partition, moves its rows that are behind, and sets those aside that have no slot.
  void move_partition(int64_t partition, ThreadScratch& thread) {
    Entry* sorted = lookups_.kept(partition);
    lookups_.sort_partition(partition, sorted, thread.entries.data());
    const int64_t at = lookups_.partition_begin(partition);
    const uint32_t* begins = found_.begins + at;
    const int64_t* slots = found_.slots + at;
    uint32_t* new_rows = workspace_.new_rows + at;
    const int64_t num_rows = find_slots(table_, lookups_, sorted, lookups_.partition_size(partition),
                                        found_.begins + at, found_.ends + at, found_.slots + at);
    found_.num_rows[partition] = num_rows;
    int64_t num_behind = 0;
    int64_t num_new_rows = 0;
    find_rows_behind(table_, read_.history, slots, num_rows, [&](int64_t r) {
      if (slots[r] < 0) {
        new_rows[num_new_rows++] = static_cast<uint32_t>(r);
        return;
      }
      thread.rows[static_cast<size_t>(num_behind)] = lookups_.row_of(sorted[begins[r]]);
      thread.slots[static_cast<size_t>(num_behind)] = slots[r];
      ++num_behind;
    });
    workspace_.num_new_rows[partition] = num_new_rows;
    catch_up_rows_(memory_, {thread.rows.data(), thread.slots.data(), num_behind}, thread.weights.data());
  }

  // Sets each partition's first new slot; returns whether there are any new rows.
  bool assign_slots() {
    const int64_t before = read_.num_slots;
    for (int64_t p = 0; p < lookups_.num_partitions(); ++p) {
      workspace_.first_slots[p] = read_.num_slots;
      read_.num_slots += workspace_.num_new_rows[p];
    }
    return read_.num_slots > before;
  }

  void move_new_partition(int64_t partition, ThreadScratch& thread) {
    const int64_t at = lookups_.partition_begin(partition);
    const Entry* sorted = lookups_.kept(partition);
    const uint32_t* new_rows = workspace_.new_rows + at;
    const int64_t first_slot = workspace_.first_slots[partition];
    const int64_t count = workspace_.num_new_rows[partition];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = lookups_.row_of(sorted[found_.begins[at + new_rows[r]]]);
      thread.rows[static_cast<size_t>(r)] = row;
      thread.slots[static_cast<size_t>(r)] = first_slot + r;
      found_.slots[at + new_rows[r]] = first_slot + r;
      table_.rows[first_slot + r] = row;
      write_slot(table_, row, first_slot + r);
    }
    catch_up_rows_(memory_, {thread.rows.data(), thread.slots.data(), count}, thread.weights.data());
  }

  void keep_found_rows() {
    found_.num_rows_read = read_.num_rows_read;
    found_.num_slots = read_.num_slots;
    found_.step = read_.history.step();
  }

  RowsRead& read_;
  const Table& table_;
  Workspace& workspace_;
  FoundRows& found_;
  Partitioning& lookups_;
  TableMemory memory_{};
  CatchUpRows catch_up_rows_;
};

}  // namespace

BadIndex catch_up(RowsRead& read, InstructionSet instruction_set, int max_threads) {
  read.history.missed->advance(read.history, tolerance_of(read.table->element));
  if (read.num_rows_read == 0) return {};
  Borrowed<Workspace> workspace;
  const int num_threads = threads_for(read.num_rows_read * read.table->row_bytes(), max_threads);
  Call call(read, instruction_set, *workspace);
  call.plan(num_threads);
  BadIndex bad;
  auto run = [&](Team& team) { bad = call.run(team); };
  with_team(num_threads, run);
  return bad;
}

}  // namespace sparseadam
