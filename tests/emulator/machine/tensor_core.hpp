// mma.sync and wgmma: products exact, summed in float64 with the accumulator, rounded once to float32.
#pragma once
#include "machine.hpp"

inline f64 widened(s64 type, u32 bits) {
    return type == F16 ? half_to_float(u16(bits)) : type == BF16 ? brain_to_float(u16(bits)) : tf32(bits);
}

// Places of a thread's values: rows lane/4 (+8), columns by lane%4; two 16-bit values a register, or one of 32.
template <class F> inline void each_left(s64 type, int l, int k, u32 bits, F f) {
    int row = l / 4 + 8 * (k & 1), t = l % 4;
    if (type == F32) f(row, t + 4 * (k >> 1), widened(type, bits));
    else for (int h = 0; h < 2; ++h) f(row, 2 * t + h + 8 * (k >> 1), widened(type, bits >> 16 * h));
}
inline int accumulator_row(int l, int k) { return l / 4 + 8 * (k >> 1 & 1); }
inline int accumulator_column(int l, int k) { return 8 * (k / 4) + 2 * (l % 4) + (k & 1); }

// m16n8: operands 0 to 3 take the result, 4 to 7 hold A (`count` of them), 8 and 9 B, 10 to 13 what is added.
inline void warp_multiply(const Operands& on) {
    f64 a[16][16], b[16][8], sum[16][8];
    const Instruction& i = on.i;
    const s64 type = i.op == mma_f16 ? F16 : i.op == mma_bf16 ? BF16 : F32;
    for (int l = 0; l < 32; ++l) {
        int column = l / 4, t = l % 4;
        for (int k = 0; k < i.count; ++k)
            each_left(type, l, k, on.slot(4 + k)[l], [&](int r, int c, f64 x) { a[r][c] = x; });
        for (int k = 0; k < i.count / 2; ++k) {
            u32 bits = on.slot(8 + k)[l];
            if (type == F32) b[t + 4 * k][column] = widened(type, bits);
            else for (int h = 0; h < 2; ++h) b[2 * t + h + 8 * k][column] = widened(type, bits >> 16 * h);
        }
        for (int k = 0; k < 4; ++k) sum[accumulator_row(l, k)][accumulator_column(l, k)] = get<f32>(on.slot(10 + k), l);
    }
    for (int r = 0; r < 16; ++r)
        for (int k = 0; k < i.size; ++k)
            for (int c = 0; c < 8; ++c) sum[r][c] += a[r][k] * b[k][c];
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < 4; ++k) put<f32>(on.slot(k), l, f32(sum[accumulator_row(l, k)][accumulator_column(l, k)]));
}

// Where an element of a wgmma operand lies: a descriptor's start, strides and swizzle (the PTX manual's canonical
// layouts); `outer` counts rows of A or columns of B.
inline u64 place_of(u64 descriptor, bool transposed, int outer, int k, int size) {
    u64 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    u64 stride = (descriptor >> 32 & 0x3fff) << 4;
    int mode = int(descriptor >> 62), row = mode == 0 ? 16 : 256 >> mode;  // bytes: 16, 128, 64, 32
    u64 at;
    if (!transposed) {
        int byte = k * size;
        at = start + u64(outer % 8) * row + u64(outer / 8) * stride;
        at += mode == 0 ? byte / 16 * leading + byte % 16 : byte;
    } else {
        int byte = outer * size;
        at = start + u64(k % 8) * row + byte % row;
        at += mode == 0 ? byte / row * stride + u64(k / 8) * leading : byte / row * leading + u64(k / 8) * stride;
    }
    u64 swizzled = mode == 0 ? 0 : 7 >> (mode - 1);
    return at ^ (at >> 7 & swizzled) << 4;
}

inline f64 Machine::element(Program& program, int w, const Product& product, u64 address, const Access& who) {
    const s64 type = product.instruction->how;
    const u32 size = type == F32 ? 4 : 2;
    SharedMemory& shared = program.shared;
    if (!shared.allows(address, size, who)) return std::numeric_limits<f64>::quiet_NaN();
    shared.read(address, size, who);
    // Stores reach the asynchronous proxy through a fence: the writer's before the barrier, or the reader's behind it.
    const SharedCell& cell = shared.cells[address / shared.granule];
    const Warp& warp = program.warps[w];
    if (cell.write_stamp > product.stamp) reports.add(PRODUCT_OVERTAKEN, who, address, cell.write_pc);
    if (cell.writer_warp >= 0) {
        bool by_writer = program.warps[cell.writer_warp].fences > cell.fences;
        bool by_reader = warp.fence_epoch > cell.write_epoch;
        if (!by_writer && !by_reader) reports.add(UNFENCED, who, address, cell.write_pc);
    }
    u32 bits = 0;
    std::memcpy(&bits, &shared.bytes[address], size);
    return widened(type, bits);
}

// Each warp does its 16 of the 64 rows.
inline void Machine::finish(Program& program, int w, const Product& product) {
    const Instruction& i = *product.instruction;
    Warp& warp = program.warps[w];
    const int depth = int(i.size), columns = int(i.count), size = i.how == F32 ? 4 : 2;
    Access who{program.number, w, 0, product.pc, program.epoch, warp.epoch, warp.fences, u64(executed)};
    static thread_local f64 a[16][16], b[16][256], sum[16][256];
    for (int k = 0; k < depth; ++k)
        for (int n = 0; n < columns; ++n)
            b[k][n] = element(program, w, product, place_of(product.right, i.flags & TRANSPOSED, n, k, size), who);
    if (i.flags & LEFT_SHARED) {
        for (int r = 0; r < 16; ++r)
            for (int k = 0; k < depth; ++k) {
                u64 at = place_of(product.left, i.flags & LEFT_TRANSPOSED, 16 * (w % 4) + r, k, size);
                a[r][k] = element(program, w, product, at, who);
            }
    } else {
        for (int l = 0; l < 32; ++l)
            for (int k = 0; k < 4; ++k) {
                if (product.a[k][l] != warp.slot(i.operand[k])[l]) reports.add(REGISTERS_REWRITTEN, who, 0);
                each_left(i.how, l, k, product.a[k][l], [&](int r, int c, f64 x) { a[r][c] = x; });
            }
    }
    const f64 sign = (i.immediate & 1) != (i.immediate >> 1 & 1) ? -1 : 1;
    auto register_of = [&](int k) { return warp.slot(lists[i.extra + k]); };
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < columns / 2; ++k)
            sum[accumulator_row(l, k)][accumulator_column(l, k)] = product.accumulate ? get<f32>(register_of(k), l) : 0;
    for (int r = 0; r < 16; ++r)
        for (int k = 0; k < depth; ++k)
            for (int n = 0; n < columns; ++n) sum[r][n] += sign * a[r][k] * b[k][n];
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < columns / 2; ++k)
            put<f32>(register_of(k), l, f32(sum[accumulator_row(l, k)][accumulator_column(l, k)]));
}

// All products but those of the latest `groups_left` groups have been done afterwards, in order.
inline void Machine::finish_products(Program& program, int w, size_t groups_left) {
    auto& groups = program.warps[w].products;
    for (size_t g = 0; g < groups.size() && g + groups_left < groups.size(); ++g) {
        for (const Product& product : groups[g]) finish(program, w, product);
        groups[g].clear();
    }
    while (groups_left && groups.size() > groups_left) groups.erase(groups.begin());
}

inline bool Machine::multiply(Program& program, int w, const Operands& on, const Access& who) {
    const Instruction& i = on.i;
    switch (i.op) {
        case mma_f16: case mma_bf16: case mma_tf32: warp_multiply(on); return true;
        case wgmma: {
            bool in_shared = on.flag(LEFT_SHARED);
            Product product{&i, who.pc, in_shared ? get<u64>(on.slot(0), 0) : 0, get<u64>(on.slot(4), 0), who.stamp,
                            bool(on.slot(5)[0] & 1), {}};
            if (!in_shared)
                for (int k = 0; k < 4; ++k) std::memcpy(product.a[k], on.slot(k), sizeof product.a[k]);
            on.warp.products.back().push_back(product);
            if (!arrives_late()) finish_products(program, w, 0);
            return true;
        }
        case wgmma_commit: on.warp.products.emplace_back(); return true;
        case wgmma_wait: finish_products(program, w, size_t(i.immediate) + 1); return true;
    }
    return false;
}
