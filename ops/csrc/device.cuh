// What the scan kernels share: number formats, tensor-core products, where a path goes, how a tile gets into shared memory.
//
// Compiled at run time by NVRTC, without any header, with these macros set by kernels/cuda.py:
//   PATHS    the codes of the K paths, `2 * kind + flip`: kind 0 is h, 1 is v, K + 1 is wK;  PATH_COUNT  K;  WINDOWS  1 if one is wK
//   RANK     R of the low-rank step;  WARPS  warps of a block;  BLOCKS  blocks of a multiprocessor
//   BF16     1 for bfloat16 maps, 0 for float16
//   HAS_D, HAS_BIAS, SOFTPLUS  0 or 1
//   SCALED   1 where y or dx leaves as parts to be summed over the paths: float16 numbers below 2, and a power of two for each tile and
//            channel, which is half of float32's traffic with no range lost; 0 where it leaves in the dtype of x
//   BACKWARD 0 or 1;  ROWS_F32  1 where blocks of channels share the gradient of dt | B | C, to be summed
//   SHARED_BYTES  what kernels/cuda.py asks for
//
// One block walks one path of some images, one after the other, for 32 * WARPS channels, a channel a thread, in tiles of T steps. The maps
// of a tile, its rows of dt | B | C and where its steps lie are brought to shared memory by the whole block, one tile ahead.
// The low-rank step runs on tensor cores: dt is exact in tf32, the weight is split in two tf32 numbers, which keeps float32 accuracy.

typedef unsigned int uint32;
typedef unsigned short uint16;

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
// Sixteen bytes from global to shared memory while the thread goes on, or zeros; both addresses are multiples of sixteen.
DEVICE void copy_async(void *to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0));
}
DEVICE void store_if(uint32 condition, float *to, float v) {  // without a branch
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.f32 [%0], %1; }" ::"l"(to), "f"(v), "r"(condition) : "memory");
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
DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE float exchange(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DEVICE uint32 ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
#endif

constexpr int T = 16;                              // steps of a tile; kernels/launch.py's STEPS
constexpr int THREADS = 32 * WARPS;
#ifdef RANK
constexpr int RANK8 = (RANK + 7) / 8 * 8;          // ranks, padded to what a product takes
constexpr int DT_ROW = RANK8 + 4;                  // row of dt in shared memory: no two rows of a fragment share a bank
constexpr int CHUNKS = THREADS / 8;                // eight channels each
constexpr int STEP_ROW = RANK8 <= 40 ? 40 : RANK8 <= 56 ? 56 : 72;  // row of full steps, and of a gradient of dt, likewise
constexpr int FIELDS = RANK + 2;                   // a position's dt | B | C
constexpr int READS = (T * FIELDS + THREADS - 1) / THREADS;
#endif
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

DEVICE uint16 to_map(float v) { return BF16 ? float_to_bfloat(v) : float_to_half(v); }
DEVICE float to_float(uint16 v) { return BF16 ? from_bits((uint32)v << 16) : half_to_float(v); }
DEVICE float tf32_part(float v) { return from_bits(bits_of(v) & 0xffffe000u); }

#ifdef RANK  // what follows is for scans over maps
struct Rows {  // dt | B | C of a tile
    float dt[T * DT_ROW];
    float4 BC[T / 2];  // of steps 2 i and 2 i + 1; B times ln(2)

    DEVICE float B(int t) const { return t % 2 ? BC[t / 2].z : BC[t / 2].x; }
    DEVICE float C(int t) const { return t % 2 ? BC[t / 2].w : BC[t / 2].y; }
};

struct Places {           // where the steps of a tile lie
    int4 positions[T / 4];  // 0 where there is none
    uint32 inside;        // bit t: step t lies on the map

    DEVICE int position(int t) const { return ((const int *)positions)[t]; }
};


struct Map {
    int height, width;
    int kind, flip, length;
};

DEVICE Map map_of(int k, int height, int width) {
    constexpr int codes[] = {PATHS};
    int code = 0;
#pragma unroll
    for (int i = 0; i < PATH_COUNT; i++) code = i == k ? codes[i] : code;
    Map map = {height, width, code / 2, code % 2, height * width};
    if (WINDOWS && map.kind >= 2) {
        const int w = map.kind - 1;
        map.length = ((height + w - 1) / w) * ((width + w - 1) / w) * w * w;
    }
    return map;
}

// The first warp calls this; a tile before the first or after the last has no steps.
DEVICE void write_places(Places &places, const Map &map, int tile, int lane) {
    const int step = tile * T + lane % T;
    bool inside = tile >= 0 && step < map.length;
    const int p = inside ? (map.flip ? map.length - 1 - step : step) : 0;
    int position = p;
    if (map.kind == 1) {
        const int column = (uint32)p / (uint32)map.height;
        position = (p - column * map.height) * map.width + column;
    } else if (WINDOWS && map.kind >= 2) {
        const int w = map.kind - 1;
        const int across = (map.width + w - 1) / w;
        const int window = p / (w * w), rest = p % (w * w);
        const int row = window / across * w + rest / w, column = window % across * w + rest % w;
        inside = inside && row < map.height && column < map.width;
        position = row * map.width + column;
    }
    const uint32 mask = ballot(inside);
    if (lane < T) ((int *)places.positions)[lane] = inside ? position : 0;
    if (lane == 0) places.inside = mask & ((1u << T) - 1);
}

// Start copying a tile of a map, from the first channel of the block, as [T][THREADS]; zeros off the map.
DEVICE void copy_tile(uint16 *tile, const uint16 *map, int stride, int channels, const Places &places, int thread) {
#pragma unroll
    for (int i = 0; i < T / 8; i++) {
        const int t = (thread + i * THREADS) / CHUNKS, first = (thread + i * THREADS) % CHUNKS * 8;
        const bool real = first < channels && (places.inside >> t & 1);
        copy_async(tile + t * THREADS + first, map + (real ? (long long)places.position(t) * stride + first : 0), real);
    }
}

// Start reading this thread's share of a tile's rows; nothing is converted here, so that the reads go on while another tile is computed.
DEVICE void read_rows(uint16 (&raw)[READS], const uint16 *projection, int stride, const Places &places, int thread) {
#pragma unroll
    for (int i = 0; i < READS; i++) {
        const int e = thread + i * THREADS;
        const int t = e / FIELDS;
        raw[i] = 0;
        if (e < T * FIELDS && (places.inside >> t & 1)) raw[i] = projection[(long long)places.position(t) * stride + e % FIELDS];
    }
}

DEVICE void write_rows(Rows &rows, const uint16 (&raw)[READS], int thread) {
#pragma unroll
    for (int i = 0; i < READS; i++) {
        const int e = thread + i * THREADS;
        const int t = e / FIELDS, field = e % FIELDS;
        if (e < T * FIELDS) {
            const float v = to_float(raw[i]);
            if (field < RANK) rows.dt[t * DT_ROW + field] = v;
            else ((float *)rows.BC)[2 * t + field - RANK] = field == RANK ? v * LN2 : v;
        }
    }
}

DEVICE void clear_rows(Rows (&rows)[2], int thread) {  // ranks that only pad are never written again
    for (int e = thread; e < 2 * T * DT_ROW; e += THREADS) rows[e / (T * DT_ROW)].dt[e % (T * DT_ROW)] = 0.f;
}

// The weight of the step for the 32 channels of a warp, times log2(e), in the order in which `multiply_add` takes its second operand,
// and the bias. Its place is shared memory: registers are short, and a tile reads it once.
struct Weight {
    float2 w[RANK8 / 8][4][32];
    alignas(8) float bias[32];
};

DEVICE void load_weight(Weight &weight, const float *w, const float *bias, int first_channel, int channels, int lane) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < RANK8 / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int c = first_channel + 8 * j + g, r = 8 * i + q;
            const float *at = w + (long long)c * RANK + r;
            weight.w[i][j][lane].x = c < channels && r < RANK ? at[0] * LOG2E : 0.f;
            weight.w[i][j][lane].y = c < channels && r + 4 < RANK ? at[4] * LOG2E : 0.f;
        }
    const int own = first_channel + lane;
    weight.bias[lane] = HAS_BIAS && own < channels ? bias[own] * LOG2E : 0.f;
}

// steps[t][channel of the warp] = log2(e) (dt[t] . weight + bias), for the whole tile; the caller synchronises the warp.
DEVICE void full_steps(float *steps, const Rows &rows, const Weight &weight, int lane) {
    const int g = lane / 4, q = lane % 4;
    float d[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 bias = ((const float2 *)weight.bias)[4 * j + q];
        d[j][0] = d[j][2] = bias.x;
        d[j][1] = d[j][3] = bias.y;
    }
#pragma unroll
    for (int i = 0; i < RANK8 / 8; i++) {
        const float *a = rows.dt + g * DT_ROW + 8 * i + q;
        const float a0 = a[0], a1 = a[8 * DT_ROW], a2 = a[4], a3 = a[8 * DT_ROW + 4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 w = weight.w[i][j][lane];
            const float high0 = tf32_part(w.x), high1 = tf32_part(w.y);
            multiply_add(d[j], a0, a1, a2, a3, w.x - high0, w.y - high1);
            multiply_add(d[j], a0, a1, a2, a3, high0, high1);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 *at = (float2 *)(steps + g * STEP_ROW + 8 * j + 2 * q);
        at[0] = {d[j][0], d[j][1]};
        at[4 * STEP_ROW] = {d[j][2], d[j][3]};
    }
}

#endif

// log2(e) softplus(v / log2(e)) of v, and u = exp2(-|v|): a polynomial for log2(1 + u) / u on [0, 1], relative error 2e-7.
DEVICE float softplus(float v, float &u) {
    u = exp2_fast(-fabsf(v));
    float p = u * 0.00773979025f - 0.0433757082f;
    p = p * u + 0.114267893f;
    p = p * u - 0.198425353f;
    p = p * u + 0.276328772f;
    p = p * u - 0.358613074f;
    p = p * u + 0.48072508f;
    p = p * u - 0.721342444f;
    p = p * u + 1.44269502f;
    return p * u + fmaxf(v, 0.f);
}

// Sums over the 32 channels of a warp, of b[t] and c[t] for the T steps, by tensor cores: a product with a column of ones for each step
// adds up four lanes, and three exchanges add up the eight groups of lanes. Ends in out[0..T-1] (b) and out[T..2T-1] (c).
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

#ifdef RANK
struct alignas(16) Shared {
    uint16 x[2][T * THREADS];
#if BACKWARD
    uint16 dy[2][T * THREADS];
    float4 weight_gradients[WARPS][2][RANK8 / 8][32];
    float sums[WARPS][2 * T];
#endif
    float steps[WARPS][T * STEP_ROW];
    Weight weights[WARPS];
    Rows rows[2];
    Places places[4];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/cuda.py asks for too little shared memory");

// Write a tile of y or dx for one channel.
DEVICE void store_tile(uint16 *map, uint16 *scale, float (&v)[T], const Places &places, int channels, bool real) {
    const uint32 stored = real ? places.inside : 0;
    float times = 1.f;
    if (SCALED) {
        float most = 0.f;
#pragma unroll
        for (int t = 0; t < T; t++) most = fmaxf(most, fabsf(v[t]));
        const uint32 power = bits_of(most) & 0x7f800000u;
        times = from_bits(0x7f000000u - power);
        store_if(real, scale, (uint16)(power >> 16));
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        // An address by one multiplication: an index would take three instructions.
        uint16 *to = (uint16 *)((char *)map + (long long)places.position(t) * (2 * channels));
        store_if(stored & (1u << t), to, SCALED ? float_to_half(v[t] * times) : to_map(v[t]));
    }
}
#endif
