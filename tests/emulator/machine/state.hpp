// What runs: programs of warps of 32 lanes, and what they have set out but not waited for.
#pragma once
#include "global_memory.hpp"
#include "shared_memory.hpp"

struct Random {
    u64 state = 0;
    u64 next() {
        u64 z = state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    u64 below(u64 n) { return n ? next() % n : 0; }
};

// Lanes of a warp that are at the same place.
struct Fragment {
    int pc;
    u32 lanes;
    bool waiting;
};

struct Copy {  // cp.async, one lane's
    u64 to, from;
    u32 size, used;
    int lane, pc;
    u8 data[16];
    bool fetched;
};

struct Product {  // wgmma; operand A's registers are taken when it is issued
    const Instruction* instruction;
    int pc;
    u64 left, right, stamp;
    bool accumulate;
    u32 a[4][32];
};

struct Warp {
    std::vector<u32> slots;  // 32 lanes a slot
    std::vector<Fragment> fragments;
    std::vector<std::vector<Copy>> copies;  // by group; the last one is still open
    std::vector<std::vector<Product>> products;
    Clock clock;
    u32 epoch = 1;  // counts barriers, those of this warp alone too
    u32 fences = 0, fence_epoch = 0;  // for the asynchronous proxy

    bool runnable() const {
        return std::any_of(fragments.begin(), fragments.end(), [](const Fragment& f) { return !f.waiting; });
    }
    bool whole() const { return fragments.size() == 1; }
    u32* slot(s64 number) { return &slots[number * 32]; }

    // Lanes that meet again go on together.
    void merge() {
        auto& f = fragments;
        for (size_t i = 0; i < f.size(); ++i)
            for (size_t j = f.size() - 1; j > i; --j)
                if (f[i].pc == f[j].pc && f[i].waiting == f[j].waiting) {
                    f[i].lanes |= f[j].lanes;
                    f.erase(f.begin() + s64(j));
                }
    }
};

struct Program {
    int number, at[3];
    u32 epoch = 1;  // counts barriers
    std::vector<Warp> warps;
    SharedMemory shared;

    bool done() const {
        return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.fragments.empty(); });
    }
};

template <class F> inline void each_lane(u32 mask, F f) {
    if (mask == ~0u) {
        for (int lane = 0; lane < 32; ++lane) f(lane);
    } else {
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) f(lane);
    }
}

// An instruction at work: its operands in a warp's registers, and the lanes that take part.
struct Operands {
    Warp& warp;
    const Instruction& i;
    u32 mask;

    u32* slot(int k) const { return warp.slot(i.operand[k]); }
    bool has(int k) const { return i.operand[k] >= 0; }
    bool flag(Flag flag) const { return i.flags & flag; }

    template <class D, class A, class F> void unary(F f) const {
        u32 *d = slot(0), *a = slot(1);
        each_lane(mask, [=](int l) { put<D>(d, l, f(get<A>(a, l))); });
    }
    template <class D, class A, class B, class F> void binary(F f) const {
        u32 *d = slot(0), *a = slot(1), *b = slot(2);
        each_lane(mask, [=](int l) { put<D>(d, l, f(get<A>(a, l), get<B>(b, l))); });
    }
    template <class D, class A, class B, class C, class F> void ternary(F f) const {
        u32 *d = slot(0), *a = slot(1), *b = slot(2), *c = slot(3);
        each_lane(mask, [=](int l) { put<D>(d, l, f(get<A>(a, l), get<B>(b, l), get<C>(c, l))); });
    }
};
