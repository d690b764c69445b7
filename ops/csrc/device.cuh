// What all kernels share: number formats, tensor-core products, softplus, sums over the channels of a warp.
//
// Compiled at run time by NVRTC, without any header, with macros that kernels/cuda.py and kernels/sequence.py set. All kernels take
//   WARPS  warps of a block;  BLOCKS  blocks of a multiprocessor;  SHARED_BYTES  what the launcher asks for
//   BF16   1 for bfloat16 maps, 0 for float16
//   HAS_D, HAS_BIAS, SOFTPLUS  0 or 1

typedef unsigned int uint32;
typedef unsigned short uint16;

#define INLINE __attribute__((always_inline))  // of a lambda
#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define SHARED(name)                          \
    extern __shared__ float4 shared_memory[]; \
    Shared &name = *(Shared *)shared_memory
DEVICE float exp2_fast(float v) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
    return y;
}
DEVICE float reciprocal(float v) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
    return y;
}
DEVICE uint32 bits_of(float v) { return __float_as_uint(v); }
DEVICE float from_bits(uint32 v) { return __uint_as_float(v); }
// d[16 x 8] += a[16 x 8] b[8 x 8], tf32. Lane = 4 g + q holds a at (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4), b at (q, g), (q + 4, g)
// and d at (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).
DEVICE void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits_of(a0)), "r"(bits_of(a1)), "r"(bits_of(a2)), "r"(bits_of(a3)), "r"(bits_of(b0)), "r"(bits_of(b1)));
}
// d[16 x 8] = a[16 x 4] b[4 x 8], tf32: lane 4 g + q holds a at (g, q), (g + 8, q) and b at (q, g); d as above.
DEVICE void multiply(float (&d)[4], float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(bits_of(a0)), "r"(bits_of(a1)), "r"(bits_of(b)), "f"(0.f));
}
// d[16 x 8] += a[16 x 16] b[16 x 8] of pairs in the maps' dtype; d as above. Lane = 4 g + q holds a from (g, 2 q), (g + 8, 2 q),
// (g, 2 q + 8), (g + 8, 2 q + 8) to the right, b from (2 q, g), (2 q + 8, g) down.
DEVICE void multiply_add(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Matrices of 8 x 8 16-bit numbers from shared memory: lane 8 i + j gives where row j of matrix i starts, a multiple of 16 bytes, and
// lane 4 g + q gets the pair from (g, 2 q) to the right, or from (2 q, g) down if transposed.
DEVICE void load_matrices(uint32 (&m)[2], const uint16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(m[0]), "=r"(m[1]) : "r"((uint32)__cvta_generic_to_shared(row)) : "memory");
}
DEVICE void load_matrices(uint32 (&m)[4], const uint16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((uint32)__cvta_generic_to_shared(row)) : "memory");
}
DEVICE void load_transposed(uint32 (&m)[2], const uint16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(m[0]), "=r"(m[1]) : "r"((uint32)__cvta_generic_to_shared(row)) : "memory");
}
DEVICE void load_transposed(uint32 (&m)[4], const uint16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((uint32)__cvta_generic_to_shared(row)) : "memory");
}
DEVICE float half_to_float(uint16 v) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(v));
    return y;
}
DEVICE uint16 float_to_half(float v) {
    uint16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(v));
    return y;
}
DEVICE uint16 float_to_bfloat(float v) {
    uint16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(v));
    return y;
}
DEVICE uint32 halves(float low, float high) {
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE uint32 bfloats(float low, float high) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// Sixteen bytes, or four, from global to shared memory while the thread goes on, or zeros; both addresses are multiples of that. The four
// may take the place of a number that the thread has just read: no read moves behind the copy.
DEVICE void copy_async(void *to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0));
}
DEVICE void copy_word(void *to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 4 : 0) : "memory");
}
// As many bytes of the sixteen as `bytes` says, and zeros; in the place of what the thread has just read, as well.
DEVICE void copy_bytes(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void store_if(uint32 condition, uint32 *to, uint32 v) {  // without a branch
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.u32 [%0], %1; }" ::"l"(to), "r"(v), "r"(condition) : "memory");
}
DEVICE void store_if(uint32 condition, uint16 *to, uint16 v) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.u16 [%0], %1; }" ::"l"(to), "h"(v), "r"(condition) : "memory");
}
// The same address, of which the compiler knows nothing: what it worked out for another access does not then wait in registers.
template <class V>
DEVICE V *afresh(V *p) {
    asm volatile("" : "+l"(p));
    return p;
}
DEVICE int afresh(int v) {
    asm volatile("" : "+r"(v));
    return v;
}
// The same number, which the compiler then keeps rather than work it out again.
DEVICE float opaque(float v) {
    asm volatile("" : "+f"(v));
    return v;
}
// A barrier that a warp arrives at before it has to wait for the others; phases are told apart by their parity.
DEVICE void begin_barrier(unsigned long long &barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"((uint32)__cvta_generic_to_shared(&barrier)), "r"(count) : "memory");
}
DEVICE void arrive(unsigned long long &barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"((uint32)__cvta_generic_to_shared(&barrier)) : "memory");
}
DEVICE void wait_for(unsigned long long &barrier, int parity) {
    uint32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"((uint32)__cvta_generic_to_shared(&barrier)), "r"(parity) : "memory");
    } while (!done);
}
DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE float exchange(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DEVICE float before_by(float v, int lanes) { return __shfl_up_sync(0xffffffffu, v, lanes, 16); }  // of 16 lanes; the first have their own
DEVICE uint32 shifted(uint32 low, uint32 high, int bits) { return __funnelshift_r(low, high, bits); }  // down, with what comes in from above
DEVICE uint32 ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
DEVICE uint32 warp_max(uint32 v) { return __reduce_max_sync(0xffffffffu, v); }
#endif

constexpr int T = 16;  // steps of a tile; kernels/common.py's STEPS
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

DEVICE uint16 to_map(float v) { return BF16 ? float_to_bfloat(v) : float_to_half(v); }
DEVICE uint32 to_maps(float low, float high) { return BF16 ? bfloats(low, high) : halves(low, high); }
DEVICE float to_float(uint16 v) { return BF16 ? from_bits((uint32)v << 16) : half_to_float(v); }
DEVICE float2 to_floats(uint32 v) {
    if (BF16) return {from_bits(v << 16), from_bits(v & 0xffff0000u)};
    return {half_to_float((uint16)v), half_to_float((uint16)(v >> 16))};
}

// The power of two of a number that is not negative, in the bits of a float; at most 2^125, so that its inverse is a number as well.
DEVICE uint32 power_of(float v) {
    const uint32 power = bits_of(v) & 0x7f800000u;
    return power < 0x7e000000u ? power : 0x7e000000u;
}

// log2(e) softplus(v / log2(e)) of v, and u = exp2(-|v|): a polynomial for log2(1 + u) / u on [0, 1]. Of degree 8 its relative error is 2e-7,
// of degree 5 it is 9e-6, a fiftieth of what rounding to float16 makes.
template <int DEGREE>
DEVICE float softplus(float v, float &u) {
    static_assert(DEGREE == 8 || DEGREE == 5, "");
    u = exp2_fast(-fabsf(v));
    float p;
    if (DEGREE == 8) {
        p = u * 0.00773979025f - 0.0433757082f;
        p = p * u + 0.114267893f;
        p = p * u - 0.198425353f;
        p = p * u + 0.276328772f;
        p = p * u - 0.358613074f;
        p = p * u + 0.48072508f;
        p = p * u - 0.721342444f;
        p = p * u + 1.44269502f;
    } else {
        p = u * -0.0344359055f + 0.146032885f;
        p = p * u - 0.303036213f;
        p = p * u + 0.469174057f;
        p = p * u - 0.720426142f;
        p = p * u + 1.44268286f;
    }
    return p * u + fmaxf(v, 0.f);
}

// Of a number, what tensor cores read, and the rest.
DEVICE float first_bits(float v) { return from_bits(bits_of(v) & 0xffffe000u); }
DEVICE float rest_of(float v) { return v - first_bits(v); }

// Sums over the 32 channels of a warp, of b[t] and c[t] for the T steps, by tensor cores: a product with a column of ones for each step
// adds up four lanes, and three exchanges add up the eight groups of lanes. The tensor cores read 11 bits of a number, too few where the
// channels' shares cancel: they are given the rest as well. Ends in out[0..T-1] (b) and out[T..2T-1] (c).
struct ChannelSums {
    float d[2][4];  // for each half of the tile: b of steps 2 q and 2 q + 1, then c

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 8; i++) d[i / 4][i % 4] = 0.f;
    }
    DEVICE void add(int t, float b, float c, float b_before, float c_before, int lane) {  // steps t and t - 1
        const int g = lane / 4;
        add(t, b, c, b_before, c_before, g == t % 8 ? 1.f : 0.f, g == (t - 1) % 8 ? 1.f : 0.f);
    }
    DEVICE void add(int t, float b, float c, float b_before, float c_before, float column, float column_before) {
        multiply_add(d[t / 8], b, c, b_before, c_before, column, column_before);
        multiply_add(d[t / 8], rest_of(b), rest_of(c), rest_of(b_before), rest_of(c_before), column, column_before);
    }
    DEVICE void write(float *out, int lane) {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *v = d[half];
            const bool upper = g & 4, odd = g & 2;
            float first = upper ? v[2] : v[0], second = upper ? v[3] : v[1];
            first += exchange(upper ? v[0] : v[2], 16);
            second += exchange(upper ? v[1] : v[3], 16);
            float sum = odd ? second : first;
            sum += exchange(odd ? first : second, 8);
            sum += exchange(sum, 4);
            if (!(g & 1)) out[(upper ? T : 0) + 8 * half + 2 * q + (odd ? 1 : 0)] = sum;
        }
    }
};
