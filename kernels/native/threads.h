// Threads that take the chunks of loops. The caller takes chunks too, and waits for no thread that has not begun one.
//
// They are those of PyTorch's OpenMP where it is there: after an operator of PyTorch they spin for some milliseconds, and
// other threads would share the cores with them.
#pragma once
#include <cstdint>
#include <functional>

namespace prefixmem {

// OpenMP's GOMP_parallel of this process: runs function(data) on so many threads, the caller among them.
using OpenMP = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(OpenMP parallel);

// Calls work(), and has at most threads - 1 others take chunks of the loops in it.
void with_threads(int threads, const std::function<void()>& work);

// Calls work(chunk) for every chunk of 0 .. chunks - 1, each once; returns when all are done. Outside of `with_threads`
// it gathers threads for this loop alone. Throws std::bad_alloc where a chunk did.
void parallel(int64_t chunks, int threads, const std::function<void(int64_t)>& work);

}  // namespace prefixmem
