#include "thread_team.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparseadam {

namespace {

constexpr int kTaskBits = 32;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;
constexpr uint64_t kDismissed = ~uint64_t{0} >> kTaskBits;

// Below this many bytes of values a second thread costs more than it brings: waking it takes tens of microseconds.
constexpr int64_t kMinBytesPerThread = 128 * 1024;

// Looks at a ticket or a count before giving way: some tens of microseconds. Beyond that the core is worth more to
// whoever else wants it.
constexpr int kLooksBeforeYield = 500;
// Within this a helper that has its core is done with its last task, and to sleep meanwhile would take longer than
// asked for: a step of 4,096 lookups into 1,000,000 x 64 took 320 us in place of 175 whenever that happened.
constexpr double kPatienceSeconds = 300e-6;

// Where a helper shares its core with another process it holds up each step that it takes part in, for as long as that
// process runs: milliseconds, a whole step. The next steps are then taken alone, and ever fewer try again until one
// goes through undisturbed.
constexpr double kHeldUpSeconds = 300e-6;
constexpr double kHeldUpShare = 0.15;  // of a long step: less is what any system takes now and then
double held_up_after(double step_seconds) { return std::max(kHeldUpSeconds, kHeldUpShare * step_seconds); }
constexpr int kMinBackoff = 4;
constexpr int kMaxBackoff = 64;
std::atomic<int> steps_alone{0};
std::atomic<int> backoff{kMinBackoff};

void learn(bool was_held_up) {
  if (was_held_up) steps_alone.store(backoff.load());
  backoff.store(was_held_up ? std::min(2 * backoff.load(), kMaxBackoff) : kMinBackoff);
}

bool is_step_alone() {
  int left = steps_alone.load();
  while (left > 0) {
    if (steps_alone.compare_exchange_weak(left, left - 1)) return true;
  }
  return false;
}

// A forked child has none of its parent's threads, and GNU OpenMP waits for them for ever: it steps alone.
std::atomic<bool> is_forked_child{false};

// The time, and the part of it that this thread has run, where the system tells.
struct Clocks {
  double wall, running;
};

Clocks clocks() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec wall, running;
  clock_gettime(CLOCK_MONOTONIC, &wall);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &running);
  return {static_cast<double>(wall.tv_sec) + 1e-9 * static_cast<double>(wall.tv_nsec),
          static_cast<double>(running.tv_sec) + 1e-9 * static_cast<double>(running.tv_nsec)};
#else
  return {0.0, 0.0};
#endif
}

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Runs thread_main(0) here and thread_main(1) to thread_main(num_threads - 1), or some of them, elsewhere.
template <class ThreadMain>
void fork_join(int num_threads, const ThreadMain& thread_main) {
#if defined(_OPENMP)
  std::atomic<int> next{1};
#pragma omp parallel num_threads(num_threads)
  {
    bool is_caller = false;
#pragma omp master
    is_caller = true;
    thread_main(is_caller ? 0 : next.fetch_add(1));
  }
#else
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(num_threads));
  try {
    for (int thread = 1; thread < num_threads; ++thread) helpers.emplace_back([&, thread] { thread_main(thread); });
  } catch (const std::system_error&) {  // the system gives no more: those that there are do
  }
  thread_main(0);
  for (std::thread& helper : helpers) helper.join();
#endif
}

}  // namespace

void watch_for_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true); });
  (void)registered;
#endif
}

int threads_for(int64_t num_bytes, int max_threads) {
  return static_cast<int>(std::clamp<int64_t>(num_bytes / kMinBytesPerThread, 1, std::max(max_threads, 1)));
}

void Team::launch(int num_threads, void (*step)(void* context, Team& team), void* context) {
  Team team;
  if (num_threads <= 1 || is_forked_child.load() || is_step_alone()) {
    step(context, team);
    return;
  }
  std::fegetenv(&team.caller_environment_);
  const auto began = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point dismissed;
  std::exception_ptr error;
  fork_join(num_threads, [&](int thread) {
    if (thread > 0) {
      team.help(thread);
      return;
    }
    try {
      step(context, team);
    } catch (...) {  // no exception may leave a parallel region
      error = std::current_exception();
    }
    team.dismiss();
    dismissed = std::chrono::steady_clock::now();
  });
  if (error) std::rethrow_exception(error);
  const std::chrono::duration<double> took = dismissed - began;
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - dismissed;
  learn(waited.count() > held_up_after(took.count()) || team.helper_lost_core_.load());
}

void Team::run(const Phase& phase) {
  // The old phase is closed before the new one is described: a helper that still looks at it finds nothing to take. One
  // that has seen the new number of tasks has seen this too, so it cannot take a task of the old phase by that number.
  const uint64_t number = ticket_.load(std::memory_order_relaxed) >> kTaskBits;
  ticket_.store((number << kTaskBits) | kTaskMask, std::memory_order_relaxed);
  phase_ = phase;
  num_done_.store(0, std::memory_order_relaxed);
  num_tasks_.store(phase.num_tasks, std::memory_order_release);
  ticket_.store((number + 1) << kTaskBits, std::memory_order_release);
  take_tasks(number + 1, 0);
  wait_until_done(phase.num_tasks);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::take_tasks(uint64_t number, int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (ticket >> kTaskBits == number) {
    const auto index = static_cast<int64_t>(ticket & kTaskMask);
    if (index >= num_tasks_.load(std::memory_order_acquire)) return;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    // The task is ours and its phase cannot end before it is done, so the phase may be read.
    do_task(index, thread);
    num_done_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

// No exception may leave a parallel region, nor the caller's a phase that others still work on.
void Team::do_task(int64_t index, int thread) {
  try {
    phase_.task(phase_.context, index, thread);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void Team::wait_until_done(int64_t num_tasks) const {
  const auto is_done = [&] { return num_done_.load(std::memory_order_acquire) >= num_tasks; };
  for (int look = 0; look < kLooksBeforeYield; ++look) {
    if (is_done()) return;
    relax();
  }
  const auto began = std::chrono::steady_clock::now();
  while (!is_done()) {
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - began;
    if (waited.count() < kPatienceSeconds) {
      std::this_thread::yield();
    } else {
      // A helper lost its core within a task. Asleep, this thread leaves it a core to move to.
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

void Team::help(int thread) {
  const Clocks began = clocks();
  std::fenv_t own_environment;
  std::fegetenv(&own_environment);
  std::fesetenv(&caller_environment_);
  uint64_t seen = 0;
  for (int look = 0; seen != kDismissed; ++look) {
    const uint64_t number = ticket_.load(std::memory_order_acquire) >> kTaskBits;
    if (number != seen) {
      seen = number;
      look = 0;
      take_tasks(number, thread);
    } else if (look < kLooksBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
  std::fesetenv(&own_environment);
  const Clocks ended = clocks();
  const double took = ended.wall - began.wall;
  const double off_core = took - (ended.running - began.running);
  if (off_core > held_up_after(took)) helper_lost_core_.store(true);
}

void Team::dismiss() { ticket_.store((kDismissed << kTaskBits) | kTaskMask, std::memory_order_release); }

}  // namespace sparseadam
