// Fibers and what they wait for. One operating system thread, so nothing here is locked. A fiber that has run
// a kernel waits for the next: contexts are made once, and switched without a system call.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32;
constexpr char kPoison[] = {'\0', '\xa5'};  // each block has one of them: indices that exist, and that do not

// Threads that meet, all of a block or of a warp, and what each has brought.
struct Meeting {
  const char* what = nullptr;
  unsigned size = 0, arrived = 0, left = 0;
  std::vector<uint64_t> coming, values;  // of the meeting that is gathering, of the one that took place last
  uint64_t turn = 0;
};

struct Fiber {
  jmp_buf place;  // where it waits
  bool is_started = false, has_ended = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  dim3 index;
  Meeting* waits_for = nullptr;
  uint64_t turn = 0;  // of the meeting that it waits for
};

std::mt19937_64 rng{std::random_device{}()};
jmp_buf scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> meetings;  // the block's, then each warp's
unsigned current;
char poison;  // of the block that runs
const std::function<void()>* running_kernel;
std::map<std::pair<std::string, int>, std::vector<char>> shared_arrays;
std::map<void*, std::vector<std::function<void()>>> captured;

[[noreturn]] void fail(const char* what, const char* other) {
  std::fprintf(stderr, "emulator: block (%u, %u), thread %u: %s while others of its group %s\n", blockIdx.x,
               blockIdx.y, current, what, other);
  std::abort();
}

// A thread that has ended will not come to any meeting any more.
void leave(Meeting& meeting) {
  ++meeting.left;
  if (meeting.arrived > 0) fail("ends", meeting.what);
}

void wait(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    (*running_kernel)();
    leave(meetings[0]);
    leave(meetings[1 + current / kWarp]);
    fibers[current]->has_ended = true;
    wait(*fibers[current]);
  }
}

// Until it waits.
void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.place, 1);
  fiber.is_started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

const uint64_t* meet(Meeting& meeting, unsigned place, const char* what, uint64_t value) {
  if (meeting.left > 0) fail(what, "have ended");
  if (meeting.arrived > 0 && std::strcmp(meeting.what, what) != 0) fail(what, meeting.what);
  meeting.what = what;
  meeting.coming[place] = value;
  if (++meeting.arrived == meeting.size) {
    std::swap(meeting.coming, meeting.values);
    meeting.arrived = 0;
    ++meeting.turn;
  }
  // Also the last to arrive waits: anyone may go on first.
  Fiber& fiber = *fibers[current];
  fiber.waits_for = &meeting;
  fiber.turn = meeting.turn + (meeting.arrived > 0 ? 1 : 0);
  wait(fiber);
  return meeting.values.data();
}

bool can_run(const Fiber& fiber) { return fiber.waits_for == nullptr || fiber.waits_for->turn >= fiber.turn; }

void run_block(unsigned num_threads) {
  poison = kPoison[rng() % 2];
  for (auto& [place, bytes] : shared_arrays) std::fill(bytes.begin(), bytes.end(), poison);
  const unsigned num_warps = (num_threads + kWarp - 1) / kWarp;
  meetings.assign(1 + num_warps, {});
  for (unsigned m = 0; m < meetings.size(); ++m) {
    const unsigned size = m == 0 ? num_threads : std::min(kWarp, num_threads - (m - 1) * kWarp);
    meetings[m].size = size;
    meetings[m].coming.resize(size);
    meetings[m].values.resize(size);
  }
  std::vector<unsigned> alive(num_threads);
  for (unsigned t = 0; t < num_threads; ++t) {
    if (t == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers[t];
    fiber.has_ended = false;
    fiber.index = dim3(t % blockDim.x, t / blockDim.x);
    fiber.waits_for = nullptr;
    alive[t] = t;
  }
  std::shuffle(alive.begin(), alive.end(), rng);
  while (!alive.empty()) {
    bool moved = false;
    for (size_t i = alive.size(); i-- > 0;) {
      Fiber& fiber = *fibers[alive[i]];
      if (!can_run(fiber)) continue;
      moved = true;
      current = alive[i];
      threadIdx = fiber.index;
      fiber.waits_for = nullptr;
      resume(fiber);
      if (fiber.has_ended) {
        alive[i] = alive.back();
        alive.pop_back();
      }
    }
    if (!moved) fail("waits", "never come");
    std::shuffle(alive.begin(), alive.end(), rng);
  }
}

}  // namespace

namespace emulator {

int mistake() {
  static const char* const number = std::getenv("CUDA_EMULATOR_MISTAKE");
  static const int chosen = number == nullptr ? 0 : std::atoi(number);
  return chosen;
}

void enqueue(void* stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
  } else {
    captured[stream].push_back(std::move(work));
  }
}

void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& kernel) {
  running_kernel = &kernel;
  gridDim = blocks;
  blockDim = threads;
  std::vector<unsigned> order(blocks.x * blocks.y);
  for (unsigned b = 0; b < order.size(); ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), rng);
  for (unsigned b : order) {
    blockIdx = dim3(b % blocks.x, b / blocks.x);
    run_block(threads.x * threads.y);
  }
}

const uint64_t* meet_block(const char* what, uint64_t value) {
  return meet(meetings[0], current, what, value);
}

const uint64_t* meet_warp(const char* what, uint64_t value) {
  return meet(meetings[1 + current / kWarp], current % kWarp, what, value);
}

unsigned lane() { return current % kWarp; }

int count_block(const uint64_t* values) {
  int count = 0;
  for (unsigned t = 0; t < meetings[0].size; ++t) count += values[t] != 0;
  return count;
}

void* shared_memory(const char* file, int line, size_t bytes) {
  auto& memory = shared_arrays[{file, line}];
  if (memory.size() < bytes) memory.assign(bytes, poison);
  return memory.data();
}

}  // namespace emulator

// CUDA_EMULATOR_STALE is a mistake to be found: replays that do nothing.
extern "C" void cuda_emulator_replay(void* stream) {
  if (std::getenv("CUDA_EMULATOR_STALE") != nullptr) return;
  for (const auto& work : captured[stream]) work();
}
