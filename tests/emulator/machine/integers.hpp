// Arithmetic on integers.
#pragma once
#include "state.hpp"

inline bool integer(const Operands& on) {
    const Instruction& i = on.i;
#define TWO(op, D, A, B, expr) \
    case op: on.binary<D, A, B>([](A a, B b) { return D(expr); }); return true;
#define THREE(op, D, A, B, C, expr) \
    case op: on.ternary<D, A, B, C>([](A a, B b, C c) { return D(expr); }); return true;
#define ONE(op, D, A, expr) \
    case op: on.unary<D, A>([](A a) { return D(expr); }); return true;
#define ONE_UNSIGNED(n, expr) \
    ONE(n##_u16, u16, u16, expr) ONE(n##_u32, u32, u32, expr) ONE(n##_u64, u64, u64, expr)
#define TWO_UNSIGNED(n, expr) \
    TWO(n##_u16, u16, u16, u16, expr) TWO(n##_u32, u32, u32, u32, expr) TWO(n##_u64, u64, u64, u64, expr)
#define TWO_TYPED(n, expr) \
    TWO(n##_s16, s16, s16, s16, expr) TWO(n##_s32, s32, s32, s32, expr) TWO(n##_s64, s64, s64, s64, expr) \
    TWO_UNSIGNED(n, expr)
#define SHIFT_UNSIGNED(n, expr) \
    TWO(n##_u16, u16, u16, u32, expr) TWO(n##_u32, u32, u32, u32, expr) TWO(n##_u64, u64, u64, u32, expr)
#define SHIFT_SIGNED(n, expr) \
    TWO(n##_s16, s16, s16, u32, expr) TWO(n##_s32, s32, s32, u32, expr) TWO(n##_s64, s64, s64, u32, expr)
    switch (i.op) {
        TWO_UNSIGNED(add, a + b)
        TWO_UNSIGNED(sub, a - b)
        TWO_UNSIGNED(mul, u64(a) * b)
        TWO_UNSIGNED(and, a & b)
        TWO_UNSIGNED(or, a | b)
        TWO_UNSIGNED(xor, a ^ b)
        ONE_UNSIGNED(not, ~a)
        ONE_UNSIGNED(neg, 0 - a)
        TWO_TYPED(min, a < b ? a : b)
        TWO_TYPED(max, a > b ? a : b)
        TWO_TYPED(div, quotient(a, b))
        TWO_TYPED(rem, remainder_of(a, b))
        SHIFT_UNSIGNED(shl, shift_left(a, b))
        SHIFT_UNSIGNED(shr, shift_right(a, b))
        SHIFT_SIGNED(shr, shift_right(a, b))
        ONE(abs_s16, u16, s16, a < 0 ? 0 - u32(a) : u32(a))
        ONE(abs_s32, u32, s32, a < 0 ? 0 - u32(a) : u32(a))
        ONE(abs_s64, u64, s64, a < 0 ? 0 - u64(a) : u64(a))
        THREE(mad_u16, u16, u16, u16, u16, u32(a) * b + c)
        THREE(mad_u32, u32, u32, u32, u32, a * b + c)
        THREE(mad_u64, u64, u64, u64, u64, a * b + c)
        TWO(mulhi_s16, s16, s16, s16, s32(a) * b >> 16)
        TWO(mulhi_u16, u16, u16, u16, u32(a) * b >> 16)
        TWO(mulhi_s32, s32, s32, s32, s64(a) * b >> 32)
        TWO(mulhi_u32, u32, u32, u32, u64(a) * b >> 32)
        TWO(mulhi_s64, s64, s64, s64, (__int128)a * b >> 64)
        TWO(mulhi_u64, u64, u64, u64, (unsigned __int128)a * b >> 64)
        TWO(mulwide_s16, s32, s16, s16, s32(a) * b)
        TWO(mulwide_u16, u32, u16, u16, u32(a) * b)
        TWO(mulwide_s32, s64, s32, s32, s64(a) * b)
        TWO(mulwide_u32, u64, u32, u32, u64(a) * b)
        THREE(madwide_s16, u32, s16, s16, u32, u32(s32(a) * b) + c)
        THREE(madwide_u16, u32, u16, u16, u32, u32(a) * b + c)
        THREE(madwide_s32, u64, s32, s32, u64, u64(s64(a) * b) + c)
        THREE(madwide_u32, u64, u32, u32, u64, u64(a) * b + c)
        THREE(bfe_s32, s32, s32, u32, u32, bit_field(a, b, c))
        THREE(bfe_u32, u32, u32, u32, u32, bit_field(a, b, c))
        THREE(bfe_s64, s64, s64, u32, u32, bit_field(a, b, c))
        THREE(bfe_u64, u64, u64, u32, u32, bit_field(a, b, c))
        THREE(prmt, u32, u32, u32, u32, permute_bytes(a, b, c))
        ONE(popc_b32, u32, u32, std::popcount(a))
        ONE(clz_b32, u32, u32, std::countl_zero(a))
        ONE(brev_b32, u32, u32, reverse_bits(a))
        case lop3:
            on.ternary<u32, u32, u32, u32>([&](u32 a, u32 b, u32 c) { return lookup3(a, b, c, u32(i.immediate)); });
            return true;
        case shf_l:
            on.ternary<u32, u32, u32, u32>([&](u32 a, u32 b, u32 c) { return funnel_left(a, b, c, i.how); });
            return true;
        case shf_r:
            on.ternary<u32, u32, u32, u32>([&](u32 a, u32 b, u32 c) { return funnel_right(a, b, c, i.how); });
            return true;
        case bfi_b32: {
            u32 *d = on.slot(0), *a = on.slot(1), *b = on.slot(2), *at = on.slot(3), *length = on.slot(4);
            each_lane(on.mask, [=](int l) { d[l] = insert_bits(a[l], b[l], at[l], length[l]); });
            return true;
        }
    }
    return false;
#undef ONE
#undef TWO
#undef THREE
}
