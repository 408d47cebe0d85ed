// Numbered tasks, shared by the threads that come.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace chunks {

// Two rows of tasks: those of the second begin when all of the first are done. A thread that comes
// late finds nothing to do, and touches nothing but this.
class Tasks {
 public:
  Tasks(int64_t first, int64_t second) : first_(first), all_(first + second) {}

  template <class First, class Second>
  void work(const First& first, const Second& second) {
    for (int64_t task; (task = next_.fetch_add(1)) < all_; done_.fetch_add(1)) {
      if (task < first_) {
        first(task);
      } else {
        wait_for(first_);
        second(task - first_);
      }
    }
  }

  void wait() const { wait_for(all_); }

 private:
  // Tasks that are not done are being done: no thread holds one that it does not work on.
  void wait_for(int64_t done) const {
    while (done_.load() < done) std::this_thread::yield();
  }

  const int64_t first_, all_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Has a function called on another thread: now, later, or never.
using Schedule = std::function<void(std::function<void()>)>;

// Runs both rows of tasks here and on up to `helpers` other threads, no more than have work. What
// tasks find depends on no thread.
template <class First, class Second>
void run_tasks(int64_t first_count, int64_t second_count, int64_t helpers, const Schedule& schedule,
               const First& first, const Second& second) {
  auto tasks = std::make_shared<Tasks>(first_count, second_count);
  helpers = std::min(helpers, std::max(first_count, second_count) - 1);
  // The functions are on this stack: whoever gets a task gets it before `wait` returns.
  for (int64_t i = 0; i < helpers; i++)
    schedule([tasks, &first, &second] { tasks->work(first, second); });
  tasks->work(first, second);
  tasks->wait();
}

// The same of one row.
template <class What>
void run_tasks(int64_t count, int64_t helpers, const Schedule& schedule, const What& what) {
  run_tasks(count, 0, helpers, schedule, what, [](int64_t) {});
}

// Memory of calls that are over, for those to come: pages that are new cost more than they hold.
// Buffers of more than `most` floats are not kept.
class Buffers {
 public:
  explicit Buffers(size_t most = SIZE_MAX) : most_(most) {}

  std::vector<float> take(size_t size) {
    std::vector<float> buffer;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        buffer = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (buffer.size() < size) buffer = std::vector<float>(size);
    return buffer;
  }

  void give_back(std::vector<float> buffer) {
    if (buffer.size() > most_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }

 private:
  const size_t most_;
  std::mutex mutex_;
  std::vector<std::vector<float>> free_;
};

}  // namespace chunks
