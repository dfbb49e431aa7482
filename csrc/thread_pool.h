// Threads for the phases of one step, of which none is ever waited for before it has taken work.
//
// A fork-join runtime such as OpenMP waits at the end of each phase for every thread of its team. When another process
// keeps a core busy, a thread that has nothing to do must still be scheduled, for milliseconds, to say so. Here the
// calling thread does the work itself and the others help when they get to run: a phase ends when its tasks are done,
// whoever did them, and a helper that has not taken a task holds nobody up.
#pragma once

#include <cstdint>

namespace sparseadam {

// One phase: task(context, index, thread) for each index in [0, num_tasks), in any order, on any thread. `thread` is
// below the team's size and tells apart those that run at the same time.
struct Phase {
  void (*task)(void* context, int64_t index, int thread);
  void* context;
  int64_t num_tasks;
};

// The threads of one step. While it lives it may have the pool's helpers; where another step has them (several Python
// threads may step at once) this one runs alone. Results never depend on who runs what.
class Team {
 public:
  explicit Team(int num_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs a phase to its end: all that its tasks wrote can then be read by the caller.
  template <class Task>
  void for_each(int64_t num_tasks, Task& task) {
    run({[](void* context, int64_t index, int thread) { (*static_cast<Task*>(context))(index, thread); }, &task,
         num_tasks});
  }

 private:
  void run(const Phase& phase);
  bool has_helpers_ = false;
};

}  // namespace sparseadam
