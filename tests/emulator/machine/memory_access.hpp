// Loads, stores, atomics, asynchronous copies, and matrices of 8×8 between shared memory and registers.
#pragma once
#include "machine.hpp"

inline u64 address_of(const Operands& on, int l) {
    const s64 base = on.i.operand[8];
    if (on.i.op == ld_global || on.i.op == st_global) return get<u64>(on.slot(8), l) + u64(on.i.immediate);
    return u32((base >= 0 ? on.slot(8)[l] : 0) + on.i.immediate);
}

inline void Machine::load(Program& program, const Operands& on, Access who) {
    const Instruction& i = on.i;
    const u32 size = u32(i.size * i.count), unused = u32(64 - 8 * i.size);
    each_lane(on.mask, [&](int l) {
        who.lane = l;
        u64 address = address_of(on, l);
        u8 bytes[32];
        std::memset(bytes, 0xff, sizeof bytes);
        if (i.op == ld_global) {
            counts.loaded += size;
            if (global.allows(address, size, who)) {
                global.read(address, size, who, on.warp.clock);
                std::memcpy(bytes, reinterpret_cast<u8*>(address), size);
            }
        } else if (program.shared.allows(address, size, who)) {
            program.shared.read(address, size, who);
            std::memcpy(bytes, &program.shared.bytes[address], size);
        }
        for (int k = 0; k < i.count; ++k) {
            if (!on.has(k)) continue;
            u64 value = 0;
            std::memcpy(&value, bytes + k * i.size, i.size);
            if (on.flag(SIGN_EXTENDED)) value = u64(s64(value << unused) >> unused);
            if (on.flag(WIDE)) put<u64>(on.slot(k), l, value);
            else on.slot(k)[l] = u32(value);
        }
    });
}

inline void Machine::store(Program& program, const Operands& on, Access who) {
    const Instruction& i = on.i;
    const u32 size = u32(i.size * i.count);
    each_lane(on.mask, [&](int l) {
        who.lane = l;
        u64 address = address_of(on, l);
        u8 bytes[32];
        for (int k = 0; k < i.count; ++k) {
            u64 value = on.flag(WIDE) ? get<u64>(on.slot(k), l) : on.slot(k)[l];
            std::memcpy(bytes + k * i.size, &value, i.size);
        }
        if (i.op == st_global) {
            counts.stored += size;
            if (global.allows(address, size, who)) {
                global.write(address, size, bytes, who, on.warp.clock);
                std::memcpy(reinterpret_cast<u8*>(address), bytes, size);
            }
        } else if (program.shared.allows(address, size, who)) {
            program.shared.write(address, size, bytes, who);
            std::memcpy(&program.shared.bytes[address], bytes, size);
        }
    });
}

// how: add min max and or xor exch cas inc dec
inline u64 combined(s64 how, s64 type, u64 old, u64 x, u64 other) {
    switch (how) {
        case 0:
            if (type == F32) return std::bit_cast<u32>(std::bit_cast<f32>(u32(old)) + std::bit_cast<f32>(u32(x)));
            if (type == F64) return std::bit_cast<u64>(std::bit_cast<f64>(old) + std::bit_cast<f64>(x));
            if (type == F16) return float_to_half(half_to_float(u16(old)) + half_to_float(u16(x)));
            if (type == BF16) return float_to_brain(brain_to_float(u16(old)) + brain_to_float(u16(x)));
            return old + x;
        case 1:
            if (type == S32) return u64(std::min(s32(old), s32(x)));
            return type == S64 ? u64(std::min(s64(old), s64(x))) : std::min(old, x);
        case 2:
            if (type == S32) return u64(std::max(s32(old), s32(x)));
            return type == S64 ? u64(std::max(s64(old), s64(x))) : std::max(old, x);
        case 3: return old & x;
        case 4: return old | x;
        case 5: return old ^ x;
        case 6: return x;
        case 7: return old == x ? other : old;
        case 8: return old >= x ? 0 : old + 1;
        default: return old == 0 || old > x ? x : old - 1;
    }
}

inline void Machine::atomic(Program& program, const Operands& on, Access who) {
    const Instruction& i = on.i;
    const bool in_global = i.op == atom_global, wide = i.size == 8;
    const u32 size = u32(i.size);
    auto value_of = [&](int k, int l) { return wide ? get<u64>(on.slot(k), l) : u64(on.slot(k)[l]); };
    each_lane(on.mask, [&](int l) {
        who.lane = l;
        u64 address = in_global ? get<u64>(on.slot(1), l) + u64(i.immediate) : u32(on.slot(1)[l] + i.immediate);
        u64 old = ~0ull;
        if (in_global ? global.allows(address, size, who) : program.shared.allows(address, size, who)) {
            u8* at = in_global ? reinterpret_cast<u8*>(address) : &program.shared.bytes[address];
            old = 0;
            std::memcpy(&old, at, size);
            u64 value = combined(i.how, i.extra, old, value_of(2, l), i.how == 7 ? value_of(3, l) : 0);
            if (!in_global) program.shared.cells[address / program.shared.granule].written = true;
            else {
                if (on.flag(ACQUIRE)) join(on.warp.clock, global.released[address]);
                global.write(address, size, nullptr, who, on.warp.clock, true);
                if (on.flag(RELEASE)) global.release(address, who, on.warp.clock);
                counts.loaded += size, counts.stored += size;
            }
            std::memcpy(at, &value, size);
        }
        if (!on.has(0)) return;
        if (wide) put<u64>(on.slot(0), l, old);
        else on.slot(0)[l] = u32(old);
    });
}

inline void Machine::issue_copies(Program& program, int w, const Operands& on, Access who) {
    const Instruction& i = on.i;
    each_lane(on.mask, [&](int l) {
        who.lane = l;
        Copy copy{};
        copy.to = u32(on.slot(0)[l] + i.immediate), copy.from = get<u64>(on.slot(1), l) + u64(i.extra);
        copy.size = u32(i.size), copy.lane = l, copy.pc = who.pc;
        copy.used = on.has(2) ? std::min(on.slot(2)[l], copy.size) : copy.size;
        if (!program.shared.allows(copy.to, copy.size, who)) return;
        if (copy.from % copy.size) {
            reports.add(copy.used ? GLOBAL_MISALIGNED : COPY_MISALIGNED_UNUSED, who, copy.from);
            copy.used = 0;
        }
        if (copy.used && !global.find(copy.from, copy.used)) {
            reports.add(GLOBAL_OUT, who, copy.from);
            copy.used = 0;
        }
        counts.loaded += copy.used;
        program.shared.write(copy.to, copy.size, nullptr, who, +1);
        if (!arrives_late()) fetch(program, w, copy);
        on.warp.copies.back().push_back(copy);
    });
}

inline void Machine::fetch(Program& program, int w, Copy& copy) {
    copy.fetched = true;
    if (!copy.used) return;
    Warp& warp = program.warps[w];
    Access who{program.number, w, copy.lane, copy.pc, program.epoch, warp.epoch, warp.fences, u64(executed)};
    global.read(copy.from, copy.used, who, warp.clock);
    std::memcpy(copy.data, reinterpret_cast<u8*>(copy.from), copy.used);
}

inline void Machine::complete(Program& program, int w, std::vector<Copy>& group) {
    Warp& warp = program.warps[w];
    for (Copy& copy : group) {
        if (!copy.fetched) fetch(program, w, copy);
        Access who{program.number, w, copy.lane, copy.pc, program.epoch, warp.epoch, warp.fences, u64(executed)};
        program.shared.write(copy.to, copy.size, nullptr, who, -1);
        std::memcpy(&program.shared.bytes[copy.to], copy.data, copy.size);
    }
    group.clear();
}

// Of `count` matrices, matrix m's row r has its address in lane 8·m + r; a lane holds two neighbours of one row.
inline void Machine::load_matrices(Program& program, const Operands& on, Access who) {
    const u32* base = on.slot(8);
    for (int m = 0; m < on.i.count; ++m) {
        u16 tile[8][8];
        for (int r = 0; r < 8; ++r) {
            who.lane = 8 * m + r;
            u64 address = u32(base[who.lane] + on.i.immediate);
            std::memset(tile[r], 0xff, 16);
            if (!program.shared.allows(address, 16, who)) continue;
            program.shared.read(address, 16, who);
            std::memcpy(tile[r], &program.shared.bytes[address], 16);
        }
        for (int l = 0; l < 32; ++l) {
            int row = l / 4, column = 2 * (l % 4);
            u16 low = on.flag(TRANSPOSED) ? tile[column][row] : tile[row][column];
            u16 high = on.flag(TRANSPOSED) ? tile[column + 1][row] : tile[row][column + 1];
            on.slot(m)[l] = u32(high) << 16 | low;
        }
    }
}

inline void Machine::store_matrices(Program& program, const Operands& on, Access who) {
    const u32* base = on.slot(8);
    for (int m = 0; m < on.i.count; ++m) {
        u16 tile[8][8];
        for (int l = 0; l < 32; ++l)
            for (int h = 0; h < 2; ++h) {
                int row = l / 4, column = 2 * (l % 4) + h;
                u16 value = u16(on.slot(m)[l] >> 16 * h);
                (on.flag(TRANSPOSED) ? tile[column][row] : tile[row][column]) = value;
            }
        for (int r = 0; r < 8; ++r) {
            who.lane = 8 * m + r;
            u64 address = u32(base[who.lane] + on.i.immediate);
            if (!program.shared.allows(address, 16, who)) continue;
            program.shared.write(address, 16, reinterpret_cast<u8*>(tile[r]), who);
            std::memcpy(&program.shared.bytes[address], tile[r], 16);
        }
    }
}

inline bool Machine::access_memory(Program& program, int w, const Operands& on, Access who) {
    auto& groups = on.warp.copies;
    switch (on.i.op) {
        case ld_global: case ld_shared: load(program, on, who); return true;
        case st_global: case st_shared: store(program, on, who); return true;
        case atom_global: case atom_shared: atomic(program, on, who); return true;
        case cp_async: issue_copies(program, w, on, who); return true;
        case cp_commit: groups.emplace_back(); return true;
        case cp_wait:  // all but the latest `immediate` committed groups have arrived afterwards
            while (s64(groups.size()) - 1 > on.i.immediate) {
                complete(program, w, groups.front());
                groups.erase(groups.begin());
            }
            return true;
        case cp_wait_all:
            for (auto& group : groups) complete(program, w, group);
            groups.resize(1);
            return true;
        case ldmatrix: load_matrices(program, on, who); return true;
        case stmatrix: store_matrices(program, on, who); return true;
    }
    return false;
}
