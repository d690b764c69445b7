// The forward scan over mamba's layout in one pass, where channels are few: lanes along the steps.
//
// Sixteen lanes share a channel, and a chunk of its steps: each has a tile of them, in registers. For every state a lane scans its tile
// from zero, the lanes find out what comes before each of them, and it scans the tile again from there, with the powers and products of the
// first time. Finding out takes four steps, each of which adds twice as many lanes before (Hillis and Steele's scan) of pairs: the product of
// a tile's decays, and its state. The second scan of one state goes side by side with the first one of the next.
//
// A block has B and C of a chunk in common, and writes y and the states of all its channels together, for they lie side by side. It does
// both in slices while it scans another chunk, so its warps meet once a chunk, and not at one point: a warp goes on to open its next tiles
// before it waits for the others, which keeps them from all wanting the same at once.

static_assert(N == 16 && T == N && LANES == 16 && FULL && CHANNELS % 2 == 0, "a lane has a tile, a warp two channels");
constexpr int CHUNK = LANES * T;           // steps
constexpr int PIECES = CHUNK / 8 + 1;      // of 16 bytes, of a row's chunk, which may start anywhere in its first
constexpr int RAW_ROW = 8 * (PIECES + 1);
constexpr int MATRIX_ROWS = (2 * N + WARPS - 1) / WARPS;  // of B and C, a warp's
constexpr int PAIRS = CHANNELS / 2;        // of channels
constexpr int STRIDE = THREADS / PAIRS;    // rows of all channels that the threads write at once
constexpr int SLICES = CHUNK / STRIDE;     // for each of which there are two states
constexpr int Y_TILE = T * CHANNELS + 2;   // so that lanes that write do not share a bank, as the next
constexpr int STATES_TILE = N * CHANNELS + 2;

struct alignas(16) Shared {
    float matrices[2][2 * N][CHUNK];  // B, then C, of this chunk and the next one
    uint16 raw[2][2 * N][RAW_ROW];    // of the next one and the one after it, as they came
    uint16 u[CHANNELS][RAW_ROW], delta[CHANNELS][RAW_ROW], z[CHANNELS][RAW_ROW];  // of the next one
    float states[2][LANES][STATES_TILE];  // before every tile, of this chunk and the last one
    uint16 y[2][LANES][Y_TILE];
    float A[CHANNELS][N], carry[CHANNELS][N];  // carry: the state behind the last chunk
    float2 parameters[CHANNELS];               // bias, D
    unsigned long long warps;                                          // the barrier at which they meet
    const uint16 *rows[3][THREADS], *matrix_rows[WARPS][MATRIX_ROWS];  // what is copied first: registers are short
};
static_assert(MATRIX_ROWS <= 8, "");
static_assert(2 * SLICES == N, "a slice for two states");
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

// Where lanes that read 16 bytes each do not share a bank: of pieces of a row that every lane has two of, and of quarters of a tile.
DEVICE int place_of_piece(int piece) { return piece ^ (piece >> 3 & 1); }
DEVICE int place_of_quarter(int tile, int quarter) { return T * tile + 4 * (quarter ^ (tile >> 1 & 3)); }

// The pairs of numbers of a lane's tile.
DEVICE void load_tile(uint32 (&pairs)[T / 2], const uint16 *row, int tile, int skip) {
    const auto piece = [&](int i) INLINE { return row + 8 * place_of_piece(2 * tile + i); };
    load_pairs(pairs, piece(0), piece(1), piece(2), skip);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sequence_tiles(
    const uint16 *u, const uint16 *delta, const uint16 *z, const uint16 *B, const uint16 *C, const float *A, const float *D,
    const float *bias, uint16 *y, float *states, float *last, float *totals, int length, int channels, int groups, int tiles,
    int tiles_per_split, int splits, int u_batch, int u_row, int delta_batch, int delta_row, int z_batch, int z_row, int B_batch,
    int B_group, int B_row, int C_batch, int C_group, int C_row) {
    SHARED(shared);
    const Work work = work_of(channels, groups, 1);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, tile = thread % LANES, own = thread / LANES;
    const int dim = groups * channels, c = work.k * channels + work.first_channel;  // the block's first channel of all
    const int chunks = (length + CHUNK - 1) / CHUNK;

    if (tile == 0) shared.parameters[own] = {HAS_BIAS ? bias[c + own] * LOG2E : 0.f, HAS_D ? D[c + own] : 0.f};
    shared.A[own][tile] = A[(long long)(c + own) * N + tile];
    shared.carry[own][tile] = 0.f;

    // Rows are copied in pieces from a multiple of 16 bytes on, `skip` numbers before they start. A lane copies the pieces tile, tile + 16 and
    // tile + 32 of its channel's, and the pieces lane and lane + 32 of its warp's rows of B and C.
    uint32 map_skips = 0, matrix_skips = 0;  // four bits each
    auto begin_row = [&](const uint16 *&aligned, uint32 &skips, const uint16 *row, int place) INLINE {
        skips |= misplaced(row) << 4 * place;
        aligned = row - misplaced(row);
    };
    const long long image = work.batch, channel = c + own;
    begin_row(shared.rows[0][thread], map_skips, u + image * u_batch + channel * u_row, 0);
    begin_row(shared.rows[1][thread], map_skips, delta + image * delta_batch + channel * delta_row, 1);
    if (HAS_Z) begin_row(shared.rows[2][thread], map_skips, z + image * z_batch + channel * z_row, 2);
#pragma unroll
    for (int j = 0; j < MATRIX_ROWS; j++) {
        const int n = warp + j * WARPS;
        if (n >= 2 * N) continue;
        const uint16 *of_B = B + image * B_batch + (long long)work.k * B_group + (long long)n * B_row;
        const uint16 *of_C = C + image * C_batch + (long long)work.k * C_group + (long long)(n - N) * C_row;
        begin_row(shared.matrix_rows[warp][j], matrix_skips, n < N ? of_B : of_C, j);
    }
    auto skip_of = [](uint32 skips, int place) INLINE { return (int)(skips >> 4 * place & 15); };
    // Copies of a chunk, of which, and behind it, there are `left` steps; `whole` if every piece of it is.
    auto copy_map = [&](uint16 *to, int map, int chunk, int left, bool whole) INLINE {
        const uint16 *from = shared.rows[map][thread] + chunk * CHUNK + 8 * tile;
        const int rest = whole ? 0 : left + skip_of(map_skips, map) - 8 * tile;
#pragma unroll
        for (int i = 0; i < 2; i++)
            copy_bytes(to + 8 * place_of_piece(tile + 16 * i), from + 128 * i, whole ? 16 : bytes_of(rest - 128 * i));
        if (tile == 0) copy_bytes(to + 8 * place_of_piece(32), from + 256, whole ? 16 : bytes_of(rest - 256));
    };
    auto copy_maps = [&](int chunk, int left, bool whole) INLINE {
        copy_map(shared.u[own], 0, chunk, left, whole);
        copy_map(shared.delta[own], 1, chunk, left, whole);
        if (HAS_Z) copy_map(shared.z[own], 2, chunk, left, whole);
    };
    auto copy_matrices = [&](int chunk, int left, bool whole) INLINE {
#pragma unroll
        for (int j = 0; j < MATRIX_ROWS; j++) {
            if (warp + j * WARPS >= 2 * N) continue;
            const uint16 *from = shared.matrix_rows[warp][j] + chunk * CHUNK + 8 * lane;
            const int rest = whole ? 0 : left + skip_of(matrix_skips, j) - 8 * lane;
            uint16 *to = shared.raw[chunk % 2][warp + j * WARPS] + 8 * lane;
            copy_bytes(to, from, whole ? 16 : bytes_of(rest));
            if (lane == 0) copy_bytes(to + 256, from + 256, whole ? 16 : bytes_of(rest - 256));
        }
    };
    // What is done for another chunk in slices, while the states of this one are scanned. B and C are made of what came for the next one,
    // 32 numbers of a row at once:
    const uint16 *raw[MATRIX_ROWS];
    uint16 numbers[MATRIX_ROWS];
    int place = warp * CHUNK + lane / 16 * T + lane % 16;
#pragma unroll
    for (int j = 0; j < MATRIX_ROWS; j++) raw[j] = shared.raw[0][warp + j * WARPS] + skip_of(matrix_skips, j) + lane;
    auto load_slice = [&]() INLINE {
#pragma unroll
        for (int j = 0; j < MATRIX_ROWS; j++) {
            if (warp + j * WARPS < 2 * N) numbers[j] = *raw[j];
            raw[j] += 32;
        }
    };
    auto store_slice = [&](int i) INLINE {
#pragma unroll
        for (int j = 0; j < MATRIX_ROWS; j++)
            if (warp + j * WARPS < 2 * N) (&shared.matrices[0][0][0])[(place ^ i % 4 * 4) + j * WARPS * CHUNK] = to_float(numbers[j]);
        place += 32;
    };
    auto turn_matrices = [&](int chunk) INLINE {  // to another one, from the one before it
#pragma unroll
        for (int j = 0; j < MATRIX_ROWS; j++) raw[j] += (chunk % 2 ? 2 * N * RAW_ROW : -2 * N * RAW_ROW) - CHUNK;
        place += (chunk % 2 ? 2 * N * CHUNK : -2 * N * CHUNK) - CHUNK;
    };
    // And y and the states that the last one left are written, every STRIDE-th row of all channels, a pair of channels a thread:
    const int pair = thread % PAIRS, row = thread / PAIRS;
    const long long path = image * groups + work.k;
    const uint16 *out_from = &shared.y[1][row / T][row % T * CHANNELS + 2 * pair];
    const float *states_from = &shared.states[1][row / N][row % N * CHANNELS + 2 * pair];
    y += (image * length + row - CHUNK) * dim + c + 2 * pair;
    states += ((path * tiles - LANES) * N + row) * channels + work.first_channel + 2 * pair;
    int steps_left = 0, starts_left = 0;
    auto begin_writing = [&](int chunk) INLINE {
        if (chunk % 2 == 0) out_from -= 2 * LANES * Y_TILE, states_from -= 2 * LANES * STATES_TILE;
        steps_left = length - chunk * CHUNK - row;
        starts_left = (tiles - chunk * LANES) * N - row;
    };
    auto write = [&](int i) INLINE {
        if (i * STRIDE < steps_left) *(uint32 *)y = *(const uint32 *)out_from;
        if (KEEP && i * STRIDE < starts_left) *(float2 *)states = *(const float2 *)states_from;
        out_from += STRIDE / T * Y_TILE, states_from += STRIDE / N * STATES_TILE;
        y += STRIDE * dim, states += STRIDE * channels;
    };

    if (thread == 0) begin_barrier(shared.warps, WARPS);
    copy_maps(0, length, false);
    copy_matrices(0, length, false);
    copy_matrices(1, length - CHUNK, false);
    wait_copies();
    __syncthreads();
    for (int i = 0; i < SLICES; i++) {
        load_slice();
        store_slice(i);
    }

    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_copies();
        __syncwarp();
        if (lane == 0) arrive(shared.warps);
        float step[T], input[T], out[T], total = 0.f;
        uint32 gates[T / 2];
        {
            const float2 parameters = shared.parameters[own];
            uint32 values[T / 2], deltas[T / 2];
            load_tile(values, shared.u[own], tile, skip_of(map_skips, 0));
            load_tile(deltas, shared.delta[own], tile, skip_of(map_skips, 1));
            if (HAS_Z) load_tile(gates, shared.z[own], tile, skip_of(map_skips, 2));
#pragma unroll
            for (int t = 0; t < T; t += 2) {
                const float2 value = to_floats(values[t / 2]), v = to_floats(deltas[t / 2]);
                step[t] = step_of(v.x, parameters.x), step[t + 1] = step_of(v.y, parameters.x);
                input[t] = step[t] * (value.x * LN2), input[t + 1] = step[t + 1] * (value.y * LN2);
                out[t] = parameters.y * value.x, out[t + 1] = parameters.y * value.y;
            }
            const int steps = length - chunk * CHUNK - tile * T;
            if (steps < T) {  // a step after the last changes no state; u is 0 there
#pragma unroll
                for (int t = 0; t < T; t++) step[t] = t < steps ? step[t] : 0.f;
            }
#pragma unroll
            for (int t = 0; t < T; t++) total += step[t];
        }
        __syncwarp();
        const int left = length - (chunk + 1) * CHUNK;
        if (left >= 2 * CHUNK + 8) {
            copy_maps(chunk + 1, left, true);
            copy_matrices(chunk + 2, left - CHUNK, true);
        } else {
            copy_maps(chunk + 1, left, false);
            copy_matrices(chunk + 2, left - CHUNK, false);
        }
        wait_for(shared.warps, chunk % 2);
        turn_matrices(chunk + 1);
        if (chunk) begin_writing(chunk - 1);

        const float *matrices[4], *decay_of = shared.A[own];
        float *carry_of = shared.carry[own], *start_of = &shared.states[chunk % 2][tile][own];
#pragma unroll
        for (int i = 0; i < 4; i++) matrices[i] = shared.matrices[chunk % 2][0] + place_of_quarter(tile, i);
        float a[2][T], b[2][T], h[2], product[2], start[2];
        auto begin_quarter = [&](int s, int n, int quarter) INLINE {  // scan a quarter of the tile from zero
            const float decay = decay_of[n];
            float four[4];
            load_four(four, matrices[quarter] + n * CHUNK);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = 4 * quarter + i;
                a[s][t] = exp2_fast(step[t] * decay);
                b[s][t] = input[t] * four[i];
                h[s] = t ? a[s][t] * h[s] + b[s][t] : b[s][0];
            }
        };
        auto begin_lanes = [&](int s, int n) INLINE {
            product[s] = exp2_fast(total * decay_of[n]);
            start[s] = tile ? 0.f : carry_of[n];
            h[s] += product[s] * start[s];
            product[s] = tile ? product[s] : 0.f;  // nothing comes before the first lane, nor then before any that has looked as far
        };
        // Scan state n over the lanes, and again over the tile, and meanwhile the state after it for the first time.
        auto scan = [&](int s, int n, bool more) INLINE {
#pragma unroll
            for (int quarter = 0; quarter < 4; quarter++) {
                const float before = before_by(h[s], 1 << quarter), product_before = quarter < 3 ? before_by(product[s], 1 << quarter) : 0.f;
                if (more) begin_quarter(1 - s, n + 1, quarter);
                h[s] += product[s] * before;
                product[s] *= product_before;
            }
            const float before = before_by(h[s], 1);
            if (more) begin_lanes(1 - s, n + 1);
            h[s] = tile ? before : start[s];
            if (KEEP) start_of[n * CHANNELS] = h[s];
#pragma unroll
            for (int t = 0; t < T; t += 4) {
                float four[4];
                load_four(four, matrices[t / 4] + (N + n) * CHUNK);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    h[s] = a[s][t + i] * h[s] + b[s][t + i];
                    out[t + i] += h[s] * four[i];
                }
            }
            if (tile == LANES - 1) carry_of[n] = h[s];
        };
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) begin_quarter(0, 0, quarter);
        begin_lanes(0, 0);
#pragma unroll 1
        for (int i = 0; i < SLICES - 1; i++) {
            load_slice();
            scan(0, 0, true);
            store_slice(i);
            write(i);
            scan(1, 1, true);
#pragma unroll
            for (int j = 0; j < 4; j++) matrices[j] += 2 * CHUNK;
            decay_of += 2, carry_of += 2, start_of += 2 * CHANNELS;
        }
        load_slice();
        scan(0, 0, true);
        store_slice(SLICES - 1);
        write(SLICES - 1);
        scan(1, 1, false);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float2 both = HAS_Z ? to_floats(gates[t / 2]) : float2{0.f, 0.f};
            const float gate = HAS_Z ? silu(t % 2 ? both.y : both.x) : 1.f;
            shared.y[chunk % 2][tile][t * CHANNELS + own] = to_map(out[t] * gate);
        }
    }
    __syncthreads();
    begin_writing(chunks - 1);
    for (int i = 0; i < SLICES; i++) write(i);
    if (LAST) last[((long long)work.batch * dim + c + own) * N + tile] = shared.carry[own][tile];
}
