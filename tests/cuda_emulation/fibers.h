// Stacks that one OS thread switches between, announced to the sanitizers: AddressSanitizer must know which stack is in
// use, and ThreadSanitizer takes each fiber for a thread of its own. A switch orders nothing for ThreadSanitizer; only
// what scheduler.h releases and acquires does.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN(...) __VA_ARGS__
#else
#define EMULATION_ASAN(...)
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define EMULATION_TSAN(...) __VA_ARGS__
#else
#define EMULATION_TSAN(...)
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Code that runs between stacks, or reads what a kernel's threads own: its own accesses are not the program's.
#define EMULATION_RAW __attribute__((no_sanitize("address", "thread", "undefined"), noinline))

namespace emulation {

constexpr std::size_t kStackBytes = 128 << 10;

struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t registers;
#endif
    char* stack = nullptr;  // null for the scheduler, which is on the OS thread's own
    void* fake_stack = nullptr;
    void* tsan_fiber = nullptr;
};

#if defined(__x86_64__)
// swapcontext() makes a system call each time, which would be most of the run time.
extern "C" void emulation_switch(void** save, void* to);
__asm__(
    ".text\nemulation_switch: pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif

inline std::vector<char*> free_stacks;
inline const void* scheduler_stack = nullptr;
inline std::size_t scheduler_stack_bytes = 0;

EMULATION_RAW inline void prepare(Context& context, void (*entry)()) {
    if (free_stacks.empty()) {
        void* memory =
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        free_stacks.push_back(static_cast<char*>(memory));
    }
    context.stack = free_stacks.back();
    free_stacks.pop_back();
    EMULATION_TSAN(context.tsan_fiber = __tsan_create_fiber(0);)
#if defined(__x86_64__)
    // What emulation_switch pops: six registers, then the address to return to, on a stack aligned as after a call.
    void** top = reinterpret_cast<void**>(context.stack + kStackBytes);
    for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 8;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = context.stack;
    context.registers.uc_stack.ss_size = kStackBytes;
    makecontext(&context.registers, entry, 0);
#endif
}

EMULATION_RAW inline void dispose(Context& context) {
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(context.tsan_fiber);
    munmap(context.stack, kStackBytes);  // its shadow would remember the dead fiber's accesses
#else
    free_stacks.push_back(context.stack);  // all its frames have returned, so that nothing in it is poisoned
#endif
}

EMULATION_RAW inline void switch_stacks(Context& from, Context& to) {
#if defined(__x86_64__)
    emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
}

EMULATION_RAW inline void resume(Context& scheduler, Context& fiber) {
    EMULATION_ASAN(__sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack, kStackBytes);)
    EMULATION_TSAN(scheduler.tsan_fiber = __tsan_get_current_fiber();)
    EMULATION_TSAN(__tsan_switch_to_fiber(fiber.tsan_fiber, 1);)
    switch_stacks(scheduler, fiber);
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);)
}

EMULATION_RAW inline void enter_fiber() {  // the first thing on a new stack
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);)
}

EMULATION_RAW inline void suspend(Context& fiber, Context& scheduler, bool for_good) {
    (void)for_good;
    EMULATION_ASAN(
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);)
    EMULATION_TSAN(__tsan_switch_to_fiber(scheduler.tsan_fiber, 1);)
    switch_stacks(fiber, scheduler);
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);)
}

}  // namespace emulation
