// Run independent tasks on the threads that torch already keeps.
//
// With OpenMP the threads are those of the runtime that torch loaded first, so no second pool competes with it for the
// cores. Without it (or under a build that names no OpenMP) tasks run one after the other; results are the same bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sparseadam {

// Calls task(index, thread) for each index in [0, num_tasks). A thread takes the next task when it is done with its
// last one: a thread that the scheduler holds back delays no other.
template <class Task>
void for_each_task(int64_t num_tasks, int num_threads, const Task& task) {
  const int team = static_cast<int>(std::min<int64_t>(num_threads, num_tasks));
  if (team <= 1) {
    for (int64_t index = 0; index < num_tasks; ++index) task(index, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<int> next_thread{0};
#pragma omp parallel num_threads(team)
  {
    const int thread = next_thread.fetch_add(1, std::memory_order_relaxed);
    for (int64_t index = next.fetch_add(1); index < num_tasks; index = next.fetch_add(1)) task(index, thread);
  }
}

}  // namespace sparseadam
