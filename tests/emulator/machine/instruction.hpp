// The machine's vocabulary: operations, flags, types and findings by number, and their names for the parser in Python.
#pragma once
#include <string>

#include "numbers.hpp"

// Operations on 16, 32, 64 bits whose sign does not matter; those whose sign does; those on floating point.
#define INTEGER_OPS(X) X(add) X(sub) X(mul) X(mad) X(and) X(or) X(xor) X(not) X(shl) X(neg)
#define SIGNED_OPS(X) X(min) X(max) X(shr) X(div) X(rem) X(abs) X(mulhi) X(bfe)
#define FLOAT_OPS(X) \
    X(add) X(sub) X(mul) X(fma) X(div) X(min) X(max) X(neg) X(abs) X(sqrt) X(rsqrt) X(rcp) X(ex2) X(lg2) X(sin) X(cos) \
    X(tanh)
#define MIXED_OPS(X) \
    X(mulwide_s16) X(mulwide_u16) X(mulwide_s32) X(mulwide_u32) X(madwide_s16) X(madwide_u16) X(madwide_s32) \
    X(madwide_u32) X(prmt) X(lop3) X(shf_l) X(shf_r) X(bfi_b32) X(popc_b32) X(clz_b32) X(brev_b32)
#define MOVE_OPS(X) \
    X(and_pred) X(or_pred) X(xor_pred) X(not_pred) X(mov_pred) X(mov_b16) X(mov_b32) X(mov_b64) X(pack) X(unpack) \
    X(selp_b16) X(selp_b32) X(selp_b64) X(setp_s16) X(setp_u16) X(setp_s32) X(setp_u32) X(setp_s64) X(setp_u64) \
    X(setp_f32) X(setp_f64) X(setp_f16) X(setp_bf16) X(cvt) X(cvt_f16x2) X(cvt_bf16x2) X(cvt_tf32)
#define LANE_OPS(X) X(shfl) X(vote) X(redux) X(activemask)
#define MEMORY_OPS(X) \
    X(ld_global) X(st_global) X(ld_shared) X(st_shared) X(atom_global) X(atom_shared) X(cp_async) X(cp_commit) \
    X(cp_wait) X(cp_wait_all) X(ldmatrix) X(stmatrix)
#define MATRIX_OPS(X) X(mma_f16) X(mma_bf16) X(mma_tf32) X(wgmma) X(wgmma_commit) X(wgmma_wait)
#define CONTROL_OPS(X) X(bar_sync) X(bar_warp) X(fence) X(fence_async) X(nop) X(bra) X(ret) X(trap)

#define OF_INTEGER(X, n) X(n##_u16) X(n##_u32) X(n##_u64)
#define OF_SIGNED(X, n) X(n##_s16) X(n##_s32) X(n##_s64) OF_INTEGER(X, n)
#define OF_FLOAT(X, n) X(n##_f32) X(n##_f64) X(n##_f16) X(n##_bf16) X(n##_f16x2) X(n##_bf16x2)

enum Op : int {
#define NUMBER(n) n,
#define INTEGER_NUMBERS(n) OF_INTEGER(NUMBER, n)
#define SIGNED_NUMBERS(n) OF_SIGNED(NUMBER, n)
#define FLOAT_NUMBERS(n) OF_FLOAT(NUMBER, n)
    INTEGER_OPS(INTEGER_NUMBERS) SIGNED_OPS(SIGNED_NUMBERS) MIXED_OPS(NUMBER)
    END_OF_INTEGERS,
    FLOAT_OPS(FLOAT_NUMBERS)
    END_OF_FLOATS,
    MOVE_OPS(NUMBER)
    END_OF_MOVES,
    LANE_OPS(NUMBER)
    END_OF_LANES,
    MEMORY_OPS(NUMBER)
    END_OF_MEMORY,
    MATRIX_OPS(NUMBER)
    END_OF_MATRICES,
    CONTROL_OPS(NUMBER)
};

// One instruction; operands are numbers of register slots, constants among them, or -1.
struct Instruction {
    s64 op, guard, negated, count, size, flags, how, extra, immediate, target, kind, operand[16];
};
#define FIELDS(X) \
    X(op) X(guard) X(negated) X(count) X(size) X(flags) X(how) X(extra) X(immediate) X(target) X(kind)

#define FLAGS(X) \
    X(FTZ) X(NAN_WINS) X(SIGN_EXTENDED) X(TRANSPOSED) X(WIDE) X(ACQUIRE) X(RELEASE) X(SATURATE) X(RELU) \
    X(LEFT_TRANSPOSED) X(LEFT_SHARED)
enum FlagBit : int { 
#define FLAG_BIT(n) n##_BIT,
    FLAGS(FLAG_BIT)
};
enum Flag : s64 {
#define FLAG(n) n = 1 << n##_BIT,
    FLAGS(FLAG)
};

#define TYPES(X) X(S8) X(U8) X(S16) X(U16) X(S32) X(U32) X(S64) X(U64) X(F16) X(BF16) X(F32) X(F64)
enum Type : int { TYPES(NUMBER) };

#define KINDS(X) X(alu) X(mma) X(shared) X(global) X(copy) X(sync) X(branch)
enum { KIND_COUNT = 7 };

#define COMPARISONS(X) \
    X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan)

// What of the launch a register can hold from its beginning on.
#define SPECIALS(X) \
    X(tid.x) X(tid.y) X(tid.z) X(ctaid.x) X(ctaid.y) X(ctaid.z) X(nctaid.x) X(nctaid.y) X(nctaid.z) X(ntid.x) \
    X(ntid.y) X(ntid.z) X(laneid) X(warpid)

// Findings. A note is worth knowing, but no error: redundant stores, padding that is read and dropped, a warp in step.
#define FINDINGS(ERROR, NOTE) \
    ERROR(GLOBAL_OUT, "global out of bounds") \
    ERROR(GLOBAL_MISALIGNED, "global misaligned") \
    ERROR(GLOBAL_RACE_READ, "global race (read/write)") \
    ERROR(GLOBAL_RACE_WRITE, "global race (write/write)") \
    ERROR(GLOBAL_IN_PROGRAM, "global race within a program") \
    ERROR(GLOBAL_LANES_DIFFER, "global store of two values by one instruction") \
    NOTE(GLOBAL_SAME_VALUE, "global write/write of one value") \
    NOTE(COPY_MISALIGNED_UNUSED, "misaligned address of an unused copy") \
    ERROR(SHARED_OUT, "shared out of bounds") \
    ERROR(SHARED_MISALIGNED, "shared misaligned") \
    ERROR(SHARED_RACE_READ, "shared race (read/write)") \
    ERROR(SHARED_RACE_WRITE, "shared race (write/write)") \
    ERROR(SHARED_LANES_DIFFER, "shared store of two values by one instruction") \
    ERROR(SHARED_IN_FLIGHT, "shared bytes of a copy in flight") \
    ERROR(UNFENCED, "shared bytes not fenced for the asynchronous proxy") \
    ERROR(PRODUCT_OVERTAKEN, "shared bytes written that a wgmma in flight still reads") \
    NOTE(SHARED_SAME_VALUE, "shared write/write of one value") \
    NOTE(SHARED_IN_WARP, "shared within a warp, no bar.warp.sync") \
    NOTE(SHARED_UNWRITTEN, "shared read before written") \
    NOTE(IN_FLIGHT_AT_EXIT, "copy in flight at exit") \
    ERROR(REGISTERS_REWRITTEN, "operand registers of a wgmma rewritten before its wait") \
    ERROR(DIVERGED, "diverged") \
    ERROR(DEADLOCK, "deadlock") \
    ERROR(ENDLESS, "endless") \
    ERROR(TRAPPED, "trap")
enum Finding : int {
#define FINDING(name, text) name,
    FINDINGS(FINDING, FINDING)
};

// Every list of names, a line each, fields parted by tabs: what Python numbers its rows with.
inline std::string vocabulary() {
    std::string all = "ops";
#define SAY(n) all += "\t" #n;
#define SAY_INTEGER(n) OF_INTEGER(SAY, n)
#define SAY_SIGNED(n) OF_SIGNED(SAY, n)
#define SAY_FLOAT(n) OF_FLOAT(SAY, n)
    INTEGER_OPS(SAY_INTEGER) SIGNED_OPS(SAY_SIGNED) MIXED_OPS(SAY)
    all += "\t";
    FLOAT_OPS(SAY_FLOAT)
    all += "\t";
    MOVE_OPS(SAY)
    all += "\t";
    LANE_OPS(SAY)
    all += "\t";
    MEMORY_OPS(SAY)
    all += "\t";
    MATRIX_OPS(SAY)
    all += "\t";
    CONTROL_OPS(SAY)
    all += "\nfields";
    FIELDS(SAY)
    all += "\nflags";
    FLAGS(SAY)
    all += "\ntypes";
    TYPES(SAY)
    all += "\nkinds";
    KINDS(SAY)
    all += "\ncomparisons";
    COMPARISONS(SAY)
    all += "\nspecials";
    SPECIALS(SAY)
    all += "\nfindings";
#define SAY_FINDING(name, text) all += "\t" text;
    FINDINGS(SAY_FINDING, SAY_FINDING)
    all += "\nnotes";
#define SKIP(name, text)
    FINDINGS(SKIP, SAY_FINDING)
    return all;
}
