// The forward scan over mamba's layout in one pass, where channels are few: four lanes share a channel, four states each.
//
// Half of a block's warps scan, eight channels each, the others open: they read a tile, work out its delta and delta u B's shares while
// the tile before it is scanned, and finish y of the one before that. So the scan waits for nothing but its exponentials. Lane 4 g + q scans
// states 4 q to 4 q + 3 of channel g, or opens its steps q, q + 4, q + 8 and q + 12. Tensor cores make delta u B, of a step, and add up
// y, over the lanes of a channel. The warps meet once a tile.

static_assert(N == 16 && T == N && LANES == 8, "a lane that scans has four states, one that opens four steps");
constexpr int EACH = 4;            // states of a lane, or its steps of a tile
constexpr int STEP_ROW = T + 4;    // of a channel's delta in shared memory; so that lanes that read do not share a bank, as all of these
constexpr int INPUT_ROW = 2 * T + 8;
constexpr int STATE_ROW = N + 4;

struct alignas(16) Shared {  // all twice: one is read while the other is written
    float B[2][N][MATRIX_ROW], C[2][T][STATE_ROW];
    float step[2][CHANNELS][STEP_ROW];                    // delta
    float input[2][CHANNELS][EACH * INPUT_ROW + 4];       // what each lane gives the product for delta u B, a pair a step
    float sums[2][CHANNELS][T];                           // y without gate and skip, of steps q, q + 4, ... together
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sequence_spread(
    const uint16 *u, const uint16 *delta, const uint16 *z, const uint16 *B, const uint16 *C, const float *A, const float *D,
    const float *bias, uint16 *y, float *states, float *last, float *totals, int length, int channels, int groups, int tiles,
    int tiles_per_split, int splits, int u_batch, int u_row, int delta_batch, int delta_row, int z_batch, int z_row, int B_batch,
    int B_group, int B_row, int C_batch, int C_group, int C_row) {
    SHARED(shared);
    const Work work = work_of(channels, groups, 1);
    const bool scans = threadIdx.x < READERS;
    const int thread = threadIdx.x % READERS, q = thread % 4, g = thread % 32 / 4, own = thread / 4;  // its channel of the block
    const int dim = groups * channels, c = work.k * channels + work.first_channel + own;                // and of all

    u += (long long)work.batch * u_batch + (long long)c * u_row + q;
    delta += (long long)work.batch * delta_batch + (long long)c * delta_row + q;
    if (HAS_Z) z += (long long)work.batch * z_batch + (long long)c * z_row + q;
    B = share(B + (long long)work.batch * B_batch + (long long)work.k * B_group, B_row, thread) + thread % T;
    C = share(C + (long long)work.batch * C_batch + (long long)work.k * C_group, C_row, thread) + thread % T;
    const long long path = (long long)work.batch * groups + work.k;
    states += (path * tiles * N + EACH * q) * channels + work.first_channel + own;
    y += ((long long)work.batch * length + q) * dim + c;

    float decay[EACH], columns[8][2];
#pragma unroll
    for (int n = 0; n < EACH; n++) decay[n] = A[(long long)c * N + EACH * q + n];
#pragma unroll
    for (int i = 0; i < 16; i++) columns[i / 2][i % 2] = opaque(g == i / 2 ? 1.f : 0.f);
    const float own_bias = HAS_BIAS ? bias[c] * LOG2E : 0.f, skip = HAS_D ? D[c] : 0.f;
    // Of delta u B: rows are channels, twice, columns are states, 4 i and 4 i + 1 in the first rows and 4 i + 2 and 4 i + 3 in the others;
    // the first rows take the products of lanes 0 and 1, the others those of 2 and 3.
    const int row = 4 * (g / 2) + g % 2 + (q & 2);

    for (int e = threadIdx.x; e < (int)(sizeof(shared.input) / sizeof(float)); e += THREADS) (&shared.input[0][0][0])[e] = 0.f;
    __syncthreads();

    uint32 raw_u[EACH], raw_delta[EACH], raw_z[EACH], raw_B[MATRIX_READS], raw_C[MATRIX_READS];
    int left = length;  // steps from the tile on that is read next
    auto read = [&]() INLINE {
        const int most = left - q - 1;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int step = 4 * i < most ? 4 * i : most;  // beyond the last step that one again
            raw_u[i] = u[step];
            raw_delta[i] = delta[step];
            raw_z[i] = HAS_Z ? z[step] : 0;
        }
        const int step = thread % T < left ? 0 : left - 1 - thread % T;
        read_matrix(raw_B, B + step, B_row, thread);
        read_matrix(raw_C, C + step, C_row, thread);
    };
    // Work out what the tile that was read needs, in `gates` what y of the lane's steps does; read the tile after it.
    auto open = [&](int to, float2 (&gates)[EACH]) INLINE {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int step = q + 4 * i;
            const float value = to_float((uint16)raw_u[i]);
            float v = step_of(to_float((uint16)raw_delta[i]), own_bias);
            v = step < left ? v : 0.f;  // a step after the last changes no state
            const float input = v * LN2 * value;
            shared.step[to][own][step] = v;
            float *pair = &shared.input[to][own][2 * step];
            pair[0] = pair[2 * INPUT_ROW + 1] = input;
            pair[INPUT_ROW] = pair[3 * INPUT_ROW + 1] = rest_of(input);
            gates[i] = {skip * value, HAS_Z ? silu(to_float((uint16)raw_z[i])) : 1.f};
        }
        write_matrix(shared.B[to], raw_B, 1.f, thread);
#pragma unroll
        for (int i = 0; i < MATRIX_READS; i++) {
            const int e = thread + i * READERS;
            if (N * T % READERS == 0 || e < N * T) shared.C[to][e % T][e / T] = to_float((uint16)raw_C[i]);
        }
        left -= T;
        u += T, delta += T, z += T, B += T, C += T;
        read();
    };
    int steps_left = length - q;  // of the lane, from the tile on whose y is finished next
    auto close = [&](int from, const float2 (&gates)[EACH]) INLINE {
        float sums[EACH];
        load_four(sums, &shared.sums[from][own][EACH * q]);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint16 out = to_map((sums[i] + gates[i].x) * gates[i].y);
            if (4 * i < steps_left) y[(long long)(4 * i) * dim] = out;
        }
        y += (long long)T * dim;
        steps_left -= T;
    };
    float h[EACH] = {0.f, 0.f, 0.f, 0.f};
    auto scan = [&](int now) INLINE {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (KEEP) states[i * channels] = h[i];
        states += N * channels;
        float sums[4] = {0.f, 0.f, 0.f, 0.f}, before[4];
#pragma unroll
        for (int t = 0; t < T; t += 4) {
            float step[4], b[4], input[8];
            load_four(step, &shared.step[now][own][t]);
            load_four(b, &shared.B[now][row][t]);
            load_four(input, &shared.input[now][own][q * INPUT_ROW + 2 * t]);
            load_four(input + 4, &shared.input[now][own][q * INPUT_ROW + 2 * t + 4]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float c[4], change[4];
                load_four(c, &shared.C[now][t + i][EACH * q]);
                multiply(change, input[2 * i], input[2 * i + 1], b[i]);
#pragma unroll
                for (int n = 0; n < EACH; n++) h[n] = exp2_fast(step[i] * decay[n]) * h[n] + change[n];
                const float sum = h[0] * c[0] + h[1] * c[1] + h[2] * c[2] + h[3] * c[3];
                const float(&column)[2] = columns[2 * i + t / 8];
                if (t % 8) multiply_add(sums, before[i], sum, rest_of(before[i]), rest_of(sum), column[0], column[1]);
                before[i] = sum;
            }
        }
        // the product's columns are steps t and t + 8 in turns; 4 later in its second eight rows
        const float ordered[EACH] = {sums[0], sums[2], sums[1], sums[3]};
        store_four(&shared.sums[now][own][EACH * q], ordered);
    };

    if (scans) {
        __syncthreads();
        for (int tile = 0; tile < tiles; tile += 2) {
            scan(0);
            __syncthreads();
            if (tile + 1 < tiles) {
                scan(1);
                __syncthreads();
            }
        }
#pragma unroll
        for (int n = 0; n < EACH; n++)
            if (LAST) last[((long long)work.batch * dim + c) * N + EACH * q + n] = h[n];
    } else {
        float2 gates[2][EACH];  // of the tile that is scanned and of the next one, in turns
        read();
        open(0, gates[0]);
        __syncthreads();
        for (int tile = 0; tile < tiles; tile += 2) {
            if (tile) close(1, gates[1]);
            open(1, gates[1]);
            __syncthreads();
            close(0, gates[0]);
            if (tile + 1 < tiles) {
                open(0, gates[0]);
                __syncthreads();
            }
        }
        if (tiles % 2 == 0) close(1, gates[1]);
    }
}
