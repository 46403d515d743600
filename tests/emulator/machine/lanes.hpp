// What the lanes of a warp tell one another.
#pragma once
#include "state.hpp"

inline void shuffle(const Operands& on) {
    u32 taken[32], *d = on.slot(0), *a = on.slot(2), *b = on.slot(3), *c = on.slot(4);
    bool inside[32];
    for (int l = 0; l < 32; ++l) {
        int clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31), by = int(b[l] & 31);
        int bound = (l & segment) | (clamp & ~segment), source;
        switch (on.i.how) {
            case 0: source = l - by; inside[l] = source >= bound; break;  // up
            case 1: source = l + by; inside[l] = source <= bound; break;  // down
            case 2: source = l ^ by; inside[l] = source <= bound; break;  // bfly
            default: source = (l & segment) | (by & ~segment); inside[l] = source <= bound;  // idx
        }
        taken[l] = a[inside[l] ? source & 31 : l];
    }
    each_lane(on.mask, [&](int l) {
        d[l] = taken[l];
        if (on.has(1)) on.slot(1)[l] = inside[l];
    });
}

inline void ballot(const Operands& on) {
    u32 set = 0, *p = on.slot(1), *d = on.slot(0);
    each_lane(on.mask, [&](int l) { set |= u32(bool(p[l] & 1) != bool(on.i.immediate)) << l; });
    u32 all = set == on.mask, any = set != 0;
    u32 values[] = {set, all, any, u32(all || !any)};
    each_lane(on.mask, [&](int l) { d[l] = values[on.i.how]; });
}

inline void reduce(const Operands& on) {
    u32 *a = on.slot(1), *d = on.slot(0), all = 0;
    bool begun = false;
    const bool is_signed = on.i.extra == S32;
    each_lane(on.mask, [&](int l) {
        u32 x = a[l];
        if (!begun) all = x;
        else switch (on.i.how) {
            case 0: all += x; break;
            case 1: all = is_signed ? u32(std::min(s32(all), s32(x))) : std::min(all, x); break;
            case 2: all = is_signed ? u32(std::max(s32(all), s32(x))) : std::max(all, x); break;
            case 3: all &= x; break;
            case 4: all |= x; break;
            default: all ^= x;
        }
        begun = true;
    });
    each_lane(on.mask, [&](int l) { d[l] = all; });
}

inline bool between_lanes(const Operands& on) {
    switch (on.i.op) {
        case shfl: shuffle(on); return true;
        case vote: ballot(on); return true;
        case redux: reduce(on); return true;
        case activemask: each_lane(on.mask, [&](int l) { on.slot(0)[l] = on.mask; }); return true;
    }
    return false;
}
