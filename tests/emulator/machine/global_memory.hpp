// Global memory with a shadow: no two programs touch the same bytes, if one writes, unless atomics order them.
#pragma once
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

#include "reports.hpp"

// A vector clock. Of program i it knows all that happened before the barrier that began epoch clock[i].
using Clock = std::vector<u32>;

inline void join(Clock& into, const Clock& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

struct Touch {
    int program = -1, pc = -1;
    u32 epoch = 0, warps = 0;
    u64 stamp = 0;

    bool before(const Access& who, const Clock& clock) const {
        if (program == who.program) return epoch != who.epoch || warps == 1u << who.warp;
        return size_t(program) < clock.size() && clock[program] > epoch;
    }
};

struct GlobalCell {
    Touch write, reads[3];
    u8 next = 0;
    bool atomic = false;
};

struct Range {
    u64 start, end;
    std::vector<GlobalCell> cells;  // of `granule` bytes each, the smallest that the kernel accesses
};

struct GlobalMemory {
    std::vector<Range> ranges;                // what a launch may touch
    std::unordered_map<u64, Clock> released;  // by the address of an atomic
    Reports* reports = nullptr;
    u64 granule = 2;
    bool track = true;
    size_t last = 0;

    void set(const u64* starts, const u64* sizes, int count, int granule_, bool track_, Reports* reports_) {
        granule = u64(granule_), track = track_, reports = reports_;
        for (int i = 0; i < count; ++i) {
            Range range{starts[i], starts[i] + sizes[i], {}};
            if (track) range.cells.resize(sizes[i] / granule + 1);
            ranges.push_back(std::move(range));
        }
    }

    Range* find(u64 address, u32 size) {
        auto holds = [&](const Range& r) { return address >= r.start && address + size <= r.end; };
        if (last < ranges.size() && holds(ranges[last])) return &ranges[last];
        for (size_t i = 0; i < ranges.size(); ++i)
            if (holds(ranges[i])) return &ranges[last = i];
        return nullptr;
    }

    bool allows(u64 address, u32 size, const Access& who) {
        if (address % size) reports->add(GLOBAL_MISALIGNED, who, address);
        else if (!find(address, size)) reports->add(GLOBAL_OUT, who, address);
        else return true;
        return false;
    }

    void read(u64 address, u32 size, const Access& who, const Clock& clock) {
        each_cell(address, size, [&](GlobalCell& cell, u64 byte) {
            check(cell.write, who, clock, GLOBAL_RACE_READ, byte);
            note_reader(cell, who, clock);
        });
    }

    // `fresh` is what will lie there (null: not known).
    void write(u64 address, u32 size, const u8* fresh, const Access& who, const Clock& clock, bool atomic = false) {
        each_cell(address, size, [&](GlobalCell& cell, u64 byte) {
            bool same = fresh && !std::memcmp(reinterpret_cast<u8*>(byte), fresh + (byte - address), granule);
            if (!(atomic && cell.atomic))
                check(cell.write, who, clock, same ? GLOBAL_SAME_VALUE : GLOBAL_RACE_WRITE, byte);
            if (!atomic && !same && cell.write.program == who.program && cell.write.stamp == who.stamp)
                reports->add(GLOBAL_LANES_DIFFER, who, byte);
            for (Touch& t : cell.reads) check(t, who, clock, GLOBAL_RACE_READ, byte), t = {};
            cell.write = {who.program, who.pc, who.epoch, 1u << who.warp, who.stamp};
            cell.atomic = atomic;
        });
    }

    // A release: whoever acquires here afterwards knows what this program did before its last barrier.
    void release(u64 address, const Access& who, const Clock& clock) {
        Clock& channel = released[address];
        join(channel, clock);
        if (channel.size() <= size_t(who.program)) channel.resize(who.program + 1);
        channel[who.program] = std::max(channel[who.program], who.epoch);
    }

  private:
    template <class F> void each_cell(u64 address, u32 size, F f) {
        if (!track) return;
        Range& range = *find(address, size);
        u64 from = address - range.start;
        for (u64 at = from / granule; at <= (from + size - 1) / granule; ++at)
            f(range.cells[at], range.start + at * granule);
    }

    void check(const Touch& touch, const Access& who, const Clock& clock, Finding finding, u64 byte) {
        if (touch.program < 0 || touch.before(who, clock)) return;
        reports->add(touch.program == who.program ? GLOBAL_IN_PROGRAM : finding, who, byte, touch.pc);
    }

    // Three readers are kept. One that came before this one for certain may go: what races with it races with both.
    static void note_reader(GlobalCell& cell, const Access& who, const Clock& clock) {
        Touch* place = nullptr;
        for (Touch& t : cell.reads) {
            if (t.program == who.program && t.epoch == who.epoch) {
                t.warps |= 1u << who.warp, t.pc = who.pc;
                return;
            }
            if (t.program < 0 || t.before(who, clock)) place = &t;
        }
        if (!place) place = &cell.reads[cell.next], cell.next = u8((cell.next + 1) % 3);
        *place = {who.program, who.pc, who.epoch, 1u << who.warp, who.stamp};
    }
};
