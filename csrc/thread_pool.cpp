#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparseadam {

namespace {

// How often a helper looks for the next phase before it sleeps, and the caller for the last task's end: some tens of
// microseconds, about what it costs to wake a thread. Beyond that a core is worth more to whoever else wants it.
constexpr int kLooksBeforeSleep = 500;

// A helper that did not run for this long during its tasks has shared its core with somebody.
constexpr double kLostCoreSeconds = 300e-6;
constexpr int kMinBackoff = 4;
constexpr int kMaxBackoff = 64;

// A clock that stands while this thread runs, where the system has one.
double seconds_off_core() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec wall, running;
  clock_gettime(CLOCK_MONOTONIC, &wall);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &running);
  return static_cast<double>(wall.tv_sec - running.tv_sec) + 1e-9 * static_cast<double>(wall.tv_nsec - running.tv_nsec);
#else
  return 0.0;
#endif
}

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// The helpers, and the phase that is being worked on. A ticket is (phase number, next task): taking a task is one
// compare-and-swap on it, which fails for whoever still looks at a phase that has ended.
class Pool {
 public:
  // Takes the helpers for one step, starting those that are missing. False where another step has them.
  bool acquire(int num_helpers) {
    if (!in_use_.try_lock()) return false;
    if (steps_alone_ > 0) {
      --steps_alone_;
      in_use_.unlock();
      return false;
    }
    helper_lost_core_.store(false, std::memory_order_relaxed);
    try {
      while (num_started_ < num_helpers) {
        const int thread = num_started_ + 1;
        std::thread([this, thread] { help(thread); }).detach();
        ++num_started_;
      }
    } catch (const std::system_error&) {
      // No more threads to be had: those there are will do.
    }
    num_helpers_.store(std::min(num_helpers, num_started_), std::memory_order_relaxed);
    return true;
  }

  // Where a helper was held up within a task, and so held up the step, the next steps are taken alone: on a busy core
  // a helper costs more than it brings. Ever fewer steps try again until one goes through undisturbed.
  void release() {
    if (helper_lost_core_.load(std::memory_order_relaxed)) {
      steps_alone_ = backoff_;
      backoff_ = std::min(2 * backoff_, kMaxBackoff);
    } else {
      backoff_ = kMinBackoff;
    }
    in_use_.unlock();
  }

  void run(const Phase& phase) {
    // The old phase is closed before the new one is described: a helper that still looks at it finds nothing to take.
    const uint64_t number = ticket_.load(std::memory_order_relaxed) >> kTaskBits;
    ticket_.store((number << kTaskBits) | kTaskMask, std::memory_order_relaxed);
    phase_ = phase;
    num_done_.store(0, std::memory_order_relaxed);
    num_tasks_.store(phase.num_tasks, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // so that no helper misses it between its look and its sleep
      ticket_.store((number + 1) << kTaskBits, std::memory_order_release);
    }
    if (num_sleeping_.load(std::memory_order_relaxed) > 0) wake_.notify_all();
    take_tasks(number + 1, 0);
    wait_until_done(phase.num_tasks);
  }

 private:
  static constexpr int kTaskBits = 32;
  static constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;

  void take_tasks(uint64_t number, int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (true) {
      if (ticket >> kTaskBits != number) return;
      const auto index = static_cast<int64_t>(ticket & kTaskMask);
      if (index >= num_tasks_.load(std::memory_order_relaxed)) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      // The task is ours and its phase cannot end before it is done, so the phase may be read.
      phase_.task(phase_.context, index, thread);
      const int64_t num_tasks = num_tasks_.load(std::memory_order_relaxed);
      if (num_done_.fetch_add(1) + 1 == num_tasks && caller_sleeps_.load()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  // A helper may have lost its core within a task. Sleeping, and not spinning, leaves this core free for it to move to.
  void wait_until_done(int64_t num_tasks) {
    for (int look = 0; look < kLooksBeforeSleep; ++look) {
      if (num_done_.load(std::memory_order_acquire) == num_tasks) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, [&] { return num_done_.load() == num_tasks; });
    caller_sleeps_.store(false);
  }

  void help(int thread) {
    uint64_t seen = 0;
    while (true) {
      uint64_t number = ticket_.load(std::memory_order_acquire) >> kTaskBits;
      for (int look = 0; number == seen && look < kLooksBeforeSleep; ++look) {
        relax();
        number = ticket_.load(std::memory_order_acquire) >> kTaskBits;
      }
      if (number == seen) number = sleep_until_changed(seen);
      seen = number;
      if (thread > num_helpers_.load(std::memory_order_relaxed)) continue;
      const double began = seconds_off_core();
      take_tasks(number, thread);
      if (seconds_off_core() - began > kLostCoreSeconds) helper_lost_core_.store(true, std::memory_order_relaxed);
    }
  }

  uint64_t sleep_until_changed(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++num_sleeping_;
    wake_.wait(lock, [&] { return ticket_.load(std::memory_order_acquire) >> kTaskBits != seen; });
    --num_sleeping_;
    return ticket_.load(std::memory_order_acquire) >> kTaskBits;
  }

  std::mutex in_use_;  // guards the next three
  int num_started_ = 0;
  int steps_alone_ = 0;
  int backoff_ = kMinBackoff;
  std::atomic<bool> helper_lost_core_{false};
  std::atomic<int> num_helpers_{0};
  Phase phase_{};
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> num_tasks_{0};
  std::atomic<int64_t> num_done_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::mutex mutex_;
  std::condition_variable wake_;  // a phase has begun
  std::condition_variable done_;  // the last task of a phase has ended
};

std::atomic<Pool*> current_pool{nullptr};

// The pool is never destroyed: its threads may outlive every static object. A forked child has none of its parent's
// threads, so it starts with a pool of its own.
Pool& pool() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  (void)registered;
#endif
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    auto* made = new Pool;
    if (current_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

Team::Team(int num_threads) : has_helpers_(num_threads > 1 && pool().acquire(num_threads - 1)) {}

Team::~Team() {
  if (has_helpers_) pool().release();
}

void Team::run(const Phase& phase) {
  if (has_helpers_ && phase.num_tasks > 1) {
    pool().run(phase);
    return;
  }
  for (int64_t index = 0; index < phase.num_tasks; ++index) phase.task(phase.context, index, 0);
}

}  // namespace sparseadam
