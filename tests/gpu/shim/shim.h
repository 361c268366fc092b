// CUDA kernels on the CPU, unchanged: what a .cu file of net/gpu needs of CUDA, in plain C++.
//
// A launch runs block after block. The threads of a block are fibers on one CPU thread, each with its own stack: a
// fiber runs until it reaches a barrier or a shuffle, and goes on when the others have arrived too. Their order
// between barriers is forward, reversed or random, because a missing barrier gives the right answer in one of them.
// Shared memory is filled with NaN before each block. With -DSHIM_DIRECT threads run one after the other without
// fibers (for kernels that have no barrier); with -DSHIM_THREADS each is a thread of the operating system, for the
// thread sanitizer.
//
// Not imitated: coalescing, bank conflicts, divergence, flush of subnormals, atomics' disorder. Static shared memory
// is refused by the build; kernels use the dynamic kind.

#pragma once
#define SHIM 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef SHIM_THREADS
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__

struct shim_index {
    unsigned x = 0, y = 0, z = 0;
};

#ifdef SHIM_THREADS
#define SHIM_LOCAL thread_local
#else
#define SHIM_LOCAL
#endif

static SHIM_LOCAL shim_index threadIdx, blockIdx, blockDim, gridDim;

template <class A, class B>
inline auto min(A a, B b) -> typename std::common_type<A, B>::type { return b < a ? b : a; }
template <class A, class B>
inline auto max(A a, B b) -> typename std::common_type<A, B>::type { return a < b ? b : a; }

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { int bits; std::memcpy(&bits, &x, 4); return bits; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::isnan;

namespace shim {

static unsigned char* shared_memory = nullptr;
static const char* error = nullptr;

// xorshift: <random> would double the time a build takes.
struct Random {
    uint32_t state;
    explicit Random(unsigned seed) : state(seed * 2654435761u | 1u) {}
    unsigned below(unsigned n) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state % n;
    }
    void shuffle(std::vector<unsigned>& values) {
        for (unsigned i = values.size(); i > 1; i--) std::swap(values[i - 1], values[below(i)]);
    }
};

#if defined(SHIM_DIRECT)

inline void fail_direct() { error = "this kernel synchronises, but was built to run without"; }
#define __syncthreads() shim::fail_direct()
template <class F>
inline void run_block(unsigned threads, const std::vector<unsigned>& order, F&& body, Random&) {
    for (unsigned t : order) {
        threadIdx.x = t;
        body();
    }
}
template <class T>
inline T shuffle(unsigned, T x, unsigned) { fail_direct(); return x; }
inline const void* const* exchange(const void*) { fail_direct(); std::abort(); }
inline void warp_barrier() { fail_direct(); }

#elif defined(SHIM_THREADS)

// A barrier whose number of participants shrinks when threads return.
struct Barrier {
    std::mutex mutex;
    std::condition_variable changed;
    unsigned expected = 0, arrived = 0, round = 0;
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        unsigned now = round;
        if (++arrived == expected) {
            arrived = 0;
            round++;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return round != now; });
        }
    }
    void leave() {
        std::unique_lock<std::mutex> lock(mutex);
        expected--;
        if (expected > 0 && arrived == expected) {
            arrived = 0;
            round++;
            changed.notify_all();
        }
    }
};
static Barrier block_barrier;
static std::vector<std::unique_ptr<Barrier>> warp_barriers;
static std::vector<uint32_t> slots;
static std::vector<const void*> offers;
#define __syncthreads() shim::block_barrier.wait()

template <class F>
inline void run_block(unsigned threads, const std::vector<unsigned>& order, F&& body, Random&) {
    block_barrier.expected = threads;
    block_barrier.arrived = 0;
    warp_barriers.clear();
    slots.assign(threads, 0);
    offers.assign(threads, nullptr);
    for (unsigned w = 0; w < (threads + 31) / 32; w++) {
        warp_barriers.emplace_back(new Barrier);
        warp_barriers.back()->expected = std::min(32u, threads - 32 * w);
    }
    shim_index block = blockIdx, dim = blockDim, grid = gridDim;
    std::vector<std::thread> running;
    for (unsigned t : order)
        running.emplace_back([&, t] {
            blockIdx = block;
            blockDim = dim;
            gridDim = grid;
            threadIdx.x = t;
            body();
            block_barrier.leave();
            warp_barriers[t / 32]->leave();
        });
    for (auto& thread : running) thread.join();
}
template <class T>
inline T shuffle(unsigned, T x, unsigned from) {
    static_assert(sizeof(T) == 4, "32-bit values only");
    unsigned t = threadIdx.x;
    std::memcpy(&slots[t], &x, 4);
    warp_barriers[t / 32]->wait();
    T result;
    std::memcpy(&result, &slots[t / 32 * 32 + from], 4);
    warp_barriers[t / 32]->wait();
    return result;
}
inline const void* const* exchange(const void* mine) {
    unsigned t = threadIdx.x;
    offers[t] = mine;
    warp_barriers[t / 32]->wait();
    return &offers[t / 32 * 32];
}
inline void warp_barrier() { warp_barriers[threadIdx.x / 32]->wait(); }

#else  // fibers

#if defined(__x86_64__)
extern "C" void shim_switch(void** save, void* load);
__asm__(
    ".text\n.p2align 4\n.local shim_switch\n.type shim_switch,@function\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size shim_switch,.-shim_switch\n");
#else
#include <ucontext.h>
#endif

enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };
#if defined(SHIM_SANITIZED)
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    unsigned char* stack = nullptr;
    State state = READY;
    int line = 0;       // of the barrier it waits at
    unsigned mask = 0;  // of the shuffle it waits at
    bool shuffles = false;
    uint32_t slot = 0, seen[32];
    const void* offer = nullptr;
};

static std::vector<Fiber> fibers;
static std::vector<const void*> offers;
static unsigned running = 0;
static void (*entry)(void*) = nullptr;
static void* entry_argument = nullptr;
#if defined(__x86_64__)
static void* scheduler = nullptr;
#else
static ucontext_t scheduler;
#endif

inline void leave() {
#if defined(__x86_64__)
    shim_switch(&fibers[running].stack_pointer, scheduler);
#else
    swapcontext(&fibers[running].context, &scheduler);
#endif
}
inline void enter(unsigned t) {
    running = t;
    threadIdx.x = t;
#if defined(__x86_64__)
    shim_switch(&scheduler, fibers[t].stack_pointer);
#else
    swapcontext(&scheduler, &fibers[t].context);
#endif
}
static void fiber_main() {
    entry(entry_argument);
    fibers[running].state = DONE;
    leave();
    std::abort();
}
inline void prepare(Fiber& f) {
    if (!f.stack) f.stack = static_cast<unsigned char*>(std::malloc(STACK));
    f.state = READY;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(f.stack + STACK - 64);
    top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--top = nullptr;  // fiber_main's return address: it never returns; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
}

inline void barrier(int line) {
    Fiber& f = fibers[running];
    f.state = AT_BARRIER;
    f.line = line;
    leave();
}
#define __syncthreads() shim::barrier(__LINE__)

template <class T>
inline T shuffle(unsigned mask, T x, unsigned from) {
    static_assert(sizeof(T) == 4, "32-bit values only");
    unsigned me = running;
    Fiber& f = fibers[me];
    std::memcpy(&f.slot, &x, 4);
    f.mask = mask;
    f.shuffles = true;
    f.state = AT_SHUFFLE;
    leave();
    T result;
    std::memcpy(&result, &fibers[me].seen[from], 4);
    return result;
}

// What the tensor cores' instructions are made of: every lane of the warp shows the others an address. What lies there
// must stay until all have passed a warp_barrier.
inline const void* const* exchange(const void* mine) {
    unsigned me = running;
    Fiber& f = fibers[me];
    f.offer = mine;
    f.mask = ~0u;
    f.shuffles = false;
    f.state = AT_SHUFFLE;
    leave();
    return &offers[me / 32 * 32];
}
inline void warp_barrier() { exchange(nullptr); }

// One warp: if every lane of the mask waits at the shuffle, hand round the values and let them go on.
inline bool release_warp(unsigned first, unsigned threads) {
    unsigned last = std::min(first + 32, threads), mask = 0, waiting = 0;
    for (unsigned t = first; t < last; t++)
        if (fibers[t].state == AT_SHUFFLE) {
            mask |= fibers[t].mask;
            waiting |= 1u << (t - first);
        }
    if (!waiting || (mask & ~waiting)) return false;
    for (unsigned t = first; t < last; t++) {
        if (fibers[t].state != AT_SHUFFLE) continue;
        offers[t] = fibers[t].offer;
        if (fibers[t].shuffles)
            for (unsigned u = first; u < last; u++) fibers[t].seen[u - first] = fibers[u].slot;
        fibers[t].state = READY;
    }
    return true;
}

template <class F>
inline void run_block(unsigned threads, std::vector<unsigned> order, F&& body, Random& random, bool shuffle) {
    if (fibers.size() < threads) fibers.resize(threads), offers.resize(threads);
    entry = [](void* f) { (*static_cast<typename std::remove_reference<F>::type*>(f))(); };
    entry_argument = &body;
    for (unsigned t = 0; t < threads; t++) prepare(fibers[t]);
    for (;;) {
        if (shuffle) random.shuffle(order);
        for (unsigned t : order)
            if (fibers[t].state == READY) enter(t);
        bool released = false;
        for (unsigned first = 0; first < threads; first += 32) released |= release_warp(first, threads);
        if (released) continue;
        unsigned done = 0, at_barrier = 0, at_shuffle = 0;
        int line = 0, other = 0;
        for (unsigned t = 0; t < threads; t++) {
            done += fibers[t].state == DONE;
            at_shuffle += fibers[t].state == AT_SHUFFLE;
            if (fibers[t].state == AT_BARRIER) {
                at_barrier++;
                if (line && fibers[t].line != line) other = fibers[t].line;
                line = fibers[t].line;
            }
        }
        if (done == threads) return;
        if (at_shuffle) {
            error = "a shuffle waits for lanes that have returned or wait at a barrier";
            return;
        }
        if (other) {
            error = "threads of one block wait at different barriers";
            return;
        }
        for (unsigned t = 0; t < threads; t++)
            if (fibers[t].state == AT_BARRIER) fibers[t].state = READY;
    }
}
#endif

enum Order { FORWARD, REVERSED, RANDOM };

inline std::vector<unsigned> make_order(unsigned n, int order, Random& random) {
    std::vector<unsigned> result(n);
    for (unsigned i = 0; i < n; i++) result[i] = order == REVERSED ? n - 1 - i : i;
    if (order == RANDOM) random.shuffle(result);
    return result;
}

template <class... P, size_t... I>
inline const char* launch(
    void (*kernel)(P...), const unsigned* grid, unsigned threads, size_t shared, void** args, int order, unsigned seed,
    std::index_sequence<I...>) {
    Random random(seed);
    error = nullptr;
    gridDim.x = grid[0];
    gridDim.y = grid[1];
    gridDim.z = grid[2];
    blockDim.x = threads;
    blockDim.y = blockDim.z = 1;
    // Of exactly the size asked for, so that the address sanitizer sees what lies beyond.
    shared_memory = static_cast<unsigned char*>(std::malloc(shared ? shared : 1));
    auto body = [&] { kernel(*static_cast<P*>(args[I])...); };
    std::vector<unsigned> threads_order = make_order(threads, order, random);
    std::vector<unsigned> blocks = make_order(grid[0] * grid[1] * grid[2], order, random);
    for (unsigned b : blocks) {
        blockIdx.x = b % grid[0];
        blockIdx.y = b / grid[0] % grid[1];
        blockIdx.z = b / grid[0] / grid[1];
        std::memset(shared_memory, 0xff, shared);
#if defined(SHIM_DIRECT) || defined(SHIM_THREADS)
        run_block(threads, threads_order, body, random);
#else
        run_block(threads, threads_order, body, random, order == RANDOM);
#endif
        if (error) break;
    }
    std::free(shared_memory);
    shared_memory = nullptr;
    return error;
}

template <class... P>
inline const char* launch(
    void (*kernel)(P...), const unsigned* grid, unsigned threads, size_t shared, void** args, int order,
    unsigned seed) {
    return launch(kernel, grid, threads, shared, args, order, seed, std::index_sequence_for<P...>{});
}

template <class... P>
inline int parameter_sizes(void (*)(P...), int* sizes) {
    int all[] = {static_cast<int>(sizeof(P))..., 0};
    for (size_t i = 0; i < sizeof...(P); i++) sizes[i] = all[i];
    return sizeof...(P);
}

}  // namespace shim

inline unsigned shim_lane() { return threadIdx.x % 32; }
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, unsigned distance) {
    return shim::shuffle(mask, x, shim_lane() ^ distance);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned distance) {
    unsigned from = shim_lane() + distance;
    return shim::shuffle(mask, x, from < 32 ? from : shim_lane());
}
template <class T>
inline T __shfl_sync(unsigned mask, T x, unsigned from) {
    return shim::shuffle(mask, x, from % 32);
}
