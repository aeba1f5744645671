#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

namespace prefixmem {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t PAGES = size_t(32) << 10;
constexpr size_t SMALL = size_t(256) << 10;  // below, malloc keeps the pages itself

struct Block {
  void* data;
  size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::list<Block> blocks;  // the last freed first
  size_t bytes = 0, most = size_t(512) << 20;

  void free_down_to(size_t limit) {
    for (; bytes > limit; blocks.pop_back()) {
      bytes -= blocks.back().bytes;
      std::free(blocks.back().data);
    }
  }
};

Kept* kept = new Kept;

// A fork waits until no thread is at the list, so that its child finds it whole.
const int forks = pthread_atfork([] { kept->mutex.lock(); }, [] { kept->mutex.unlock(); }, [] { kept->mutex.unlock(); });

// Sizes come in steps of an eighth, so that a batch of nearly the same size finds the block of the last.
size_t rounded(size_t bytes) {
  size_t step = PAGES;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void free_all() {
  std::lock_guard<std::mutex> lock(kept->mutex);
  kept->free_down_to(0);
}

}  // namespace

void* take(size_t bytes) {
  if (bytes < SMALL) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, bytes) != 0) throw std::bad_alloc();
    return block;
  }
  size_t size = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(kept->mutex);
    for (auto block = kept->blocks.begin(); block != kept->blocks.end(); ++block) {
      if (block->bytes != size) continue;
      void* data = block->data;
      kept->bytes -= size;
      kept->blocks.erase(block);
      return data;
    }
  }
  const size_t boundary = size < HUGE_PAGE ? PAGES : HUGE_PAGE;
  void* data = nullptr;
  if (posix_memalign(&data, boundary, size) != 0) {
    free_all();
    if (posix_memalign(&data, boundary, size) != 0) throw std::bad_alloc();
  }
#ifdef MADV_HUGEPAGE
  if (size >= HUGE_PAGE) madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

void give(void* block, size_t bytes) {
  if (bytes < SMALL) return std::free(block);
  size_t size = rounded(bytes);
  std::lock_guard<std::mutex> lock(kept->mutex);
  kept->blocks.push_front({block, size});
  kept->bytes += size;
  kept->free_down_to(kept->most);
}

size_t keep_at_most(size_t bytes) {
  std::lock_guard<std::mutex> lock(kept->mutex);
  size_t before = kept->most;
  kept->most = bytes;
  kept->free_down_to(bytes);
  return before;
}

size_t bytes_kept() {
  std::lock_guard<std::mutex> lock(kept->mutex);
  return kept->bytes;
}

}  // namespace prefixmem
