// Things that are costly to make, kept from use to use. Uses by several Python threads at once each take their own.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace sparseadam {

// One T of all that are not in use, or a new one, for as long as this lives.
template <class T>
class Borrowed {
 public:
  Borrowed() : object_(take()) {}
  ~Borrowed() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    try {
      pool().idle.push_back(std::move(object_));
    } catch (const std::bad_alloc&) {  // then it is made anew next time
    }
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  T& operator*() { return *object_; }

 private:
  struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<T>> idle;
  };
  static Pool& pool() {
    static Pool instance;
    return instance;
  }
  static std::unique_ptr<T> take() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().idle.empty()) return std::make_unique<T>();
    auto object = std::move(pool().idle.back());
    pool().idle.pop_back();
    return object;
  }

  std::unique_ptr<T> object_;
};

// Makes room for `size` elements; what is in use stays.
template <class T>
void grow(std::vector<T>& buffer, int64_t size) {
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(static_cast<size_t>(size));
}

}  // namespace sparseadam
