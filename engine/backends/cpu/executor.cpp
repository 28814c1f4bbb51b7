// Runs a program: a flat array of instructions, on a team of threads, in one call per step.
//
// Threads take tasks of an instruction from a counter. Where the next instruction asks for a
// barrier, they wait for each other: a waiting thread spins a little, then yields. Between steps
// they park. A step can be run in pieces: when its time is up, threads take no more tasks and meet
// at the next barrier; the counters say where to go on.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <vector>

#include "../../ops/cpu/attention.h"
#include "../../ops/cpu/gated_delta_net.h"
#include "../../ops/cpu/kernels.h"
#include "../../ops/cpu/mul_mat.h"
#include "../../ops/cpu/pack.h"

using namespace gdn;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// While it lives, denormal numbers count as zero: processors compute with them a hundred times
// slower.
class FlushDenormals {
   public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

   private:
    const unsigned before_;
#else
    FlushDenormals() {}
#endif
};

constexpr int SPINS_BEFORE_YIELD = 4096;
constexpr double SECONDS_BEFORE_PARKING = 2e-3;
// Turns at an instruction's tasks between two looks at the clock.
constexpr int TURNS_PER_LOOK = 8;
// A thread's stack: kernels need less than 7 KiB of it. A stack of the usual 8 MiB would use up the
// address space that `ulimit -v` grants.
constexpr size_t STACK_BYTES = 512 << 10;

template <typename Done>
void wait_until(Done done) {
    for (int spins = 0; !done(); spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
}

// The rows of a step as kernels read them.
class StepRows {
   public:
    // `live`: the live counts, whether kernels see the row tiles (matrix units), whether rows
    // outside them are fine, the number of row tiles, the tiles.
    void set(const int64_t* live) {
        const bool is_matrix = live[N_DIMS] != 0, has_fine = live[N_DIMS + 1] != 0;
        const int64_t n_tiles = live[N_DIMS + 2], n_tokens = live[N_TOKENS];
        const auto* tiles = reinterpret_cast<const RowTile*>(live + N_DIMS + 3);
        by_kind_.clear(), others_.clear();
        fine_.assign(n_tokens, has_fine);
        int32_t row = 0;
        for (const RowTile* tile = tiles; tile < tiles + n_tiles; tile++) {
            while (row < tile->row) others_.push_back(row++);
            for (; row < tile->row + tile->n; row++) by_kind_.push_back(row), fine_[row] = 0;
        }
        while (row < n_tokens) others_.push_back(row++);
        const auto n = static_cast<int64_t>(by_kind_.size()), n_tiled = is_matrix ? n : 0;
        by_kind_.insert(by_kind_.end(), others_.begin(), others_.end());
        if (!is_matrix) {
            others_.resize(n_tokens);
            std::iota(others_.begin(), others_.end(), 0);
        }
        rows = {tiles,           by_kind_.data(),    others_.data(),
                by_kind_.data(), fine_.data(),       is_matrix ? n_tiles : 0,
                n_tiled,         n_tokens - n_tiled, n,
                has_fine};
    }

    Rows rows{};

   private:
    std::vector<int32_t> by_kind_, others_;
    std::vector<uint8_t> fine_;
};

// One cache line for each counter.
struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
};

class Team {
   public:
    // Throws std::bad_alloc if there is no memory for its threads, std::system_error if there is
    // no thread left.
    explicit Team(int n_threads) : n_threads_(n_threads), scratch_(n_threads) {
        try {
            for (auto& s : scratch_) {
                s = static_cast<char*>(std::aligned_alloc(64, SCRATCH_BYTES));
                if (!s) throw std::bad_alloc();
            }
            workers_.reserve(n_threads);
            for (int i = 1; i < n_threads; i++) start(i);
        } catch (...) {
            end();
            throw;
        }
    }

    ~Team() { end(); }

    // Begins a program if `first` is -1, else goes on with instruction `first`, for `limit` seconds
    // or a little longer. Returns the instruction to go on with, n at the end.
    // `seconds`: nullptr, or [n]: gets each instruction's time, whatever the limit is.
    int64_t run(const Instruction* program, int64_t n, const int64_t* live, double* seconds,
                int64_t first, double limit) {
        program_ = program, n_ = n, live_ = live, seconds_ = seconds;
        first_ = std::max<int64_t>(first, 0);
        met_at_ = now();
        deadline_ = met_at_ + limit;
        step_rows_.set(live);
        if (static_cast<int64_t>(counters_.size()) < n) counters_ = std::vector<Counter>(n);
        for (int64_t i = 0; first < 0 && i < n; i++)
            counters_[i].next.store(0, std::memory_order_relaxed);
        time_is_up_.store(false, std::memory_order_relaxed);
        all_stop_.store(false, std::memory_order_relaxed);
        resume_.store(n, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            step_.fetch_add(1);
        }
        if (n_parked_.load() > 0) wake_.notify_all();
        run_program(0);
        barrier();
        return resume_.load(std::memory_order_relaxed);
    }

   private:
    struct Worker {
        Team* team;
        int number;
        pthread_t thread;
    };

    // No std::thread: its stack has no size to choose, and to free its closure, a thread reserves
    // 64 MiB of address space for allocations of its own.
    void start(int number) {
        workers_.push_back({this, number, {}});
        pthread_attr_t attributes;
        int error = pthread_attr_init(&attributes);
        if (error == 0) {
            pthread_attr_setstacksize(&attributes, STACK_BYTES);
            error = pthread_create(&workers_.back().thread, &attributes, begin, &workers_.back());
            pthread_attr_destroy(&attributes);
        }
        if (error == 0) return;
        workers_.pop_back();
        throw std::system_error(error, std::generic_category());
    }

    static void* begin(void* worker) {
        const auto* self = static_cast<Worker*>(worker);
        self->team->work(self->number);
        return nullptr;
    }

    void end() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            step_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& w : workers_) pthread_join(w.thread, nullptr);
        for (char* s : scratch_) std::free(s);
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            const double idle_since = now();
            for (int spins = 0; step_.load(std::memory_order_acquire) == seen; spins++) {
                relax();
                if (spins % 256 == 255) {
                    sched_yield();
                    if (now() - idle_since > SECONDS_BEFORE_PARKING) park(seen);
                }
            }
            seen++;
            if (stopping_) return;
            run_program(thread);
            barrier();
        }
    }

    void park(uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        n_parked_.fetch_add(1);
        wake_.wait(lock, [&] { return step_.load() != seen; });
        n_parked_.fetch_sub(1);
    }

    void run_program(int thread) {
        const FlushDenormals flush;
        begin_matrix_products();
        double start = met_at_;
        for (int64_t i = first_; i < n_; i++) {
            const Instruction& in = program_[i];
            if (i > first_ && (in.barrier || seconds_)) {
                barrier();
                if (all_stop_.load(std::memory_order_relaxed)) {
                    stop_at(i);
                    break;
                }
            }
            if (i > 0 && seconds_ && thread == 0) {
                seconds_[i - 1] = met_at_ - start;
                start = met_at_;
            }
            const Args args{in.views, in.attrs, live_, &step_rows_.rows, scratch_[thread]};
            if (!run_tasks(in, counters_[i], args, thread)) stop_at(i);
        }
        if (seconds_ && n_ > 0) {
            barrier();
            if (thread == 0) seconds_[n_ - 1] = met_at_ - start;
        }
        end_matrix_products();
    }

    // False if there are tasks left: the time is up.
    bool run_tasks(const Instruction& in, Counter& counter, const Args& args, int thread) {
        const int64_t n = in.kernel->n_tasks(args);
        // Every thread takes several turns, so that the others do the work of one that is held up.
        const int64_t grab = n_threads_ == 1 ? n : std::max<int64_t>(1, n / (n_threads_ * 8));
        while (n > 0) {
            if (time_is_up_.load(std::memory_order_relaxed))
                return counter.next.load(std::memory_order_relaxed) >= n;
            const int64_t begin = counter.next.fetch_add(grab, std::memory_order_relaxed);
            if (begin >= n) break;
            in.kernel->run(args, begin, std::min(n, begin + grab));
            if (thread == 0 && ++turns_ % TURNS_PER_LOOK == 0 && !seconds_ && now() > deadline_)
                time_is_up_.store(true, std::memory_order_relaxed);
        }
        return true;
    }

    // Notes that instruction i has to be gone on with.
    void stop_at(int64_t i) {
        int64_t earliest = resume_.load(std::memory_order_relaxed);
        while (i < earliest && !resume_.compare_exchange_weak(earliest, i)) {}
    }

    void barrier() {
        const uint64_t round = rounds_.load(std::memory_order_relaxed);
        if (n_threads_ == 1 || arrived_.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
            // A thread that is held up here may miss the whole next instruction.
            if (seconds_) met_at_ = now();
            // The last one decides for all whether they go on.
            if (time_is_up_.load(std::memory_order_relaxed))
                all_stop_.store(true, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            rounds_.store(round + 1, std::memory_order_release);
        } else {
            wait_until([&] { return rounds_.load(std::memory_order_acquire) != round; });
        }
    }

    const int n_threads_;
    std::vector<char*> scratch_;
    std::vector<Worker> workers_;  // Never moved: each thread has its own's address.
    std::vector<Counter> counters_;
    const Instruction* program_ = nullptr;
    int64_t n_ = 0;
    const int64_t* live_ = nullptr;
    StepRows step_rows_;
    double* seconds_ = nullptr;
    int64_t first_ = 0;
    double deadline_ = 0;
    double met_at_ = 0;  // When the run began, or a timed one's threads last met.
    bool stopping_ = false;
    std::mutex mutex_;
    std::condition_variable wake_;
    // Thread 0 alone counts its turns.
    alignas(64) unsigned turns_ = 0;
    // Read at every turn, written when a run begins and when its time is up.
    alignas(64) std::atomic<bool> time_is_up_{false};
    std::atomic<bool> all_stop_{false};
    std::atomic<int64_t> resume_{0};
    alignas(64) std::atomic<uint64_t> step_{0};
    std::atomic<int> n_parked_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint64_t> rounds_{0};
};

}  // namespace

// Calls f and returns its result. No exception leaves the C interface: if f throws one, this returns
// `failed`, and errno says why.
template <typename F, typename T>
T guarded(F f, T failed) {
    try {
        return f();
    } catch (const std::system_error& error) {
        errno = error.code().value();
    } catch (const std::exception&) { errno = ENOMEM; }
    return failed;
}

#define GDN_EXPORT extern "C" __attribute__((visibility("default")))

// Whether the operating system lets this process use what the library is built for.
GDN_EXPORT int gdn_allowed() { return allow_matrix_products(); }

// nullptr if the threads can't be started; errno says why.
GDN_EXPORT void* gdn_team_create(int n_threads) {
    return guarded([=] { return new Team(n_threads); }, static_cast<Team*>(nullptr));
}

GDN_EXPORT void gdn_team_free(void* team) { delete static_cast<Team*>(team); }

GDN_EXPORT const void* gdn_kernel(const char* name) {
    for (const Kernel* k : KERNELS)
        if (std::strcmp(k->name, name) == 0) return k;
    return nullptr;
}

// The kernels' constants and sizes that Python needs; -1 for an unknown name.
GDN_EXPORT int64_t gdn_constant(const char* name) {
    constexpr struct {
        const char* name;
        int64_t value;
    } CONSTANTS[] = {
        // clang-format off
        {"sizeof_view", sizeof(View)}, {"sizeof_instruction", sizeof(Instruction)},
        {"F32", F32}, {"F16", F16}, {"I32", I32}, {"I8", I8}, {"PACKED", PACKED}, {"BF16", BF16},
        {"N_TOKENS", N_TOKENS}, {"N_SEQS", N_SEQS}, {"N_SEQS_1", N_SEQS_1},
        {"N_OUTPUTS", N_OUTPUTS}, {"panel_rows", PANEL}, {"k_block", K_BLOCK},
        {"sum_group", SUM_GROUP}, {"tile_side", SIDE}, {"tile_depth", DEPTH},
        {"max_tile_rows", MAX_TILE_ROWS}, {"max_gathered_columns", MAX_GATHERED_COLUMNS},
        {"partial_head", attention_op::PARTIAL_HEAD}, {"max_head", MAX_HEAD},
        // clang-format on
    };
    for (const auto& c : CONSTANTS)
        if (std::strcmp(c.name, name) == 0) return c.value;
    return -1;
}

// As Team::run; -1 if there is no memory to begin the step, with errno.
GDN_EXPORT int64_t gdn_run(void* team, const void* program, int64_t n, const int64_t* live,
                           double* seconds, int64_t first, double limit) {
    const auto* instructions = static_cast<const Instruction*>(program);
    return guarded(
        [=] { return static_cast<Team*>(team)->run(instructions, n, live, seconds, first, limit); },
        int64_t{-1});
}

GDN_EXPORT int32_t gdn_layout_of(int ggml_id) { return layout_of(ggml_id); }

GDN_EXPORT int64_t gdn_panel_bytes(int32_t layout, int64_t n_in) {
    return panel_bytes(layout, n_in);
}

GDN_EXPORT void gdn_pack(int ggml_id, const uint8_t* src, int64_t n_rows, int64_t n_in,
                         float factor, uint8_t* dst, int64_t begin, int64_t end) {
    pack_rows(ggml_id, src, n_rows, n_in, factor, dst, begin, end);
}
