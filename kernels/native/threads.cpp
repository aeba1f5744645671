#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace prefixmem {
namespace {

// How long a thread that is out of work looks for more before it sleeps: a backward pass has several loops in a row,
// and to wake a thread takes longer than some of them.
constexpr auto STAYS_AWAKE = std::chrono::microseconds(30);

struct Pool {
  std::mutex mutex;
  std::condition_variable begins, ends;
  const std::function<void(int64_t)>* work = nullptr;  // of the loop under way
  int64_t chunks = 0;
  int wanted = 0, inside = 0, size = 0;  // threads that may still join, that have joined, that there are
  std::atomic<uint64_t> loops{0};
  std::atomic<int64_t> next{0};
  std::atomic<bool> taken{false};

  void take_chunks(const std::function<void(int64_t)>& work, int64_t chunks) {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) work(chunk);
  }

  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      if (loops.load() == seen) {
        lock.unlock();
        auto until = std::chrono::steady_clock::now() + STAYS_AWAKE;
        while (loops.load() == seen && std::chrono::steady_clock::now() < until) std::this_thread::yield();
        lock.lock();
      }
      begins.wait(lock, [&] { return loops.load() != seen; });
      seen = loops.load();
      if (work == nullptr || wanted == 0) continue;
      --wanted;
      ++inside;
      auto* joined = work;
      int64_t total = chunks;
      lock.unlock();
      take_chunks(*joined, total);
      lock.lock();
      if (--inside == 0) ends.notify_one();
    }
  }

  void run(int64_t total, int threads, const std::function<void(int64_t)>& given) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      while (size < threads - 1) {
        try {
          std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
          break;  // no more threads are to be had: the loop runs on those that there are
        }
        ++size;
      }
      work = &given;
      chunks = total;
      next.store(0);
      wanted = threads - 1;
      loops.fetch_add(1);
    }
    for (int i = 1; i < threads; ++i) begins.notify_one();
    take_chunks(given, total);
    std::unique_lock<std::mutex> lock(mutex);
    work = nullptr;
    wanted = 0;
    ends.wait(lock, [&] { return inside == 0; });
  }
};

// Never deleted: its threads sleep until the process ends.
Pool* pool = new Pool;

// The child of a fork has none of the threads, and a mutex that one of them may have held.
const int forks = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel(int64_t chunks, int threads, const std::function<void(int64_t)>& work) {
  Pool* mine = pool;
  if (threads > chunks) threads = int(chunks);
  if (threads <= 1 || mine->taken.exchange(true)) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
    return;
  }
  mine->run(chunks, threads, work);
  mine->taken.store(false);
}

}  // namespace prefixmem
