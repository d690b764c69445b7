// Runs a CUDA kernel on a CPU, block after block, every thread a fiber: enough of the language for ops/csrc. Threads run as far ahead of
// each other as barriers let them, a warp of all others, a lane of its warp, in every other block from the last one down, so that a
// missing barrier shows whichever of two it should hold up. A barrier that not every thread reaches, or a collective outside of a whole
// warp, is reported as a deadlock.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __global__
#define SHARED(name)     \
    static Shared name;  \
    if (emulator::begins()) std::memset((void *)&name, 0xff, sizeof name)  // NaN, as no block may rely on another's
#define __launch_bounds__(...)

struct Index { int x; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
static Index threadIdx, blockIdx;

namespace emulator {
enum State { READY, AT_WARP, AT_BLOCK, AT_PHASE, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static void (*body)();
struct Copy {
    void *to;
    const void *from;
    int bytes, real;  // of which the rest are zeros
};
static std::vector<Copy> copies[1024];  // that each thread has yet to wait for
static float lanes[32][32][8];  // what the lanes of each warp show each other

static void wait(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}
static void enter() {
    body();
    fibers[current].state = DONE;
    swapcontext(&fibers[current].context, &scheduler);
}
static bool release(int first, int count, State state) {
    for (int i = first; i < first + count; i++)
        if (fibers[i].state != state) return false;
    for (int i = first; i < first + count; i++) fibers[i].state = READY;
    return true;
}
static bool first_thread;
static bool begins() {  // whether no thread of the block has yet run
    const bool first = first_thread;
    first_thread = false;
    return first;
}
static bool run_warp(int first) {  // as far as it comes without the others; whether it came any further
    bool ran = false;
    for (bool asks = true;; asks = false) {  // once whether a phase is over
        bool goes_on = false;
        for (int turn = 0; turn < 32; turn++) {
            current = first + (blockIdx.x % 2 ? 31 - turn : turn);
            const bool waits = fibers[current].state == AT_PHASE;
            if (fibers[current].state != READY && !(waits && asks)) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current].context);
            goes_on = goes_on || !waits || fibers[current].state != AT_PHASE;
        }
        goes_on = release(first, 32, AT_WARP) || goes_on;
        if (!goes_on) return ran;
        ran = true;
    }
}
static int run_block(int threads) {
    first_thread = true;
    fibers.resize(threads);
    for (Fiber &fiber : fibers) {
        fiber.stack.resize(1 << 18);
        fiber.state = READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (std::vector<Copy> &pending : copies) pending.clear();
    for (;;) {
        bool ran = false;
        for (int i = 0; i < threads / 32; i++) {
            const int warp = blockIdx.x % 2 ? threads / 32 - 1 - i : i;
            ran = run_warp(32 * warp) || ran;
        }
        if (release(0, threads, DONE)) return 0;
        ran = release(0, threads, AT_BLOCK) || ran;
        if (!ran) return 1;
    }
}
static float *mine() { return lanes[current / 32][current % 32]; }
static const float *lane(int i) { return lanes[current / 32][i]; }
}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::AT_BLOCK); }
static void __syncwarp() { emulator::wait(emulator::AT_WARP); }

static float from_bits(uint32_t v) { float y; std::memcpy(&y, &v, 4); return y; }
static uint32_t bits_of(float v) { uint32_t y; std::memcpy(&y, &v, 4); return y; }
static float exp2_fast(float v) { return std::exp2(v); }
static float reciprocal(float v) { return 1.f / v; }
static float half_to_float(uint16_t v) { _Float16 y; std::memcpy(&y, &v, 2); return (float)y; }
static uint16_t float_to_half(float v) { _Float16 h = (_Float16)v; uint16_t y; std::memcpy(&y, &h, 2); return y; }
static uint16_t float_to_bfloat(float v) {
    const uint32_t bits = bits_of(v);
    if (v != v) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// A copy arrives no earlier than its thread waits for it, and what it overwrites is gone at once.
static void copy_later(void *to, const void *from, int bytes, int real) {
    if ((uintptr_t)to % bytes || (real && (uintptr_t)from % bytes) || real < 0 || real > bytes) std::abort();
    std::memset(to, 0xff, bytes);
    emulator::copies[emulator::current].push_back({to, from, bytes, real});
}
static void copy_async(void *to, const void *from, bool real) { copy_later(to, from, 16, real ? 16 : 0); }
static void copy_bytes(void *to, const void *from, int bytes) { copy_later(to, from, 16, bytes); }
static void copy_word(void *to, const void *from, bool real) { copy_later(to, from, 4, real ? 4 : 0); }
// A barrier in shared memory: how many arrive in a phase, how many of them have yet to, and the phases that are over.
static void begin_barrier(unsigned long long &barrier, int count) { barrier = (unsigned)count | (unsigned)count << 16; }
static void arrive(unsigned long long &barrier) {
    barrier -= 1 << 16;
    if (!(barrier >> 16 & 0xffff)) barrier += (1ull << 32) + ((barrier & 0xffff) << 16);
}
static void wait_for(unsigned long long &barrier, int parity) {
    while ((int)(barrier >> 32 & 1) == parity) emulator::wait(emulator::AT_PHASE);
}
static void wait_copies() {
    for (const emulator::Copy &copy : emulator::copies[emulator::current]) {
        std::memcpy(copy.to, copy.from, copy.real);
        std::memset((char *)copy.to + copy.real, 0, copy.bytes - copy.real);
    }
    emulator::copies[emulator::current].clear();
}
template <class V>
static void store_if(uint32_t condition, V *to, V v) {
    if (condition) *to = v;
}
template <class V>
static V *afresh(V *p) { return p; }
static int afresh(int v) { return v; }
static float opaque(float v) { return v; }
static float exchange(float v, int mask) {
    emulator::mine()[0] = v;
    __syncwarp();
    const float other = emulator::lane(threadIdx.x % 32 ^ mask)[0];
    __syncwarp();
    return other;
}
static float before_by(float v, int lanes) {
    emulator::mine()[0] = v;
    __syncwarp();
    const int i = threadIdx.x % 32;
    const float before = emulator::lane(i % 16 < lanes ? i : i - lanes)[0];
    __syncwarp();
    return before;
}
static uint32_t shifted(uint32_t low, uint32_t high, int bits) { return (uint32_t)(((uint64_t)high << 32 | low) >> bits); }
static uint32_t ballot(bool v) {
    emulator::mine()[0] = v;
    __syncwarp();
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= (uint32_t)(emulator::lane(i)[0] != 0.f) << i;
    __syncwarp();
    return mask;
}
static uint32_t pair_of(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
static uint32_t halves(float low, float high) { return pair_of(float_to_half(low), float_to_half(high)); }
static uint32_t bfloats(float low, float high) { return pair_of(float_to_bfloat(low), float_to_bfloat(high)); }
static uint32_t warp_max(uint32_t v) {
    emulator::mine()[0] = from_bits(v);
    __syncwarp();
    uint32_t most = 0;
    for (int i = 0; i < 32; i++) most = bits_of(emulator::lane(i)[0]) > most ? bits_of(emulator::lane(i)[0]) : most;
    __syncwarp();
    return most;
}
template <int COUNT>
static void matrices(uint32_t (&m)[COUNT], const uint16_t *row, bool transposed) {
    static const uint16_t *rows[32][32];
    const uint16_t **own = rows[threadIdx.x / 32];
    if ((uintptr_t)row % 16) std::abort();
    own[threadIdx.x % 32] = row;
    __syncwarp();
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int i = 0; i < COUNT; i++) {
        const uint16_t **r = own + 8 * i;
        m[i] = transposed ? pair_of(r[2 * q][g], r[2 * q + 1][g]) : pair_of(r[g][2 * q], r[g][2 * q + 1]);
    }
    __syncwarp();
}
template <int COUNT>
static void load_matrices(uint32_t (&m)[COUNT], const uint16_t *row) { matrices(m, row, false); }
template <int COUNT>
static void load_transposed(uint32_t (&m)[COUNT], const uint16_t *row) { matrices(m, row, true); }
static float element(float pairs, int i) {
    const uint16_t v = (uint16_t)(bits_of(pairs) >> 16 * i);
    return BF16 ? from_bits((uint32_t)v << 16) : half_to_float(v);
}
static void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; i++) emulator::mine()[i] = from_bits(own[i]);
    __syncwarp();
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            const float a = element(emulator::lane(4 * g + k % 8 / 2)[i / 2 + 2 * (k / 8)], k % 2);
            const float b = element(emulator::lane(4 * (2 * q + i % 2) + k % 8 / 2)[4 + k / 8], k % 2);
            sum += (double)a * b;
        }
        d[i] = (float)sum;
    }
    __syncwarp();
}
static float as_tf32(float v) { return from_bits(bits_of(v) & 0xffffe000u); }  // what the tensor cores read of a float32
static void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    const float own[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; i++) emulator::mine()[i] = as_tf32(own[i]);
    __syncwarp();
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * q + i % 2;
        double sum = d[i];
        for (int k = 0; k < 8; k++) {
            const float a = emulator::lane(4 * g + k % 4)[i / 2 + 2 * (k / 4)];
            const float b = emulator::lane(4 * column + k % 4)[4 + k / 4];
            sum += (double)a * b;
        }
        d[i] = (float)sum;
    }
    __syncwarp();
}
static void multiply(float (&d)[4], float a0, float a1, float b) {
    for (float &v : d) v = 0.f;
    multiply_add(d, a0, a1, 0.f, 0.f, b, 0.f);
}
