// Moves, selections, comparisons, and conversions from one type to another.
#pragma once
#include "state.hpp"

template <class T> inline void set_predicate(const Operands& on) {
    const Instruction& i = on.i;
    u32 *p = on.slot(0), *q = on.has(1) ? on.slot(1) : nullptr, *a = on.slot(2), *b = on.slot(3);
    u32* with = i.extra ? on.slot(4) : nullptr;  // joined by and, or, xor
    each_lane(on.mask, [&](int l) {
        bool yes;
        if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Brain>)
            yes = compare(int(i.how), get<T>(a, l).value, get<T>(b, l).value);
        else yes = compare(int(i.how), get<T>(a, l), get<T>(b, l));
        bool no = !yes;
        if (with) {
            bool other = bool(with[l] & 1) != bool(i.immediate);
            yes = i.extra == 1 ? yes && other : i.extra == 2 ? yes || other : yes != other;
            no = i.extra == 1 ? no && other : i.extra == 2 ? no || other : no != other;
        }
        p[l] = yes;
        if (q) q[l] = no;
    });
}

inline u64 part_mask(s64 bytes) { return bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1; }

inline void pack_parts(const Operands& on) {
    const Instruction& i = on.i;
    each_lane(on.mask, [&](int l) {
        u64 all = 0;
        for (int k = 0; k < i.count; ++k) all |= (u64(on.slot(k + 1)[l]) & part_mask(i.size)) << 8 * i.size * k;
        if (i.size * i.count == 8) put<u64>(on.slot(0), l, all);
        else on.slot(0)[l] = u32(all);
    });
}
inline void unpack_parts(const Operands& on) {
    const Instruction& i = on.i;
    u64 all[32];  // read before a part is written: the source may be one of them
    u32* source = on.slot(int(i.count));
    each_lane(on.mask, [&](int l) { all[l] = i.size * i.count == 8 ? get<u64>(source, l) : source[l]; });
    for (int k = 0; k < i.count; ++k)
        if (on.has(k))
            each_lane(on.mask, [&](int l) { on.slot(k)[l] = u32(all[l] >> 8 * i.size * k & part_mask(i.size)); });
}

inline f64 rounded(f64 x, s64 how) {  // to an integer: nearest, towards zero, down, up
    return how == 1 ? std::trunc(x) : how == 2 ? std::floor(x) : how == 3 ? std::ceil(x) : std::nearbyint(x);
}

// A value of any type: `real` for floating point, `whole` for the others.
struct Value {
    s64 whole;
    f64 real;
};

inline Value read_as(int type, const u32* a, int l, bool ftz) {
    switch (type) {
        case S8: return {s8(a[l]), 0};
        case U8: return {u8(a[l]), 0};
        case S16: return {s16(a[l]), 0};
        case U16: return {u16(a[l]), 0};
        case S32: return {s32(a[l]), 0};
        case U32: return {s64(a[l]), 0};
        case S64: case U64: return {get<s64>(a, l), 0};
        case F16: return {0, half_to_float(u16(a[l]))};
        case BF16: return {0, brain_to_float(u16(a[l]))};
        case F32: {
            f32 x = std::bit_cast<f32>(a[l]);
            return {0, ftz ? flush(x) : x};
        }
        default: return {0, get<f64>(a, l)};
    }
}

inline s64 to_whole(f64 x, int type) {  // clamped; NaN is 0
    static const f64 low[] = {-128, 0, -32768, 0, -0x1p31, 0, -0x1p63, 0};
    static const f64 high[] = {127, 255, 32767, 65535, 0x1p31 - 1, 0x1p32 - 1, 0x1p63, 0x1p64};
    if (std::isnan(x)) return 0;
    if (x <= low[type]) return s64(low[type]);
    if (x >= high[type]) return type == U64 ? -1 : type == S64 ? INT64_MAX : s64(high[type]);
    return type == U64 ? s64(u64(x)) : s64(x);
}

inline void write_as(int type, u32* d, int l, f64 x, bool towards_zero) {
    switch (type) {
        case F16: d[l] = double_to_half(x); return;
        case BF16: d[l] = double_to_brain(x); return;
        case F64: put<f64>(d, l, x); return;
    }
    f32 near = f32(x);
    if (towards_zero && std::fabs(f64(near)) > std::fabs(x)) near = std::nextafter(near, 0.0f);
    put<f32>(d, l, near);
}
inline void write_whole(int type, u32* d, int l, s64 x) {
    switch (type) {
        case S8: d[l] = u32(s32(s8(x))); return;
        case U8: d[l] = u8(x); return;
        case S16: d[l] = u32(s32(s16(x))); return;
        case U16: d[l] = u16(x); return;
        case S32: case U32: d[l] = u32(x); return;
        default: put<s64>(d, l, x);
    }
}

inline void convert(const Operands& on) {  // how: from, extra: to, immediate: rounding, count: to an integer
    const Instruction& i = on.i;
    u32 *d = on.slot(0), *a = on.slot(1);
    const int from = int(i.how), to = int(i.extra);
    each_lane(on.mask, [&](int l) {
        u32 low = on.flag(WIDE) ? u32(get<u64>(a, l)) : 0;
        Value v = on.flag(WIDE) ? read_as(from, &low, 0, false) : read_as(from, a, l, on.flag(FTZ));
        if (from < F16) {
            f64 real = from == U64 ? f64(u64(v.whole)) : f64(v.whole);
            if (to == F32) put<f32>(d, l, from == U64 ? f32(u64(v.whole)) : f32(v.whole));  // one rounding
            else if (to > F16 || to == F16) write_as(to, d, l, real, false);
            else write_whole(to, d, l, v.whole);
        } else if (to < F16) {
            write_whole(to, d, l, to_whole(rounded(v.real, i.immediate), to));
        } else {
            if (i.count) v.real = rounded(v.real, i.immediate);
            if (on.flag(SATURATE)) v.real = v.real > 1 ? 1 : v.real > 0 ? v.real : 0;
            if (on.flag(RELU) && v.real < 0) v.real = 0;
            write_as(to, d, l, v.real, i.immediate == 1);
        }
    });
}

inline void convert_pair(const Operands& on, u16 (*narrow)(f32)) {
    u32 *d = on.slot(0), *a = on.slot(1), *b = on.slot(2);
    auto clamped = [&](u32 bits) {
        f32 x = std::bit_cast<f32>(bits);
        return on.flag(RELU) ? greater(x, 0.0f, true) : x;
    };
    each_lane(on.mask, [&](int l) { d[l] = u32(narrow(clamped(a[l]))) << 16 | narrow(clamped(b[l])); });
}

inline bool move(const Operands& on) {
    auto same = [](auto a) { return a; };
    auto pick = [](auto a, auto b, bool p) { return p ? a : b; };
    switch (on.i.op) {
        case and_pred: on.binary<bool, bool, bool>([](bool a, bool b) { return a && b; }); return true;
        case or_pred: on.binary<bool, bool, bool>([](bool a, bool b) { return a || b; }); return true;
        case xor_pred: on.binary<bool, bool, bool>([](bool a, bool b) { return a != b; }); return true;
        case not_pred: on.unary<bool, bool>([](bool a) { return !a; }); return true;
        case mov_pred: on.unary<bool, bool>(same); return true;
        case mov_b16: on.unary<u16, u16>(same); return true;
        case mov_b32: on.unary<u32, u32>(same); return true;
        case mov_b64: on.unary<u64, u64>(same); return true;
        case pack: pack_parts(on); return true;
        case unpack: unpack_parts(on); return true;
        case selp_b16: on.ternary<u16, u16, u16, bool>(pick); return true;
        case selp_b32: on.ternary<u32, u32, u32, bool>(pick); return true;
        case selp_b64: on.ternary<u64, u64, u64, bool>(pick); return true;
        case setp_s16: set_predicate<s16>(on); return true;
        case setp_u16: set_predicate<u16>(on); return true;
        case setp_s32: set_predicate<s32>(on); return true;
        case setp_u32: set_predicate<u32>(on); return true;
        case setp_s64: set_predicate<s64>(on); return true;
        case setp_u64: set_predicate<u64>(on); return true;
        case setp_f32: set_predicate<f32>(on); return true;
        case setp_f64: set_predicate<f64>(on); return true;
        case setp_f16: set_predicate<Half>(on); return true;
        case setp_bf16: set_predicate<Brain>(on); return true;
        case cvt: convert(on); return true;
        case cvt_f16x2: convert_pair(on, float_to_half); return true;
        case cvt_bf16x2: convert_pair(on, float_to_brain); return true;
        case cvt_tf32: on.unary<u32, f32>(round_tf32); return true;
    }
    return false;
}
