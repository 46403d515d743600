// Which program and which warp goes on, where lanes part and meet, barriers.
#pragma once
#include "machine.hpp"

inline s64 special_register(s64 which, const s64* grid, int threads, const Program& program, int warp, int lane) {
    switch (which) {  // in the order of instruction.hpp's SPECIALS
        case 0: return warp * 32 + lane;
        case 3: case 4: case 5: return program.at[which - 3];
        case 6: case 7: case 8: return grid[which - 6];
        case 9: return threads;
        case 10: case 11: return 1;
        case 12: return lane;
        case 13: return warp;
        default: return 0;
    }
}

inline void Machine::start(Program& program, int number) {
    program.number = number;
    program.at[0] = int(number % grid[0]);
    program.at[1] = int(number / grid[0] % grid[1]);
    program.at[2] = int(number / grid[0] / grid[1]);
    program.shared.reset(size_t(options.shared), shared_granule, &reports);
    program.warps.assign((threads + 31) / 32, {});
    for (int w = 0; w < int(program.warps.size()); ++w) {
        Warp& warp = program.warps[w];
        warp.slots = image;
        warp.copies.resize(1), warp.products.resize(1);
        int left = threads - 32 * w;
        warp.fragments = {{0, left >= 32 ? ~0u : (1u << left) - 1, false}};
        for (const Preset& p : presets)
            if (p.kind == SPECIAL)
                for (int l = 0; l < 32; ++l)
                    warp.slot(p.slot)[l] = u32(special_register(p.value, grid, threads, program, w, l));
    }
    counts.programs++;
}

inline void Machine::run() {
    s64 total = grid[0] * grid[1] * grid[2];
    std::vector<int> order(total);
    for (s64 i = 0; i < total; ++i) order[i] = int(i);
    if (options.resident > 1)
        for (s64 i = total - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    std::vector<std::unique_ptr<Program>> live;
    size_t begun = 0;
    while ((begun < order.size() || !live.empty()) && !stopped) {
        while (begun < order.size() && s64(live.size()) < options.resident) {
            live.push_back(std::make_unique<Program>());
            start(*live.back(), order[begun++]);
        }
        size_t chosen = random.below(live.size());
        Program& program = *live[chosen];
        int count = int(program.warps.size()), from = int(random.below(count)), w = -1;
        for (int i = 0; i < count && w < 0; ++i)
            if (program.warps[(from + i) % count].runnable()) w = (from + i) % count;
        Access nobody{program.number, std::max(w, 0), 0, 0, 0, 0, 0, 0};
        if (w < 0) {
            if (!program.done()) reports.add(DEADLOCK, nobody, 0), stopped = true;
            live.erase(live.begin() + s64(chosen));
            continue;
        }
        u64 style = random.below(8), scale = style < 4 ? 1 : style < 7 ? 8 : 100;
        u64 steps = 1 + random.below(scale * options.burst);
        while (steps-- && program.warps[w].runnable() && !stopped) step(program, w);
        if (executed > options.limit) reports.add(ENDLESS, nobody, 0), stopped = true;
    }
}

// The barrier opens when all that has not left is there.
inline void Machine::release(Program& program) {
    for (Warp& warp : program.warps)
        if (warp.runnable()) return;
    program.epoch++;
    Clock all;
    for (Warp& warp : program.warps) join(all, warp.clock);
    for (Warp& warp : program.warps) {
        for (Fragment& f : warp.fragments) f.waiting = false;
        warp.clock = all;
        warp.epoch++;
        warp.merge();
    }
}

inline bool Machine::branch(Warp& warp, Fragment& at, const Instruction& i, u32 mask) {
    if (mask == at.lanes) at.pc = int(i.target);
    else if (!mask) at.pc++;
    else {
        Fragment rest{at.pc + 1, at.lanes & ~mask, false};
        at.lanes = mask, at.pc = int(i.target);
        warp.fragments.push_back(rest);
    }
    warp.merge();
    return true;
}

inline void Machine::leave(Program& program, int w, Fragment& at, u32 mask, const Access& who) {
    Warp& warp = program.warps[w];
    if (mask != at.lanes) {
        at.lanes &= ~mask, at.pc++;
        return;
    }
    warp.fragments.erase(warp.fragments.begin() + (&at - warp.fragments.data()));
    if (warp.fragments.empty()) {
        for (auto& group : warp.copies)
            if (!group.empty()) {
                reports.add(IN_FLIGHT_AT_EXIT, who, group[0].to);
                complete(program, w, group);
            }
        for (auto& group : warp.products)
            if (!group.empty()) reports.add(IN_FLIGHT_AT_EXIT, who, 0);
    }
    if (!program.done()) release(program);
}

// Whether an instruction is for all lanes of a warp together.
inline bool is_collective(s64 op) {
    switch (op) {
        case shfl: case vote: case redux: case ldmatrix: case stmatrix: case cp_commit: case cp_wait:
        case cp_wait_all: case bar_sync: case bar_warp: return true;
        default: return op > END_OF_MEMORY && op < END_OF_MATRICES;
    }
}

// One instruction of a warp: of those of its lanes that are at the lowest one.
inline void Machine::step(Program& program, int w) {
    Warp& warp = program.warps[w];
    Fragment* at = nullptr;
    for (Fragment& f : warp.fragments)
        if (!f.waiting && (!at || f.pc < at->pc)) at = &f;
    const int pc = at->pc;
    if (pc >= length) {
        reports.add(TRAPPED, {program.number, w, 0, length - 1, 0, 0, 0, 0}, 0), stopped = true;
        return;
    }
    const Instruction& i = code[pc];
    u32 mask = at->lanes;
    if (i.guard >= 0) {
        const u32* p = warp.slot(i.guard);
        u32 set = 0;
        for (int l = 0; l < 32; ++l) set |= (p[l] & 1) << l;
        mask &= i.negated ? ~set : set;
    }
    executed++, counts.instructions[i.kind]++;
    Access who{program.number, w, 0, pc, program.epoch, warp.epoch, warp.fences, u64(executed)};
    if (is_collective(i.op) && (!warp.whole() || mask != at->lanes)) reports.add(DIVERGED, who, 0);
    switch (i.op) {
        case bra: branch(warp, *at, i, mask); return;
        case ret: leave(program, w, *at, mask, who); return;
        case bar_sync:
            at->pc++, at->waiting = true;
            release(program);
            return;
        case bar_warp: warp.epoch++; break;
    }
    if (mask && !execute(program, w, i, mask, who)) reports.add(TRAPPED, who, 0), stopped = true;
    at->pc++;
    if (!warp.whole()) warp.merge();
}

inline bool Machine::execute(Program& program, int w, const Instruction& i, u32 mask, const Access& who) {
    Operands on{program.warps[w], i, mask};
    if (i.op < END_OF_INTEGERS) return integer(on);
    if (i.op < END_OF_FLOATS) return floating(on);
    if (i.op < END_OF_MOVES) return move(on);
    if (i.op < END_OF_LANES) return between_lanes(on);
    if (i.op < END_OF_MEMORY) return access_memory(program, w, on, who);
    if (i.op < END_OF_MATRICES) return multiply(program, w, on, who);
    if (i.op == fence_async) on.warp.fences++, on.warp.fence_epoch = program.epoch;
    return i.op != trap;
}
