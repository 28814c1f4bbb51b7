// A team of threads: some of them run a function together, and wait for each other at barriers.
#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <system_error>
#include <vector>

#include "waiting.h"

namespace gdn {

class Team {
   public:
    using Work = void (*)(void* context, int thread);

    // Throws std::bad_alloc if there is no memory for its threads, std::system_error if there is
    // no thread left.
    explicit Team(int size) : workers_(new Worker[size]) {
        try {
            for (; n_started_ < size - 1; n_started_++) start(n_started_ + 1);
        } catch (...) {
            end();
            throw;
        }
    }

    ~Team() { end(); }

    // Calls work(context, thread) on threads 0 (the caller) to size - 1, and returns when all of
    // them are done.
    void run(int size, Work work, void* context) {
        size_ = size, work_ = work, context_ = context;
        waited_.store(0, std::memory_order_relaxed);
        for (int i = 1; i < size; i++) workers_[i].steps.next();
        work(context, 0);
        barrier([] {});
    }

    // Each thread of a run waits here for the others; the one that comes last calls `last` before
    // they go on.
    template <typename F>
    void barrier(F last) {
        // Read before this thread arrives: once all have, the next run may begin.
        const int size = size_;
        const uint32_t round = rounds_.value();
        if (size == 1 || arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            last();
            arrived_.store(0, std::memory_order_relaxed);
            if (size > 1) rounds_.next();
        } else if (const double waited = rounds_.wait(round, SECONDS_AT_BARRIER)) {
            waited_.fetch_add(static_cast<int64_t>(1e9 * waited), std::memory_order_relaxed);
        }
    }

    // Seconds that the threads of the last run waited at barriers, all of them together, without
    // waits that are so short that others were about to come.
    double waited() const { return 1e-9 * static_cast<double>(waited_.load()); }

   private:
    // How long a thread looks for others before it sleeps: at a barrier, where they are about to
    // come or have lost their core; and between two steps.
    static constexpr double SECONDS_AT_BARRIER = 1e-4, SECONDS_BETWEEN_STEPS = 2e-3;
    // A thread's stack: kernels need less than 7 KiB of it. A stack of the usual 8 MiB would use up
    // the address space that `ulimit -v` grants.
    static constexpr size_t STACK_BYTES = 512 << 10;

    struct Worker {
        Signal steps;  // Counts the steps that this thread has a part in.
        Team* team;
        int number;
        pthread_t thread;
    };

    // No std::thread: its stack has no size to choose, and to free its closure, a thread reserves
    // 64 MiB of address space for allocations of its own.
    void start(int number) {
        workers_[number].team = this, workers_[number].number = number;
        pthread_attr_t attributes;
        int error = pthread_attr_init(&attributes);
        if (error == 0) {
            pthread_attr_setstacksize(&attributes, STACK_BYTES);
            error = pthread_create(&workers_[number].thread, &attributes, begin, &workers_[number]);
            pthread_attr_destroy(&attributes);
        }
        if (error != 0) throw std::system_error(error, std::generic_category());
    }

    static void* begin(void* worker) {
        auto* self = static_cast<Worker*>(worker);
        self->team->work(*self);
        return nullptr;
    }

    void work(Worker& self) {
        for (uint32_t seen = 0;; seen++) {
            self.steps.wait(seen, SECONDS_BETWEEN_STEPS);
            if (stopping_) return;
            work_(context_, self.number);
            barrier([] {});
        }
    }

    void end() {
        stopping_ = true;
        for (int i = 1; i <= n_started_; i++) workers_[i].steps.next();
        for (int i = 1; i <= n_started_; i++) pthread_join(workers_[i].thread, nullptr);
    }

    const std::unique_ptr<Worker[]> workers_;  // Number 0 is the caller.
    int n_started_ = 0;
    int size_ = 1;
    Work work_ = nullptr;
    void* context_ = nullptr;
    bool stopping_ = false;
    std::atomic<int64_t> waited_{0};  // Nanoseconds.
    alignas(64) std::atomic<int> arrived_{0};
    Signal rounds_;
};

}  // namespace gdn
