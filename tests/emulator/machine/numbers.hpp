// Numbers as a GPU's registers hold them: bit patterns of 16, 32 and 64 bits, and the arithmetic that C++ lacks.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// float16 and bfloat16 compute in float32 and round when they are stored.
struct Half { f32 value; };
struct Brain { f32 value; };

inline f32 half_to_float(u16 bits) {
    u32 sign = u32(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return std::bit_cast<f32>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return std::copysign(f32(mantissa) * 0x1p-24f, sign ? -1.0f : 1.0f);
    return std::bit_cast<f32>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline u16 float_to_half(f32 x) {
    u32 bits = std::bit_cast<u32>(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (bits >= 0x47800000) return u16(sign | 0x7c00);
    // Below the smallest normal: adding 0.5 lets the float32 unit round to multiples of 2^-24.
    if (bits < 0x38800000) return u16(sign | (std::bit_cast<u32>(std::bit_cast<f32>(bits) + 0.5f) - 0x3f000000));
    return u16(sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

inline f32 brain_to_float(u16 bits) { return std::bit_cast<f32>(u32(bits) << 16); }

inline u16 float_to_brain(f32 x) {
    if (std::isnan(x)) return 0x7fff;
    u32 bits = std::bit_cast<u32>(x);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rounded to odd: a second rounding, to 16 bits, then gives what one rounding would have given.
inline f32 to_odd(f64 x) {
    f32 near = f32(x);
    if (!std::isfinite(near) || f64(near) == x) return near;
    u32 bits = std::bit_cast<u32>(near);
    if (std::fabs(f64(near)) > std::fabs(x)) bits -= 1;
    return std::bit_cast<f32>(bits | 1);
}
inline u16 double_to_half(f64 x) { return float_to_half(to_odd(x)); }
inline u16 double_to_brain(f64 x) { return float_to_brain(to_odd(x)); }

inline f32 flush(f32 x) {
    return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x;
}

// A tensor core reads the upper 19 bits of a TF32 operand and ignores the rest.
inline f32 tf32(u32 bits) { return std::bit_cast<f32>(bits & 0xffffe000u); }

inline u32 round_tf32(f32 x) {  // cvt.rna: to nearest, ties away from zero
    if (std::isnan(x)) return 0x7fffffff;
    if (std::isinf(x)) return std::bit_cast<u32>(x);
    return (std::bit_cast<u32>(x) + 0x1000u) & 0xffffe000u;
}

// A lane of a register: one 32-bit word, two for 64 bits.
template <class T> inline T get(const u32* slot, int lane) {
    if constexpr (std::is_same_v<T, bool>) return slot[lane] & 1;
    else if constexpr (std::is_same_v<T, Half>) return {half_to_float(u16(slot[lane]))};
    else if constexpr (std::is_same_v<T, Brain>) return {brain_to_float(u16(slot[lane]))};
    else if constexpr (sizeof(T) == 8) return std::bit_cast<T>(reinterpret_cast<const u64*>(slot)[lane]);
    else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(slot[lane]);
    else return T(slot[lane]);
}

template <class T> inline void put(u32* slot, int lane, T value) {
    if constexpr (std::is_same_v<T, bool>) slot[lane] = value;
    else if constexpr (std::is_same_v<T, Half>) slot[lane] = float_to_half(value.value);
    else if constexpr (std::is_same_v<T, Brain>) slot[lane] = float_to_brain(value.value);
    else if constexpr (sizeof(T) == 8) reinterpret_cast<u64*>(slot)[lane] = std::bit_cast<u64>(value);
    else if constexpr (sizeof(T) == 4) slot[lane] = std::bit_cast<u32>(value);
    else slot[lane] = u32(std::make_unsigned_t<T>(value));
}

// min and max ignore a NaN beside a number, unless the instruction says .NaN.
template <class T> inline T lesser(T a, T b, bool nan_wins) {
    if (std::isnan(a) || std::isnan(b)) {
        bool both = std::isnan(a) && std::isnan(b);
        if (nan_wins || both) return T(std::bit_cast<f32>(0x7fffffff));
        return std::isnan(a) ? b : a;
    }
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> inline T greater(T a, T b, bool nan_wins) {
    if (std::isnan(a) || std::isnan(b)) return lesser(a, b, nan_wins);
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class T> inline T quotient(T a, T b) {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
    return a / b;
}
template <class T> inline T remainder_of(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
        if (b == T(-1)) return 0;
    return a % b;
}

// Shifts take any distance: beyond the width nothing is left but the sign.
template <class T> inline T shift_right(T a, u32 by) {
    if (by >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
    return T(a >> by);
}
template <class T> inline T shift_left(T a, u32 by) { return by >= 8 * sizeof(T) ? T(0) : T(a << by); }

// shf: the upper or the lower word of two, shifted.
inline u32 funnel_left(u32 low, u32 high, u32 by, bool wrap) {
    by = wrap ? by & 31 : by > 32 ? 32 : by;
    return u32((u64(high) << 32 | low) << by >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 by, bool wrap) {
    by = wrap ? by & 31 : by > 32 ? 32 : by;
    return u32((u64(high) << 32 | low) >> by);
}

template <class T> inline T bit_field(T a, u32 at, u32 length) {  // bfe
    using U = std::make_unsigned_t<T>;
    constexpr u32 width = 8 * sizeof(T);
    at &= 255, length &= 255;
    if (length == 0) return 0;
    bool sign = false;
    if constexpr (std::is_signed_v<T>) sign = U(a) >> (at + length - 1 < width ? at + length - 1 : width - 1) & 1;
    U bits = at >= width ? 0 : U(a) >> at;
    u32 valid = at >= width ? 0 : width - at < length ? width - at : length;
    if (valid < width) {
        U inside = (U(1) << valid) - 1;
        bits = sign ? bits | ~inside : bits & inside;
    }
    return T(bits);
}
inline u32 insert_bits(u32 field, u32 into, u32 at, u32 length) {  // bfi
    at &= 255, length &= 255;
    if (at >= 32) return into;
    u32 mask = u32((length >= 32 ? ~0u : (1u << length) - 1) << at);
    return (into & ~mask) | (field << at & mask);
}
inline u32 reverse_bits(u32 a) {
    u32 out = 0;
    for (int k = 0; k < 32; ++k) out |= (a >> k & 1) << (31 - k);
    return out;
}
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {  // prmt in its default mode
    u64 bytes = u64(b) << 32 | a;
    u32 out = 0;
    for (int k = 0; k < 4; ++k) {
        u32 pick = selector >> 4 * k & 15, byte = u32(bytes >> 8 * (pick & 7)) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * k;
    }
    return out;
}
inline u32 lookup3(u32 a, u32 b, u32 c, u32 table) {  // lop3
    u32 out = 0;
    for (int k = 0; k < 8; ++k)
        if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return out;
}

// setp, in the order of instruction.hpp's comparisons; the second half is true for NaN.
template <class T> inline bool compare(int how, T a, T b) {
    bool unordered = a != a || b != b;
    switch (how) {
        case 0: return a == b;
        case 1: return !unordered && a != b;
        case 2: return a < b;
        case 3: return a <= b;
        case 4: return a > b;
        case 5: return a >= b;
        case 6: return unordered || a == b;
        case 7: return a != b;
        case 8: return unordered || a < b;
        case 9: return unordered || a <= b;
        case 10: return unordered || a > b;
        case 11: return unordered || a >= b;
        case 12: return !unordered;
        default: return unordered;
    }
}
