// How a launcher gets threads: the caller brings them, so that kernels need to know of no thread pool.
#pragma once

namespace l2l {

struct Parallel {
  int threads;  // how many may run together, the calling one included
  // Calls body(context, worker) for worker = 0 .. workers-1, together where it can, and returns when all have returned.
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);
};

}  // namespace l2l
