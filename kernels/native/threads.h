// Threads that take the chunks of a loop. The caller takes chunks too, and waits for no thread that has not begun: on a
// machine whose cores are busy with something else it does the work itself.
#pragma once
#include <cstdint>
#include <functional>

namespace prefixmem {

// Calls work(chunk) for every chunk of 0 .. chunks - 1, each once, on at most `threads` threads. A second caller at the
// same time, and a call from inside `work`, run on their own thread. `work` must not throw.
void parallel(int64_t chunks, int threads, const std::function<void(int64_t)>& work);

}  // namespace prefixmem
