// Switching from one stack to another.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
// The System V ABI preserves six registers over a call. swapcontext would also make two system calls, and be 20 times
// slower.
asm(R"(
.text
.weak pvdm_switch_stack
.type pvdm_switch_stack, @function
pvdm_switch_stack:
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
.size pvdm_switch_stack, .-pvdm_switch_stack
)");
extern "C" void pvdm_switch_stack(void** save, void* to);

namespace pvdm::emulation {
struct Context {
  void* stack = nullptr;
};
inline void switch_context(Context& from, Context& to) { pvdm_switch_stack(&from.stack, to.stack); }
inline void make_context(Context& c, unsigned char* memory, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + bytes) & ~uintptr_t{15});
  top[-1] = nullptr;  // no return address; keeps the ABI's alignment at entry
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  c.stack = top - 8;
}
}  // namespace pvdm::emulation
#else
#include <ucontext.h>

namespace pvdm::emulation {
struct Context {
  ucontext_t state;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void make_context(Context& c, unsigned char* memory, size_t bytes, void (*entry)()) {
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = memory;
  c.state.uc_stack.ss_size = bytes;
  c.state.uc_link = nullptr;
  makecontext(&c.state, entry, 0);
}
}  // namespace pvdm::emulation
#endif
