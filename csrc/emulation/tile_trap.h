// Runs compiled AMX instructions on x86-64 Linux without AMX. Each one raises SIGILL, and the handler decodes its bytes
// and runs the stand-in. So tests run the machine code that a CPU with AMX would run.
#pragma once
#include <csignal>
#include <cstdlib>
#include <exception>

#include <ucontext.h>
#include <unistd.h>

#include "tiles.h"

namespace pvdm::emulation {

// An instruction of the form VEX.128.0F38.W0, its registers and its memory operand.
struct TileInstruction {
  int prefix, opcode;        // prefix: none, 66, F3, F2 as 0 ... 3
  int reg, rm, vvvv;         // of ModRM, and VEX.vvvv
  bool memory;
  char* address;             // of a memory operand, without its index
  int64_t index;             // the index register times its scale
  int64_t length;            // bytes
};

inline int64_t general_register(const ucontext_t& context, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[places[number]];
}

inline TileInstruction decode_tile_instruction(const ucontext_t& context) {
  const auto* const code = reinterpret_cast<const unsigned char*>(context.uc_mcontext.gregs[REG_RIP]);
  // C4; then R X B inverted and the map (2: 0F38); then W, vvvv inverted, L and the prefix.
  demand(code[0] == 0xc4 && (code[1] & 0x9f) == 0x82 && (code[2] & 0x84) == 0, "SIGILL", "this is no tile instruction");
  const int extended_index = code[1] & 0x40 ? 0 : 8, extended_base = code[1] & 0x20 ? 0 : 8, modrm = code[4];
  const int mode = modrm >> 6, rm = modrm & 7;
  TileInstruction found{code[2] & 3, code[3], modrm >> 3 & 7, rm, ~(code[2] >> 3) & 15, mode != 3, nullptr, 0, 5};
  if (mode == 3) return found;
  int base = rm;
  if (rm == 4) {
    const int sib = code[found.length++], index = (sib >> 3 & 7) + extended_index;
    base = sib & 7;
    if (index != 4) found.index = general_register(context, index) << (sib >> 6);
  }
  const bool relative = mode == 0 && rm == 5;  // to the next instruction
  demand(mode != 0 || base != 5 || relative, "SIGILL", "an address without a base register");
  int64_t offset = 0;
  if (mode == 1) offset = static_cast<signed char>(code[found.length++]);
  if (mode == 2 || relative) {
    int32_t wide;
    std::memcpy(&wide, code + found.length, sizeof wide);
    offset = wide;
    found.length += 4;
  }
  offset += relative ? reinterpret_cast<int64_t>(code) + found.length : general_register(context, base + extended_base);
  found.address = reinterpret_cast<char*>(offset);
  return found;
}

inline void run_tile_instruction(const TileInstruction& i) {
  enum { none, p66, f3, f2 };
  if (i.opcode == 0x49 && i.prefix == none && i.memory && i.reg == 0) return ldtilecfg(i.address);
  if (i.opcode == 0x49 && i.prefix == none && !i.memory && i.reg == 0 && i.rm == 0) return tilerelease();
  if (i.opcode == 0x49 && i.prefix == f2 && !i.memory && i.rm == 0) return tilezero(i.reg);
  if (i.opcode == 0x4b && i.prefix == f2 && i.memory && i.rm == 4) return tileloadd(i.reg, i.address, i.index);
  if (i.opcode == 0x4b && i.prefix == f3 && i.memory && i.rm == 4) return tilestored(i.reg, i.address, i.index);
  if (i.opcode == 0x5c && i.prefix == f3 && !i.memory) return tdpbf16ps(i.reg, i.rm, i.vvvv);
  demand(false, "SIGILL", "a tile instruction that the stand-in does not know");
}

// Faults print their message and end the program, because no exception may leave a signal handler.
inline void trap_tiles() {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = [](int, siginfo_t*, void* data) {
    auto& context = *static_cast<ucontext_t*>(data);
    try {
      const TileInstruction instruction = decode_tile_instruction(context);
      run_tile_instruction(instruction);
      context.uc_mcontext.gregs[REG_RIP] += instruction.length;
    } catch (const std::exception& error) {
      const std::string message = std::string(error.what()) + "\n";
      if (write(2, message.data(), message.size()) < 0) _exit(2);
      std::abort();
    }
  };
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace pvdm::emulation
