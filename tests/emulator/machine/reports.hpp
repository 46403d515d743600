// What is found: how often, at which instruction, against which other one, and who came first.
#pragma once
#include <map>
#include <tuple>

#include "instruction.hpp"

struct Report {
    s64 finding, pc, other_pc, program, warp, lane, count;
    u64 address;
};

// Who touches memory: a lane of a warp of a program, in the `epoch` that its last barrier began; `stamp` is the
// instruction's own number, the same for its 32 lanes.
struct Access {
    int program, warp, lane, pc;
    u32 epoch, warp_epoch, fences;
    u64 stamp;
};

struct Reports {
    std::map<std::tuple<int, int, int>, Report> found;

    void add(Finding finding, const Access& who, u64 address, int other_pc = -1) {
        Report first{finding, who.pc, other_pc, who.program, who.warp, who.lane, 0, address};
        found.try_emplace({finding, who.pc, other_pc}, first).first->second.count++;
    }
};
