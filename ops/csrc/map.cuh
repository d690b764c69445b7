// What the scans over maps share: where a path goes, how a tile gets into shared memory, the low-rank step. Beside those of device.cuh they
// take the macros
//   PATHS    the codes of the K paths, `2 * kind + flip`: kind 0 is h, 1 is v, K + 1 is wK;  PATH_COUNT  K;  WINDOWS  1 if one is wK
//   RANK     R of the low-rank step
//   EACH     channels of a thread, 1 or 2 neighbours; the backward has registers for one alone
//   SCALED   1 where y or dx leaves as parts to be summed over the paths: float16 numbers below 2, and a power of two for each tile and
//            channel, which is half of float32's traffic; 0 where it leaves in the dtype of x
//   LAST     steps that the last tile of a path can have, a multiple of 4
//   APART    1 where a block meets once a tile rather than twice: what its warps show each other has two places; backward only
//   WORDS    1 where the rows of dt | B | C can be copied four bytes at a time
//   BACKWARD 0 or 1;  ROWS_F32  1 where blocks of channels share the gradient of dt | B | C, to be summed
//
// One block walks one path of some images, one after the other, for 32 * EACH * WARPS channels, in tiles of T steps. The maps of a tile,
// its rows of dt | B | C and where its steps lie are brought to shared memory by the whole block, ahead of their use.
// The low-rank step runs on tensor cores, dt as it comes, the weight as the sum of two 16-bit numbers: one product takes both.

constexpr int SPAN = 32 * EACH;                    // channels of a warp
constexpr int WIDTH = SPAN * WARPS;                // and of a block
constexpr int CHUNKS = WIDTH / 8;                  // eight channels each
constexpr int RANK8 = (RANK + 7) / 8 * 8;          // ranks, padded to what a product takes
constexpr int FIELDS = RANK + 2;                   // a position's dt | B | C
constexpr int ROW = (((FIELDS > RANK8 ? FIELDS : RANK8) + 7) / 8 | 1) * 8;  // 16-bit row in shared memory: no two of a matrix share a bank
constexpr int PLACES = 4 * (1 + APART);  // tiles whose places lie in shared memory
constexpr int WEIGHT_ROW = (RANK8 / 8 | 1) * 8;  // likewise
constexpr int STEP_ROW = BACKWARD && RANK8 > SPAN ? (RANK8 + 15) / 16 * 16 + 8 : SPAN + 8;  // of full steps, and of a gradient of dt

DEVICE void block_barrier() {
    if (WARPS == 1) __syncwarp();
    else __syncthreads();
}

struct alignas(16) Rows {  // dt | B | C of a tile
    uint16 row[T][ROW];
};

struct Places {           // where the steps of a tile lie
    int4 positions[T / 4];  // 0 where there is none
    uint32 inside;        // bit t: step t lies on the map; bit T + t: the path has it, though it may be of a window's padding

    DEVICE int position(int t) const { return ((const int *)positions)[t]; }
    DEVICE bool ends() const { return inside >> T != (1u << T) - 1; }
    DEVICE bool exists(int t) const { return inside >> (T + t) & 1; }
};

struct Map {
    int height, width;
    int kind, flip, length;
    uint32 per_column;  // 2^32 / height, rounded up
};

DEVICE Map map_of(int k, int height, int width) {
    constexpr int codes[] = {PATHS};
    int code = codes[0];
#pragma unroll
    for (int i = 1; i < PATH_COUNT; i++) code = i == k ? codes[i] : code;
    Map map = {height, width, code / 2, code % 2, height * width, 0xffffffffu / (uint32)height + 1};
    if (WINDOWS && map.kind >= 2) {
        const int w = map.kind - 1;
        map.length = ((height + w - 1) / w) * ((width + w - 1) / w) * w * w;
    }
    return map;
}

// The first warp calls this; a tile before the first or after the last has no steps.
DEVICE void write_places(Places &places, const Map &map, int tile, int lane) {
    const int step = tile * T + lane % T;
    const bool exists = tile >= 0 && step < map.length;
    bool inside = exists;
    const int p = inside ? (map.flip ? map.length - 1 - step : step) : 0;
    int position = p;
    if (map.kind == 1) {  // of a map of height 1, column order is row order, and kernels/launch.py says so
        int column = (int)((unsigned long long)(uint32)p * map.per_column >> 32);  // or one more
        column -= column * map.height > p;
        position = (p - column * map.height) * map.width + column;
    } else if (WINDOWS && map.kind >= 2) {
        const int w = map.kind - 1;
        const int across = (map.width + w - 1) / w;
        const int window = p / (w * w), rest = p % (w * w);
        const int row = window / across * w + rest / w, column = window % across * w + rest % w;
        inside = inside && row < map.height && column < map.width;
        position = row * map.width + column;
    }
    const uint32 on_map = ballot(inside), on_path = ballot(exists);
    if (lane < T) ((int *)places.positions)[lane] = inside ? position : 0;
    if (lane == 0) places.inside = (on_map & ((1u << T) - 1)) | on_path << T;
}

// Start copying a tile of a map, from the first channel of the block, as [T][WIDTH]; zeros off the map.
DEVICE void copy_tile(uint16 *tile, const uint16 *map, int stride, int channels, const Places &places, int thread) {
    constexpr bool columns = THREADS % CHUNKS == 0;  // every thread keeps to its channels
#pragma unroll
    for (int i = 0; i < T * EACH / 8; i++) {
        const int t = columns ? thread / CHUNKS + i * (THREADS / CHUNKS) : (thread + i * THREADS) / CHUNKS;
        const int first = (columns ? thread : thread + i * THREADS) % CHUNKS * 8;
        const char *from = (const char *)(map + (first < channels ? first : 0)) + (long long)places.position(t) * (2 * stride);
        copy_async(tile + t * WIDTH + first, from, first < channels && (places.inside >> t & 1));
    }
}

constexpr int SHARE = THREADS / T;  // threads that take care of the row of one step

// Start copying the rows of a tile, zeros off the map. Rows that start at odd numbers are copied at once, a number at a time.
DEVICE void copy_rows(Rows &rows, const uint16 *projection, int stride, const Places &places, int thread) {
    constexpr int each = WORDS ? 2 : 1, count = FIELDS / each;
    const int t = thread / SHARE;
    const bool real = places.inside >> t & 1;
    const uint16 *from = (const uint16 *)((const char *)projection + (long long)places.position(t) * (2 * stride));
#pragma unroll
    for (int i = 0; i < (count + SHARE - 1) / SHARE; i++) {
        const int at = thread % SHARE + i * SHARE;
        if ((i + 1) * SHARE <= count || at < count) {
            if (WORDS) copy_word(&rows.row[t][each * at], from + each * at, real);
            else rows.row[t][at] = real ? from[at] : 0;
        }
    }
}

DEVICE void clear_rows(Rows (&rows)[2], int thread) {  // fields that only pad are never written again
    for (int e = thread; e < 2 * T * ROW; e += THREADS) rows[e / (T * ROW)].row[0][e % (T * ROW)] = 0;
}

// The weight of the step for the channels of a warp, times log2(e), and the bias.
struct alignas(16) Weight {
    uint16 w[2][SPAN][WEIGHT_ROW];  // what a 16-bit number holds of it, and what of the rest
    float bias[SPAN];
};

DEVICE void load_weight(Weight &weight, const float *w, const float *bias, int first_channel, int channels, int lane) {
    for (int e = lane; e < SPAN * RANK8; e += 32) {
        const int c = e / RANK8, r = e % RANK8;
        const float v = first_channel + c < channels && r < RANK ? w[(long long)(first_channel + c) * RANK + r] * LOG2E : 0.f;
        const uint16 high = to_map(BF16 ? v : fminf(fmaxf(v, -65504.f), 65504.f));  // the rest takes what float16 cannot
        weight.w[0][c][r] = high;
        weight.w[1][c][r] = to_map(v - to_float(high));
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int c = first_channel + 32 * j + lane;
        weight.bias[32 * j + lane] = HAS_BIAS && c < channels ? bias[c] * LOG2E : 0.f;
    }
}

// A warp's own tile: full steps times log2(e) [T][channel of the warp], B times ln(2) and C of two steps each.
struct alignas(16) Own {
    float steps[T * STEP_ROW];
    float4 BC[T / 2];

    DEVICE float B(int t) const { return t % 2 ? BC[t / 2].z : BC[t / 2].x; }
    DEVICE float C(int t) const { return t % 2 ? BC[t / 2].w : BC[t / 2].y; }
};

// log2(e) (dt[t] . weight + bias) for a whole tile; the caller synchronises the warp.
DEVICE void expand(Own &own, const Rows &rows, const Weight &weight, int lane) {
    float d[4 * EACH][4];
#pragma unroll
    for (int j = 0; j < 4 * EACH; j++) {
        const float2 bias = ((const float2 *)weight.bias)[4 * j + lane % 4];
        d[j][0] = d[j][2] = bias.x;
        d[j][1] = d[j][3] = bias.y;
    }
#pragma unroll
    for (int i = 0; i < RANK8 / 8; i++) {
        uint32 a[4];
        load_matrices(a, &rows.row[lane % 16][8 * i]);  // twice
        if (RANK % 8 && i == RANK8 / 8 - 1) {  // B and C follow: of an infinite one a weight of zero would make NaN
            const int left = RANK % 8 - lane % 4 * 2;
            const uint32 keep = left > 1 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] &= keep;
        }
#pragma unroll
        for (int j = 0; j < 4 * EACH; j += 2) {
            uint32 b[4];
            load_matrices(b, &weight.w[lane / 8 % 2][8 * j + lane / 16 * 8 + lane % 8][8 * i]);
            multiply_add(d[j], a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply_add(d[j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
    const uint16 *last = &rows.row[lane % T][RANK];
    ((float2 *)own.BC)[lane % T] = {to_float(last[0]) * LN2, to_float(last[1])};
#pragma unroll
    for (int j = 0; j < 4 * EACH; j++) {
        float2 *at = (float2 *)(own.steps + lane / 4 * STEP_ROW + 8 * j + lane % 4 * 2);
        at[0] = {d[j][0], d[j][1]};
        at[4 * STEP_ROW] = {d[j][2], d[j][3]};
    }
}

struct Shared {
    alignas(16) uint16 x[2][T * WIDTH];
#if BACKWARD
    uint16 dy[2][T * WIDTH];
    float4 weight_gradients[WARPS][2][RANK8 / 8][32];
    float sums[1 + APART][WARPS][2 * T];
#endif
    Own own[1 + APART][WARPS];
    Weight weights[WARPS];
    Rows rows[2];
    Places places[PLACES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/cuda.py asks for too little shared memory");

// What a thread reads and writes of its channels; `at` belongs to its first.
DEVICE void load_each(float (&v)[EACH], const float *at) {
#if EACH == 2
    const float2 pair = *(const float2 *)at;
    v[0] = pair.x;
    v[1] = pair.y;
#else
    v[0] = *at;
#endif
}
DEVICE void load_each(float (&v)[EACH], const uint16 *at) {
#if EACH == 2
    const float2 pair = to_floats(*(const uint32 *)at);
    v[0] = pair.x;
    v[1] = pair.y;
#else
    v[0] = to_float(*at);
#endif
}
DEVICE void store_each(const uint32 (&stored)[EACH], uint32 bit, uint16 *to, const float (&v)[EACH]) {
#if EACH == 2
    store_if(stored[0] & bit, (uint32 *)to, SCALED ? halves(v[0], v[1]) : to_maps(v[0], v[1]));
#else
    store_if(stored[0] & bit, to, SCALED ? float_to_half(v[0]) : to_map(v[0]));
#endif
}

// Write the first STEPS steps of a tile of y or dx; `left` channels from the first on are real.
template <int STEPS>
DEVICE void store_tile(uint16 *map, uint16 *scale, float (&v)[T][EACH], const Places &places, int channels, int left) {
    uint32 stored[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) stored[j] = left > j ? places.inside : 0;
    float times[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) times[j] = 1.f;
    if (SCALED) {
        uint32 power[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            float most[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int t = 0; t < STEPS; t++) most[t % 4] = fmaxf(most[t % 4], fabsf(v[t][j]));
            power[j] = power_of(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])));
            times[j] = from_bits(0x7f000000u - power[j]);
        }
#if EACH == 2
        store_if(left > 0, (uint32 *)scale, power[0] >> 16 | power[1]);
#else
        store_if(left > 0, scale, (uint16)(power[0] >> 16));
#endif
    }
#pragma unroll
    for (int t = 0; t < STEPS; t++) {
        // An address by one multiplication: an index would take three instructions.
        uint16 *to = (uint16 *)((char *)map + (long long)places.position(t) * (2 * channels));
#pragma unroll
        for (int j = 0; j < EACH; j++) v[t][j] *= times[j];
        store_each(stored, 1u << t, to, v[t]);
    }
}
