// Arithmetic on floating point. What a GPU approximates (division, square roots, ex2, …) is exact here.
#pragma once
#include "state.hpp"

// The types that an operation on floating point comes in, in the order of their numbers (OF_FLOAT).
enum FloatType : s64 { OF_F32, OF_F64, OF_F16, OF_BF16, OF_F16X2, OF_BF16X2 };

// A pair of 16-bit values in every word.
template <class U, class F> inline bool pairs(const Operands& on, int arity, U (*in)(u16), u16 (*out)(U), F f) {
    u32 *d = on.slot(0), *a = on.slot(1), *b = arity > 1 ? on.slot(2) : a, *c = arity > 2 ? on.slot(3) : a;
    each_lane(on.mask, [&](int l) {
        u32 low = out(f(in(u16(a[l])), in(u16(b[l])), in(u16(c[l]))));
        u32 high = out(f(in(u16(a[l] >> 16)), in(u16(b[l] >> 16)), in(u16(c[l] >> 16))));
        d[l] = high << 16 | low;
    });
    return true;
}
inline f64 half_to_double(u16 bits) { return half_to_float(bits); }
inline f64 brain_to_double(u16 bits) { return brain_to_float(bits); }

template <class F> inline bool one_float(const Operands& on, s64 type, F f) {
    switch (type) {
        case OF_F32:
            if (on.flag(FTZ)) on.unary<f32, f32>([=](f32 a) { return flush(f32(f(flush(a)))); });
            else on.unary<f32, f32>([=](f32 a) { return f32(f(a)); });
            return true;
        case OF_F64: on.unary<f64, f64>([=](f64 a) { return f64(f(a)); }); return true;
        case OF_F16: on.unary<Half, Half>([=](Half a) { return Half{f32(f(a.value))}; }); return true;
        case OF_BF16: on.unary<Brain, Brain>([=](Brain a) { return Brain{f32(f(a.value))}; }); return true;
        case OF_F16X2: return pairs(on, 1, half_to_float, float_to_half, [=](f32 a, f32, f32) { return f32(f(a)); });
        default: return pairs(on, 1, brain_to_float, float_to_brain, [=](f32 a, f32, f32) { return f32(f(a)); });
    }
}

template <class F> inline bool two_floats(const Operands& on, s64 type, F f) {
    auto first = [=](f32 a, f32 b, f32) { return f32(f(a, b)); };
    switch (type) {
        case OF_F32:
            if (on.flag(FTZ)) on.binary<f32, f32, f32>([=](f32 a, f32 b) { return flush(f(flush(a), flush(b))); });
            else on.binary<f32, f32, f32>([=](f32 a, f32 b) { return f32(f(a, b)); });
            return true;
        case OF_F64: on.binary<f64, f64, f64>([=](f64 a, f64 b) { return f64(f(a, b)); }); return true;
        case OF_F16:
            on.binary<Half, Half, Half>([=](Half a, Half b) { return Half{f32(f(a.value, b.value))}; });
            return true;
        case OF_BF16:
            on.binary<Brain, Brain, Brain>([=](Brain a, Brain b) { return Brain{f32(f(a.value, b.value))}; });
            return true;
        case OF_F16X2: return pairs(on, 2, half_to_float, float_to_half, first);
        default: return pairs(on, 2, brain_to_float, float_to_brain, first);
    }
}

inline bool fused_multiply_add(const Operands& on, s64 type) {
    auto fused = [](f64 a, f64 b, f64 c) { return a * b + c; };
    switch (type) {
        case OF_F32:
            if (on.flag(FTZ))
                on.ternary<f32, f32, f32, f32>(
                    [](f32 a, f32 b, f32 c) { return flush(std::fma(flush(a), flush(b), flush(c))); });
            else on.ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
            return true;
        case OF_F64:
            on.ternary<f64, f64, f64, f64>([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); });
            return true;
        case OF_F16:
            on.ternary<Half, Half, Half, Half>(
                [=](Half a, Half b, Half c) { return Half{to_odd(fused(a.value, b.value, c.value))}; });
            return true;
        case OF_BF16:
            on.ternary<Brain, Brain, Brain, Brain>(
                [=](Brain a, Brain b, Brain c) { return Brain{to_odd(fused(a.value, b.value, c.value))}; });
            return true;
        case OF_F16X2: return pairs(on, 3, half_to_double, double_to_half, fused);
        default: return pairs(on, 3, brain_to_double, double_to_brain, fused);
    }
}

inline bool floating(const Operands& on) {
    const s64 op = on.i.op;
    const bool nan = on.flag(NAN_WINS);
#define ONE(n, expr) \
    if (op >= n##_f32 && op <= n##_bf16x2) return one_float(on, op - n##_f32, [](auto a) { return expr; });
#define TWO(n, expr) \
    if (op >= n##_f32 && op <= n##_bf16x2) return two_floats(on, op - n##_f32, [=](auto a, auto b) { return expr; });
    if (op >= fma_f32 && op <= fma_bf16x2) return fused_multiply_add(on, op - fma_f32);
    TWO(add, a + b)
    TWO(sub, a - b)
    TWO(mul, a * b)
    TWO(div, a / b)
    TWO(min, lesser(a, b, nan))
    TWO(max, greater(a, b, nan))
    ONE(neg, -a)
    ONE(abs, std::fabs(a))
    ONE(sqrt, std::sqrt(a))
    ONE(rsqrt, 1 / std::sqrt(f64(a)))
    ONE(rcp, 1 / a)
    ONE(ex2, std::exp2(a))
    ONE(lg2, std::log2(a))
    ONE(sin, std::sin(a))
    ONE(cos, std::cos(a))
    ONE(tanh, std::tanh(a))
#undef ONE
#undef TWO
    return false;
}
