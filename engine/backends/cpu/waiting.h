// How threads wait for each other: they look at a number for a while, then sleep until it changes.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace gdn {

// Seconds of a clock that never goes back.
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// A number that is counted up, and that threads wait for.
//
// A thread says that it sleeps before it does, and the kernel lets it sleep only while the number
// is the one that it saw. All this is sequentially consistent: so whoever counts either sees a
// sleeper and wakes it, or the sleeper sees the new number.
class alignas(64) Signal {
   public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    // Counts up. A thread that sees it sees what the caller wrote before.
    void next() {
        value_.fetch_add(1);
        if (n_sleepers_.load() > 0) call(FUTEX_WAKE_PRIVATE, INT_MAX);
    }

    // Returns when the value is no longer `seen`; sleeps after it has looked for `patience` seconds.
    // The seconds that it took, 0 if no longer than that.
    double wait(uint32_t seen, double patience) {
        for (int looks = 0; looks < LOOKS_BEFORE_CLOCK; looks++) {
            if (value() != seen) return 0;
            relax();
        }
        const double start = now();
        while (value() == seen && now() - start < patience) {
            for (int looks = 0; looks < LOOKS_PER_YIELD && value() == seen; looks++) relax();
            sched_yield();
        }
        if (value() == seen) {
            n_sleepers_.fetch_add(1);
            while (value() == seen) call(FUTEX_WAIT_PRIVATE, seen);
            n_sleepers_.fetch_sub(1);
        }
        const double waited = now() - start;
        return waited > patience ? waited : 0;
    }

   private:
    // Most waits end within these.
    static constexpr int LOOKS_BEFORE_CLOCK = 64, LOOKS_PER_YIELD = 256;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void call(int operation, uint32_t argument) {
        static_assert(sizeof(value_) == sizeof(uint32_t), "what the kernel compares");
        syscall(SYS_futex, &value_, operation, argument, nullptr, nullptr, 0);
    }

    std::atomic<uint32_t> value_{0};
    std::atomic<int> n_sleepers_{0};
};

}  // namespace gdn
