// Arithmetic on floating point. What a GPU approximates (division, square roots, ex2, …) is exact here.
#pragma once
#include "state.hpp"

// A pair of 16-bit values in every word.
template <int ARITY, class U, class F> inline void pairs(const Operands& on, U (*in)(u16), u16 (*out)(U), F f) {
    u32 *d = on.slot(0), *a = on.slot(1), *b = ARITY > 1 ? on.slot(2) : a, *c = ARITY > 2 ? on.slot(3) : a;
    each_lane(on.mask, [&](int l) {
        u32 low = out(f(in(u16(a[l])), in(u16(b[l])), in(u16(c[l]))));
        u32 high = out(f(in(u16(a[l] >> 16)), in(u16(b[l] >> 16)), in(u16(c[l] >> 16))));
        d[l] = high << 16 | low;
    });
}
inline f64 half_to_double(u16 bits) { return half_to_float(bits); }
inline f64 brain_to_double(u16 bits) { return brain_to_float(bits); }

inline bool one_float(const Operands& on) {
    const bool ftz = on.flag(FTZ);
#define CASES(n, expr) \
    case n##_f32: on.unary<f32, f32>([=](f32 x) { f32 a = ftz ? flush(x) : x, y = f32(expr); return ftz ? flush(y) : y; }); return true; \
    case n##_f64: on.unary<f64, f64>([](f64 a) { return f64(expr); }); return true; \
    case n##_f16: on.unary<Half, Half>([](Half x) { f32 a = x.value; return Half{f32(expr)}; }); return true; \
    case n##_bf16: on.unary<Brain, Brain>([](Brain x) { f32 a = x.value; return Brain{f32(expr)}; }); return true; \
    case n##_f16x2: pairs<1>(on, half_to_float, float_to_half, [](f32 a, f32, f32) { return f32(expr); }); return true; \
    case n##_bf16x2: pairs<1>(on, brain_to_float, float_to_brain, [](f32 a, f32, f32) { return f32(expr); }); return true;
    switch (on.i.op) {
        CASES(neg, -a)
        CASES(abs, std::fabs(a))
        CASES(sqrt, std::sqrt(a))
        CASES(rsqrt, 1 / std::sqrt(f64(a)))
        CASES(rcp, 1 / a)
        CASES(ex2, std::exp2(a))
        CASES(lg2, std::log2(a))
        CASES(sin, std::sin(a))
        CASES(cos, std::cos(a))
        CASES(tanh, std::tanh(a))
    }
    return false;
#undef CASES
}

inline bool two_floats(const Operands& on) {
    const bool ftz = on.flag(FTZ), nan = on.flag(NAN_WINS);
    (void)nan;
#define CASES(n, expr) \
    case n##_f32: on.binary<f32, f32, f32>([=](f32 x, f32 y) { f32 a = ftz ? flush(x) : x, b = ftz ? flush(y) : y, z = f32(expr); return ftz ? flush(z) : z; }); return true; \
    case n##_f64: on.binary<f64, f64, f64>([=](f64 a, f64 b) { return f64(expr); }); return true; \
    case n##_f16: on.binary<Half, Half, Half>([=](Half x, Half y) { f32 a = x.value, b = y.value; return Half{f32(expr)}; }); return true; \
    case n##_bf16: on.binary<Brain, Brain, Brain>([=](Brain x, Brain y) { f32 a = x.value, b = y.value; return Brain{f32(expr)}; }); return true; \
    case n##_f16x2: pairs<2>(on, half_to_float, float_to_half, [=](f32 a, f32 b, f32) { return f32(expr); }); return true; \
    case n##_bf16x2: pairs<2>(on, brain_to_float, float_to_brain, [=](f32 a, f32 b, f32) { return f32(expr); }); return true;
    switch (on.i.op) {
        CASES(add, a + b)
        CASES(sub, a - b)
        CASES(mul, a * b)
        CASES(div, a / b)
        CASES(min, lesser(f32(a), f32(b), nan))
        CASES(max, greater(f32(a), f32(b), nan))
    }
    return false;
#undef CASES
}

inline bool fused_multiply_add(const Operands& on) {
    auto fused = [](f64 a, f64 b, f64 c) { return a * b + c; };
    switch (on.i.op) {
        case fma_f32:
            if (on.flag(FTZ))
                on.ternary<f32, f32, f32, f32>(
                    [](f32 a, f32 b, f32 c) { return flush(std::fma(flush(a), flush(b), flush(c))); });
            else on.ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
            return true;
        case fma_f64: on.ternary<f64, f64, f64, f64>([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); }); return true;
        case fma_f16:
            on.ternary<Half, Half, Half, Half>(
                [=](Half a, Half b, Half c) { return Half{to_odd(fused(a.value, b.value, c.value))}; });
            return true;
        case fma_bf16:
            on.ternary<Brain, Brain, Brain, Brain>(
                [=](Brain a, Brain b, Brain c) { return Brain{to_odd(fused(a.value, b.value, c.value))}; });
            return true;
        case fma_f16x2: pairs<3>(on, half_to_double, double_to_half, fused); return true;
        case fma_bf16x2: pairs<3>(on, brain_to_double, double_to_brain, fused); return true;
    }
    return false;
}

inline bool floating(const Operands& on) {
    if (on.i.op >= fma_f32 && on.i.op <= fma_bf16x2) return fused_multiply_add(on);
    if (on.has(2)) return two_floats(on);
    return one_float(on);
}
