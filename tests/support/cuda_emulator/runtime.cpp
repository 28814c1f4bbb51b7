// Launches kernels on the host: blocks one after another in a shuffled order, their threads as
// fibers that take turns at barriers and warp primitives.
//
// Shared memory is NaN when a block begins. What a GPU would leave undefined ends the launch with
// an error: barriers that not all threads reach, warp primitives that not all lanes reach, writes
// beyond dynamic shared memory, indices beyond an array's size, misaligned or null addresses.

#include "kernel.cuh"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include <link.h>
#include <sys/mman.h>

#include "context.h"

extern "C" void* __tls_get_addr(void*);

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t STACK = 256 << 10, PAGE = 64 << 10, GUARD = 1024, MAX_SHARED = 1 << 20;
// What a warp's lanes keep at the same depth of their stacks would share a few sets of the cache.
constexpr size_t STAGGER = 128;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned char POISON = 0xff, GUARD_BYTE = 0xfe;

struct Copy {
    void* target;
    const void* source;
    bool valid;
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    std::deque<std::vector<Copy>> groups;  // The last one is open.
};

// A warp's lanes that have reached a primitive.
struct Warp {
    const char* what;
    Combine combine;
    void* records[LANES];
    unsigned lanes[LANES], n_waiting;
};

struct Launch {
    void (*kernel)(const void*);
    const void* args;
    Context main;
    unsigned n_threads, n_done, current;
    size_t shared;
    char *statics, *message;
    size_t static_bytes;
    std::vector<unsigned> queue;  // Threads that can go on, from `head`.
    size_t head;
    unsigned at_barrier, line;
    bool running, failed, is_rehearsal;
};

Launch now;
Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / LANES];
alignas(128) char shared_memory[GUARD + MAX_SHARED + GUARD];
char error[512];

void resume(unsigned thread, Context& from) {
    now.current = threadIdx.x = thread;
    switch_context(from, fibers[thread].context);
}

// Lets other threads run until this one is put into the queue again.
void suspend() {
    Context& mine = fibers[now.current].context;
    if (now.head == now.queue.size()) {
        switch_context(mine, now.main);
        return;
    }
    resume(now.queue[now.head++], mine);
}

void run_thread() {
    now.kernel(now.args);
    now.n_done++;
    suspend();
}

void start_fiber(unsigned thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) {
        void* p = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) std::abort();
        mprotect(p, PAGE, PROT_NONE);
        fiber.stack = static_cast<char*>(p) + PAGE;
    }
    make_context(fiber.context, fiber.stack, STACK - thread % LANES * STAGGER, run_thread);
    fiber.groups.clear();
}

// Says where the threads are that did not end, once none can go on.
void fail_stuck() {
    int n =
        std::snprintf(error, sizeof(error), "%u of %u threads returned", now.n_done, now.n_threads);
    const auto add = [&](const char* format, auto... values) {
        n += std::snprintf(error + n, sizeof(error) - static_cast<size_t>(n), format, values...);
    };
    if (now.at_barrier) add(", %u wait at __syncthreads of line %u", now.at_barrier, now.line);
    for (unsigned w = 0; w < now.n_threads / LANES + 1 && n < 400 && w < MAX_THREADS / LANES; w++)
        if (warps[w].n_waiting)
            add(", %u lanes of warp %u wait at %s", warps[w].n_waiting, w, warps[w].what);
    now.failed = true;
}

void run_block(std::mt19937_64& rng) {
    const unsigned n = now.n_threads;
    char* dynamic = dynamic_shared();
    std::memset(dynamic, POISON, now.shared);
    std::memset(dynamic + now.shared, GUARD_BYTE, GUARD);
    if (now.static_bytes) std::memset(now.statics, POISON, now.static_bytes);
    now.queue.resize(n);
    for (unsigned i = 0; i < n; i++) {
        start_fiber(i);
        now.queue[i] = i;
    }
    for (unsigned i = n - 1; i > 0; i--) std::swap(now.queue[i], now.queue[rng() % (i + 1)]);
    for (Warp& warp : warps) warp.n_waiting = 0;
    now.n_done = now.at_barrier = 0;
    now.head = 1;
    resume(now.queue[0], now.main);
    if (!now.failed && now.n_done < n) fail_stuck();
    for (const char* guard : {dynamic - GUARD, dynamic + now.shared})
        for (size_t i = 0; i < GUARD && !now.failed; i++)
            if (static_cast<unsigned char>(guard[i]) != GUARD_BYTE) {
                std::snprintf(error, sizeof(error), "a write at byte %ld of %zu of shared memory",
                              static_cast<long>(guard + i - dynamic), now.shared);
                now.failed = true;
            }
}

// The thread's part of the thread-local storage of the library that the kernel is in.
int find_statics(dl_phdr_info* info, size_t, void*) {
    bool is_it = false;
    size_t size = 0;
    const auto kernel = reinterpret_cast<ElfW(Addr)>(now.kernel);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& part = info->dlpi_phdr[i];
        const ElfW(Addr) begin = info->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD && begin <= kernel && kernel < begin + part.p_memsz)
            is_it = true;
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (!is_it) return 0;
    now.static_bytes = size;
    // A library's storage may not exist before it is first asked for, in this way.
    struct {
        unsigned long module, offset;
    } index = {info->dlpi_tls_modid, 0};
    if (size) now.statics = static_cast<char*>(__tls_get_addr(&index));
    return 1;
}

void on_signal(int number, siginfo_t* info, void*) {
    fail("signal %d (%s), address %p", number, number == SIGFPE ? "division" : "memory",
         info->si_addr);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};

// While kernels run, faults are errors of the launch.
struct Signals {
    struct sigaction before[3];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(64 << 10);

    Signals() {
        stack_t mine{};
        mine.ss_sp = stack.data();
        mine.ss_size = stack.size();
        sigaltstack(&mine, &stack_before);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace

char* dynamic_shared() { return shared_memory + GUARD; }

void end_rehearsal() {
    if (!now.is_rehearsal) return;
    now.n_done++;
    suspend();
}

void fail(const char* format, ...) {
    int n = std::snprintf(error, sizeof(error), "block (%u, %u, %u), thread %u: ", blockIdx.x,
                          blockIdx.y, blockIdx.z, threadIdx.x);
    va_list values;
    va_start(values, format);
    std::vsnprintf(error + n, sizeof(error) - static_cast<size_t>(n), format, values);
    va_end(values);
    now.failed = true;
    // What is left on the stacks is dropped.
    switch_context(fibers[now.current].context, now.main);
    std::abort();
}

void sync_block(int line) {
    if (now.at_barrier == 0) now.line = static_cast<unsigned>(line);
    if (now.line != static_cast<unsigned>(line))
        fail("__syncthreads of line %d, while others wait at that of line %u", line, now.line);
    if (++now.at_barrier < now.n_threads) {
        suspend();
        return;
    }
    now.at_barrier = 0;
    // Those that wait are all others; the order in which they go on doesn't matter.
    now.queue.clear();
    now.head = 0;
    for (unsigned i = 0; i < now.n_threads; i++)
        if (i != now.current) now.queue.push_back(i);
}

void exchange(const char* what, void* record, Combine combine) {
    Warp& warp = warps[now.current / LANES];
    if (warp.n_waiting == 0) warp.what = what, warp.combine = combine;
    if (warp.combine != combine)
        fail("%s, while other lanes of the warp wait at %s", what, warp.what);
    warp.records[now.current % LANES] = record;
    warp.lanes[warp.n_waiting++] = now.current;
    if (warp.n_waiting < LANES) {
        suspend();
        return;
    }
    warp.n_waiting = 0;
    combine(warp.records);
    if (now.head > 4 * MAX_THREADS) {
        now.queue.erase(now.queue.begin(), now.queue.begin() + static_cast<long>(now.head));
        now.head = 0;
    }
    now.queue.insert(now.queue.end(), warp.lanes, warp.lanes + LANES - 1);
}

void check(const char* what, const void* p, size_t size, bool in_shared) {
    if (reinterpret_cast<uintptr_t>(p) % size) fail("%s: %p is not aligned to %zu", what, p, size);
    const auto within = [&](const char* begin, size_t n) {
        return p >= begin && static_cast<const char*>(p) + size <= begin + n;
    };
    if (in_shared && !within(dynamic_shared(), now.shared) &&
        !within(now.statics, now.static_bytes))
        fail("%s: %p is not in shared memory", what, p);
}

void copy_later(void* target, const void* source, bool valid) {
    auto& groups = fibers[now.current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({target, source, valid});
    std::memset(target, POISON, 16);
}

void close_group() {
    auto& groups = fibers[now.current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void finish_groups(int n_left) {
    auto& groups = fibers[now.current].groups;
    while (groups.size() > static_cast<size_t>(n_left) + 1) {
        for (const Copy& c : groups.front())
            c.valid ? std::memcpy(c.target, c.source, 16) : std::memset(c.target, 0, 16);
        groups.pop_front();
    }
}

}  // namespace emulator

// How much of a launch's parameter is copied.
extern "C" const uint64_t emulator_args_bytes = sizeof(gdn::Args);

// Runs a kernel, or its rehearsal alone; the error's text, or null.
extern "C" const char* emulator_launch(void (*kernel)(const void*), const unsigned* grid,
                                       unsigned threads, size_t shared, const void* args,
                                       uint64_t seed, bool is_rehearsal) {
    using namespace emulator;
    if (threads > MAX_THREADS || shared > MAX_SHARED) return "too many threads or shared memory";
    const Signals signals;
    now = {};
    now.kernel = kernel, now.args = args;
    now.n_threads = threads, now.shared = shared, now.is_rehearsal = is_rehearsal;
    std::memset(shared_memory, GUARD_BYTE, GUARD);
    dl_iterate_phdr(find_statics, nullptr);
    blockDim = {threads, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
    threadIdx = {0, 0, 0};
    std::mt19937_64 rng(seed);
    std::vector<uint64_t> order(uint64_t{grid[0]} * grid[1] * grid[2]);
    for (uint64_t i = 0; i < order.size(); i++) {
        order[i] = i;
        std::swap(order[i], order[rng() % (i + 1)]);
    }
    for (const uint64_t i : order) {
        const uint64_t rows = i / grid[0];
        blockIdx = {static_cast<unsigned>(i % grid[0]), static_cast<unsigned>(rows % grid[1]),
                    static_cast<unsigned>(rows / grid[1])};
        run_block(rng);
        if (now.failed) return error;
    }
    return nullptr;
}

// What -fsanitize=bounds,alignment,null calls.
struct Place {
    const char* file;
    uint32_t line, column;
};

extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(const Place* place, size_t index) {
    emulator::fail("%s:%u: index %zu is beyond the array", place->file, place->line, index);
}

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Place* place, size_t p) {
    emulator::fail("%s:%u: address %#zx is misaligned or null", place->file, place->line, p);
}
