// Threads for the phases of one step, of which none is waited for because it has nothing to do, but at the step's end.
//
// The calling thread does the work itself, phase by phase, and the others help when they get to run: a phase ends when
// its tasks are done, whoever did them. The helpers are the OpenMP threads that torch keeps: after torch's own work
// they spin for milliseconds waiting for more, and threads of our own would have to share the cores with them. OpenMP
// waits for all of them when the step is over; where that took long, or one lost its core, the next steps are taken
// alone.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <exception>
#include <mutex>

namespace sparseadam {

// The threads of one step and the phase they are working on. A ticket is (phase number, next task): taking a task is
// one compare-and-swap on it, which fails for whoever still looks at a phase that has ended.
class Team {
 public:
  // Calls task(index, thread) for each index in [0, num_tasks), in any order and on any thread; returns when all are
  // done and what they wrote can be read. `thread` is below the team's size and tells apart those that run together.
  // What a task throws is thrown here when all are done, or the first of it.
  template <class Task>
  void for_each(int64_t num_tasks, Task& task) {
    run({[](void* context, int64_t index, int thread) { (*static_cast<Task*>(context))(index, thread); }, &task,
         num_tasks});
  }

 private:
  template <class Step>
  friend void with_team(int num_threads, Step& step);

  struct Phase {
    void (*task)(void* context, int64_t index, int thread);
    void* context;
    int64_t num_tasks;
  };

  // Runs step(team) on the calling thread, with up to num_threads - 1 others helping.
  static void launch(int num_threads, void (*step)(void* context, Team& team), void* context);

  void run(const Phase& phase);
  void take_tasks(uint64_t number, int thread);
  void do_task(int64_t index, int thread);
  void wait_until_done(int64_t num_tasks) const;
  void help(int thread);
  void dismiss();

  Phase phase_{};
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> num_tasks_{0};
  std::atomic<int64_t> num_done_{0};
  std::atomic<bool> helper_lost_core_{false};
  // Rounding, and whether the smallest numbers are flushed to zero: the helpers' too.
  std::fenv_t caller_environment_{};
  std::mutex error_mutex_;
  std::exception_ptr error_;  // of the phase
};

// To be called before the process first forks: from then on a child of it, which has one thread only, steps alone.
void watch_for_forks();

// Runs step(team) with a team of at most num_threads. Results must not depend on how many help, which may be none.
template <class Step>
void with_team(int num_threads, Step& step) {
  Team::launch(num_threads, [](void* context, Team& team) { (*static_cast<Step*>(context))(team); }, &step);
}

// How many threads pay for work that moves this many bytes, at most `max_threads`.
int threads_for(int64_t num_bytes, int max_threads);

}  // namespace sparseadam
