#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace prefixmem {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Loop {
  const std::function<void(int64_t)>& work;
  const int64_t chunks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void take_chunks() {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      try {
        work(chunk);
      } catch (...) {
        failed.store(true);
      }
    }
  }
};

// The threads that work for one caller, until it has no more loops.
struct Team {
  std::atomic<Loop*> loop{nullptr};
  std::atomic<int> inside{0};  // threads that may be at the loop
  std::atomic<bool> over{false};

  void serve() {
    constexpr int SPINS = 2000;  // some ten microseconds, then whoever waits for the core gets it
    for (int idle = 0; !over.load();) {
      inside.fetch_add(1);
      Loop* mine = loop.load();
      const bool works = mine != nullptr && mine->next.load(std::memory_order_relaxed) < mine->chunks;
      if (works) mine->take_chunks();
      inside.fetch_sub(1);
      idle = works ? 0 : idle + 1;
      if (idle > SPINS)
        sched_yield();
      else
        pause();
    }
  }

  void run(Loop& given) {
    loop.store(&given);
    given.take_chunks();
    loop.store(nullptr);
    for (int waited = 0; inside.load() > 0; ++waited) waited > 2000 ? void(sched_yield()) : pause();
  }
};

thread_local Team* team = nullptr;  // of this thread, which is its caller

// Threads of our own, where there is no OpenMP: they wait for a team, and one caller at a time has them.
struct Pool {
  std::mutex mutex;
  std::condition_variable begins, ends;
  Team* served = nullptr;
  int wanted = 0, members = 0, size = 0;
  std::atomic<bool> taken{false};

  void wait_and_serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      begins.wait(lock, [&] { return wanted > 0; });
      --wanted, ++members;
      Team* mine = served;
      lock.unlock();
      mine->serve();
      lock.lock();
      if (--members == 0) ends.notify_one();
    }
  }

  void begin(Team& given, int others) {
    std::lock_guard<std::mutex> lock(mutex);
    for (; size < others; ++size) {
      try {
        std::thread(&Pool::wait_and_serve, this).detach();
      } catch (const std::system_error&) {
        break;  // no more are to be had: the loops run on those that there are
      }
    }
    served = &given, wanted = others;
    begins.notify_all();
  }

  void end() {
    std::unique_lock<std::mutex> lock(mutex);
    wanted = 0;
    ends.wait(lock, [&] { return members == 0; });
  }
};

Pool* pool = new Pool;  // never deleted: its threads sleep until the process ends
std::atomic<OpenMP> openmp{nullptr};

// The child of a fork has none of the threads, and OpenMP does not work there any more.
const int forks = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  openmp.store(nullptr);
  team = nullptr;
});

void work_with(Team& mine, const std::function<void()>& work, std::exception_ptr& error) {
  team = &mine;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  team = nullptr;
  mine.over.store(true);
}

}  // namespace

void use_openmp(OpenMP parallel) { openmp.store(parallel); }

void with_threads(int threads, const std::function<void()>& work) {
  if (threads <= 1 || team != nullptr) return work();
  Team mine;
  std::exception_ptr error;
  if (OpenMP begin = openmp.load()) {
    struct Region {
      Team& team;
      const std::function<void()>& work;
      std::exception_ptr& error;
      pthread_t caller;
    } region{mine, work, error, pthread_self()};
    begin([](void* data) {
      auto& region = *static_cast<Region*>(data);
      if (pthread_equal(pthread_self(), region.caller))
        work_with(region.team, region.work, region.error);
      else
        region.team.serve();
    }, &region, unsigned(threads), 0);
  } else {
    Pool* own = pool;
    const bool has_it = !own->taken.exchange(true);
    if (has_it) own->begin(mine, threads - 1);
    work_with(mine, work, error);
    if (has_it) {
      own->end();
      own->taken.store(false);
    }
  }
  if (error) std::rethrow_exception(error);
}

void parallel(int64_t chunks, int threads, const std::function<void(int64_t)>& work) {
  if (threads > 1 && chunks > 1 && team == nullptr)
    return with_threads(int(std::min<int64_t>(threads, chunks)), [&] { parallel(chunks, threads, work); });
  Loop loop{work, chunks};
  if (threads > 1 && chunks > 1 && team != nullptr && team->loop.load() == nullptr)
    team->run(loop);
  else
    loop.take_chunks();
  if (loop.failed.load()) throw std::bad_alloc();
}

}  // namespace prefixmem
