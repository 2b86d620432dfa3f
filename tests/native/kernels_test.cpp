// The kernels without torch, for the sanitizers: every option at awkward sizes, with buffers of the exact size, and the
// approximations held to their bounds. Built and run by csrc/sanitize.sh and by test_sanitized.py.
#include <string>
#include <thread>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/schedule.h"
#include "../kernel_cases.h"
#include "approximations.h"

using namespace l2l;

namespace {

void run_threads(int workers, void (*body)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

struct TwoThreads {
  Parallel parallel = {2, run_threads};

  void step(const StepArguments& arguments) const { lstm_step_cpu(arguments, parallel); }
  void step_scaled(const StepArguments& arguments, const UpdateSizes& sizes) const {
    lstm_step_scaled_cpu(arguments, sizes, parallel);
  }
  void update_sizes(const StepArguments& arguments, const UpdateSizes& sizes, void* found) const {
    lstm_update_sizes_cpu(arguments, sizes, found, parallel);
  }
  void unroll(const UnrollArguments& arguments, const Matrix& updates, const Matrix& last) const {
    lstm_unroll_cpu(arguments, updates, last, parallel);
  }
  void unroll_backward(const UnrollArguments& arguments, const UnrollGradients& gradients) const {
    lstm_unroll_backward_cpu(arguments, gradients, parallel);
  }
};

// Every item goes to one thread once, and most of a thread's neighbours are its own.
void share_all() {
  for (int workers : {1, 2, 3})
    for (int64_t items : {0, 1, 5, 100, 10000})
      for (int64_t least : {1, 4}) {
        std::vector<std::atomic<int>> visits(items);
        std::vector<int> owner(items);
        share({workers, run_threads}, workers, items, least, [&](int worker, int64_t item) {
          ++visits[item];
          owner[item] = worker;
        });
        int64_t once = 0, borders = 0;
        for (int64_t i = 0; i < items; ++i) once += visits[i] == 1;
        for (int64_t i = 1; i < items; ++i) borders += owner[i] != owner[i - 1];
        expect(once == items, "share visits every item once");
        expect(borders <= 64 + items / 100, "share gives neighbours to one thread");
      }
}

}  // namespace

int main() {
  share_all();
  std::vector<std::string> isas = cpu_isas();
  for (const std::string& isa : cpu_bf16_isas()) isas.push_back(isa);
  for (const std::string& isa : isas) {
    std::printf("%s\n", isa.c_str());
    use_cpu_isa(isa);
    for (Features features : {Features::identity, Features::log_sign, Features::moments, Features::both})
      for (int hidden : {1, 5, 20, 33})
        for (int layers : {1, 2, 3})
          for (bool projection : {false, true})
            for (int64_t count : {0, 1, 9, 63, 64, 65, 200}) {
              const bool linear_path = (hidden + layers) % 2;
              const Network net = {features, hidden, layers, projection, projection, linear_path,
                                   0.1,      10,     0.95,   0.95,       1e-8};
              run<float>(net, count, 1 + count % 3, DType::float32, TwoThreads());
              if (count < 64) run<double>(net, count, 2, DType::float64, TwoThreads());
            }
  }
  for (const Approximations& approximations : all_approximations()) {
    std::printf(
        "%-9s exp2 %.2e  log %.2e  sigmoid %.2e  tanh %.2e\n", approximations.name, exp2_error(approximations),
        log_error(approximations), sigmoid_error(approximations), tanh_error(approximations));
    expect(exp2_error(approximations) <= 2e-7, "exp2 within its bound");
    expect(log_error(approximations) <= 1, "log within its bound");
    expect(sigmoid_error(approximations) <= 1.5e-7, "sigmoid within its bound");
    expect(tanh_error(approximations) <= 2e-7, "tanh within its bound");
    expect(special_values(approximations), "zeros, infinities and NaN");
  }
  return verdict();
}
