// Memory and threads for the launchers.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "../parallel.h"
#include "../network.h"

namespace l2l {

// A thread is woken for no less work than this many multiply-adds: some 20 microseconds, a few times what waking costs.
constexpr double kWorthAThread = 1e6;

inline int useful_workers(const Parallel& parallel, const Network& net, double coordinate_steps) {
  double work = coordinate_steps * double(WeightLayout{net}.count());
  return int(std::clamp(work / kWorthAThread, 1.0, double(parallel.threads)));
}

// Uninitialised memory for each worker, aligned to cache lines.
template <class T>
class Scratch {
 public:
  Scratch(int workers, int64_t each) : each_((each + kLine - 1) / kLine * kLine) {
    data_.reset(static_cast<T*>(::operator new(sizeof(T) * each_ * workers, std::align_val_t(64))));
  }
  T* of(int worker) const { return data_.get() + each_ * worker; }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  static constexpr int64_t kLine = 64 / sizeof(T);
  int64_t each_;
  std::unique_ptr<T, Delete> data_;
};

// While it lives, results too small for a normal float become zero. Gradients that have all but vanished (a saturated
// unit's) would otherwise send the backward run into denormals, where it was measured to take 24 times as long. Inputs
// that are denormal still count as they are.
class FlushToZero {
 public:
#if defined(__SSE__)
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(saved_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  unsigned saved_;
#endif
};

// Calls f(worker, item) for item = 0 .. items - 1. Whoever is free takes a share of what is left, no fewer than `least`:
// neighbours go to one thread, since each tile calls for the memory of the next, and the last shares are small, so that
// all threads end together.
template <class F>
void share(const Parallel& parallel, int workers, int64_t items, int64_t least, const F& f) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t items, least;
    int workers;
    const F& f;
  } context{{0}, items, least, workers, f};
  auto body = [](void* pointer, int worker) {
    const FlushToZero flush;
    Context& c = *static_cast<Context*>(pointer);
    for (int64_t start = c.next; start < c.items; start = c.next) {
      const int64_t size = std::max(c.least, (c.items - start) / (4 * c.workers));
      if (!c.next.compare_exchange_strong(start, start + size)) continue;
      for (int64_t item = start; item < std::min(start + size, c.items); ++item) c.f(worker, item);
    }
  };
  if (workers <= 1) return body(&context, 0);
  parallel.run(workers, body, &context);
}

}  // namespace l2l
