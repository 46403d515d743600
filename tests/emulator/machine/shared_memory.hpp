// Shared memory of one program, with a shadow: between two barriers no two warps touch the same bytes, if one writes.
#pragma once
#include <algorithm>
#include <vector>

#include "reports.hpp"

struct SharedCell {
    u32 write_epoch = 0, write_warp_epoch = 0, fences = 0;
    u32 read_epoch = 0, read_warp_epoch = 0, reader_warps = 0, reader_lanes = 0;
    u64 write_stamp = 0;
    int write_pc = -1, read_pc = -1;
    int writer_warp = -1, writer_lane = -1, last_reader = -1;
    int copies_in_flight = 0;
    bool written = false;
};

struct SharedMemory {
    std::vector<u8> bytes;
    std::vector<SharedCell> cells;  // of `granule` bytes each, the smallest that the kernel accesses
    u64 granule = 1;
    Reports* reports = nullptr;

    void reset(size_t size, int granule_, Reports* reports_) {
        granule = u64(granule_), reports = reports_;
        bytes.assign(size, 0xff);  // NaN in every floating-point type
        cells.assign(size / granule + 1, {});
    }

    bool allows(u64 address, u32 size, const Access& who) {
        if (address + size > bytes.size()) reports->add(SHARED_OUT, who, address);
        else if (address % size) reports->add(SHARED_MISALIGNED, who, address);
        else return true;
        return false;
    }

    void read(u64 address, u32 size, const Access& who) {
        for (u64 at = address / granule; at < (address + size + granule - 1) / granule; ++at) {
            SharedCell& cell = cells[at];
            if (cell.copies_in_flight) reports->add(SHARED_IN_FLIGHT, who, at * granule, cell.write_pc);
            if (!cell.written) reports->add(SHARED_UNWRITTEN, who, at * granule);
            if (cell.write_epoch == who.epoch && cell.writer_warp >= 0) {
                if (cell.writer_warp != who.warp) reports->add(SHARED_RACE_READ, who, at * granule, cell.write_pc);
                else if (cell.writer_lane != who.lane && cell.write_warp_epoch == who.warp_epoch)
                    reports->add(SHARED_IN_WARP, who, at * granule, cell.write_pc);
            }
            note_reader(cell, who);
        }
    }

    // `fresh` is what will lie there (null: not known yet); `flight` +1 when a copy sets out, -1 when it arrives.
    void write(u64 address, u32 size, const u8* fresh, const Access& who, int flight = 0) {
        for (u64 at = address / granule; at < (address + size + granule - 1) / granule; ++at) {
            SharedCell& cell = cells[at];
            u64 byte = at * granule;
            if (cell.copies_in_flight && flight >= 0) reports->add(SHARED_IN_FLIGHT, who, byte, cell.write_pc);
            if (cell.write_epoch == who.epoch && cell.writer_warp >= 0) {
                bool same = fresh && !std::memcmp(&bytes[byte], fresh + (byte - address), granule);
                if (cell.writer_warp != who.warp)
                    reports->add(same ? SHARED_SAME_VALUE : SHARED_RACE_WRITE, who, byte, cell.write_pc);
                else if (cell.writer_lane != who.lane && !same && cell.write_warp_epoch == who.warp_epoch)
                    reports->add(cell.write_stamp == who.stamp ? SHARED_LANES_DIFFER : SHARED_IN_WARP, who, byte,
                                 cell.write_pc);
            }
            check_readers(cell, who, byte);
            cell.write_epoch = who.epoch, cell.write_warp_epoch = who.warp_epoch, cell.write_stamp = who.stamp;
            cell.writer_warp = who.warp, cell.writer_lane = who.lane, cell.write_pc = who.pc;
            cell.written = true, cell.fences = who.fences;
            cell.copies_in_flight = std::max(0, cell.copies_in_flight + flight);
        }
    }

  private:
    static void note_reader(SharedCell& cell, const Access& who) {
        if (cell.read_epoch != who.epoch) cell.read_epoch = who.epoch, cell.reader_warps = 0, cell.last_reader = -1;
        if (cell.last_reader != who.warp || cell.read_warp_epoch != who.warp_epoch)
            cell.reader_lanes = 0, cell.last_reader = who.warp, cell.read_warp_epoch = who.warp_epoch;
        cell.reader_warps |= 1u << who.warp, cell.reader_lanes |= 1u << who.lane, cell.read_pc = who.pc;
    }

    void check_readers(const SharedCell& cell, const Access& who, u64 byte) {
        if (cell.read_epoch != who.epoch) return;
        if (cell.reader_warps & ~(1u << who.warp)) reports->add(SHARED_RACE_READ, who, byte, cell.read_pc);
        else if (cell.last_reader == who.warp && cell.read_warp_epoch == who.warp_epoch &&
                 (cell.reader_lanes & ~(1u << who.lane)))
            reports->add(SHARED_IN_WARP, who, byte, cell.read_pc);
    }
};
