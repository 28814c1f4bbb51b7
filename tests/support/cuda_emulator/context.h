// Switching between stacks: a few instructions where they are known, else the C library's.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__) || defined(__aarch64__)

struct Context {
    void* stack_pointer;
};

// Registers that a call keeps are pushed, the stack pointer goes to *save, and the other way round.
extern "C" void emulator_switch(void** save, void* load);

#if defined(__x86_64__)
constexpr int RETURN = 6, FRAME = 8;
asm(R"(
    .text
    .globl emulator_switch
    .hidden emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
constexpr int RETURN = 11, FRAME = 20;
asm(R"(
    .text
    .globl emulator_switch
    .hidden emulator_switch
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#endif

// A context that calls `entry`, which never returns.
inline void make_context(Context& c, char* stack, size_t size, void (*entry)()) {
    uintptr_t* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + size) &
                                                  ~static_cast<uintptr_t>(15));
    uintptr_t* frame = top - FRAME;
    for (int i = 0; i < FRAME; i++) frame[i] = 0;
    frame[RETURN] = reinterpret_cast<uintptr_t>(entry);
    c.stack_pointer = frame;
}
inline void switch_context(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

struct Context {
    ucontext_t state;
};

inline void make_context(Context& c, char* stack, size_t size, void (*entry)()) {
    getcontext(&c.state);
    c.state.uc_stack.ss_sp = stack;
    c.state.uc_stack.ss_size = size;
    c.state.uc_link = nullptr;
    makecontext(&c.state, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace emulator
