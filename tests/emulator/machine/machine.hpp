// The machine: programs in a seeded random order, a few at a time, a few instructions of a random warp at a time.
#pragma once
#include "floats.hpp"
#include "integers.hpp"
#include "lanes.hpp"
#include "moves.hpp"

enum PresetKind : s64 { CONSTANT, PARAMETER, SPECIAL };
struct Preset { s64 slot, kind, width, value; };  // what a register holds from the beginning on

struct Options {
    s64 seed, resident, burst, track, limit, shared, late;  // late: 0 never, 1 always, 2 at random
};
struct Counts {
    s64 instructions[KIND_COUNT], loaded, stored, programs;
};

struct Machine {
    const Instruction* code;
    const s64* lists;  // registers of instructions that have more operands than fit into a row
    int length, slots, threads, shared_granule;
    std::vector<Preset> presets;
    s64 grid[3];
    Options options;

    std::vector<u32> image;  // a warp's registers when it starts
    Counts counts{};
    Reports reports;
    GlobalMemory global;
    Random random;
    s64 executed = 0;
    bool stopped = false;

    void run();
    void step(Program& program, int w);

  private:
    bool arrives_late() { return options.late == 1 || (options.late == 2 && random.below(2)); }
    void start(Program& program, int number);
    void release(Program& program);
    void leave(Program& program, int w, Fragment& at, u32 mask, const Access& who);
    bool branch(Warp& warp, Fragment& at, const Instruction& i, u32 mask);
    bool execute(Program& program, int w, const Instruction& i, u32 mask, const Access& who);

    bool access_memory(Program& program, int w, const Operands& on, Access who);
    void load(Program& program, const Operands& on, Access who);
    void store(Program& program, const Operands& on, Access who);
    void atomic(Program& program, const Operands& on, Access who);
    void issue_copies(Program& program, int w, const Operands& on, Access who);
    void fetch(Program& program, int w, Copy& copy);
    void complete(Program& program, int w, std::vector<Copy>& group);
    void load_matrices(Program& program, const Operands& on, Access who);
    void store_matrices(Program& program, const Operands& on, Access who);

    bool multiply(Program& program, int w, const Operands& on, const Access& who);
    void finish_products(Program& program, int w, size_t groups_left);
    void finish(Program& program, int w, const Product& product);
    f64 element(Program& program, int w, const Product& product, u64 address, const Access& who);
};
