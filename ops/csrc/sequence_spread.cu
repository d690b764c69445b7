// The forward scan over mamba's layout in one pass, where channels are few: sixteen lanes share a channel, a state each.
//
// A lane is one state of its channel while it scans, and one step while it works out delta, delta u and the gates, or writes y. Tensor cores
// add up y: a product with columns of ones adds four lanes for four steps at once, and two exchanges the rest. A tile's map values are
// worked out while the tile before it is scanned, and results leave while the tile after it is: a block meets once a tile.

static_assert(N == 16 && T == N && 32 % LANES == 0 && LANES == N, "a lane is a state, and a step");
constexpr int PAIR = 32 / LANES;         // channels of a warp
constexpr int OUT_ROW = CHANNELS + 2;    // of y in shared memory: a warp's lanes do not share a bank
constexpr int STATES_ROW = CHANNELS + 1;  // of the states

struct alignas(16) Shared {  // all twice: one is read while the other is written
    float B[2][N][MATRIX_ROW], C[2][N][MATRIX_ROW];
    float2 steps[2][WARPS][PAIR][T + 2];  // delta, delta u
    float states[2][N][STATES_ROW];
    uint16 y[2][T][OUT_ROW];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

// Sums over the lanes of a channel, of `parts` for each of the T steps: lane 4 g + q gets that of step 4 q + g % 4. The tensor cores read
// 11 bits of a number, too few where states cancel: they are given the rest as well.
DEVICE float sum_lanes(const float (&parts)[T], const float (&columns)[8], int lane) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int t = 0; t < T; t += 4) {
        const float *v = parts + t;
        multiply_add(d, v[0], v[1], v[2], v[3], columns[t / 2], columns[t / 2 + 1]);
        float rest[4];
#pragma unroll
        for (int i = 0; i < 4; i++) rest[i] = v[i] - from_bits(bits_of(v[i]) & 0xffffe000u);
        multiply_add(d, rest[0], rest[1], rest[2], rest[3], columns[t / 2], columns[t / 2 + 1]);
    }
    const bool odd = lane & 4, upper = lane & 8;
    float first = odd ? d[2] : d[0], second = odd ? d[3] : d[1];
    first += exchange(odd ? d[0] : d[2], 4);
    second += exchange(odd ? d[1] : d[3], 4);
    return (upper ? second : first) + exchange(upper ? first : second, 8);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sequence_spread(
    const uint16 *u, const uint16 *delta, const uint16 *z, const uint16 *B, const uint16 *C, const float *A, const float *D,
    const float *bias, uint16 *y, float *states, float *last, float *totals, int length, int channels, int groups, int tiles,
    int tiles_per_split, int splits, int u_batch, int u_row, int delta_batch, int delta_row, int z_batch, int z_row, int B_batch,
    int B_group, int B_row, int C_batch, int C_group, int C_row) {
    SHARED(shared);
    const Work work = work_of(channels, groups, 1);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int n = lane % LANES, pair = lane / LANES, own = warp * PAIR + pair;  // its state, its channel of the warp and of the block
    const int own_step = lane % 4 * 4 + lane / 4 % 4;
    const int dim = groups * channels, c = work.k * channels + work.first_channel;  // the block's first channel of all

    u = afresh(u + (long long)work.batch * u_batch + (long long)(c + own) * u_row);
    delta = afresh(delta + (long long)work.batch * delta_batch + (long long)(c + own) * delta_row);
    if (HAS_Z) z = afresh(z + (long long)work.batch * z_batch + (long long)(c + own) * z_row);
    B = afresh(share(B + (long long)work.batch * B_batch + (long long)work.k * B_group, B_row, thread));
    C = afresh(share(C + (long long)work.batch * C_batch + (long long)work.k * C_group, C_row, thread));
    // four bytes a thread leave the block, of states and of y
    const int state_row = thread / CHANNELS, state_channel = thread % CHANNELS;
    const int out_row = 2 * thread / CHANNELS, out_channel = 2 * thread % CHANNELS;
    states += ((long long)work.batch * groups + work.k) * tiles * N * channels + work.first_channel;
    float *to_states = afresh(states + state_row * channels + state_channel);
    uint16 *to_y = afresh(y + ((long long)work.batch * length + out_row) * dim + c + out_channel);

    const float decay = A[(long long)(c + own) * N + n];
    const float own_bias = HAS_BIAS ? bias[c + own] * LOG2E : 0.f, skip = HAS_D ? D[c + own] : 0.f;
    float columns[8];
#pragma unroll
    for (int i = 0; i < 8; i++) columns[i] = opaque(lane / 4 == i ? 1.f : 0.f);

    uint32 raw_u, raw_delta, raw_z = 0, raw_B[MATRIX_READS], raw_C[MATRIX_READS];
    int first = 0;  // step of the tile that is read next
    auto read = [&]() INLINE {
        const int step = existing(first + own_step, length);
        raw_u = u[step];
        raw_delta = delta[step];
        if (HAS_Z) raw_z = z[step];
        const int matrix_step = existing(first + thread % T, length);
        read_matrix(raw_B, B + matrix_step, B_row, thread);
        read_matrix(raw_C, C + matrix_step, C_row, thread);
        first += T;
    };
    // Work out what the tile that was read needs, in `gate` what y of the lane's step does; read the tile after it.
    auto open = [&](int to, float2 &gate) INLINE {
        const float value = to_float((uint16)raw_u);
        float v = step_of(to_float((uint16)raw_delta), own_bias);
        v = first + own_step < length + T ? v : 0.f;  // a step after the last changes no state
        shared.steps[to][warp][pair][own_step] = {v, v * LN2 * value};
        gate = {skip * value, HAS_Z ? silu(to_float((uint16)raw_z)) : 1.f};
        write_matrix(shared.B[to], raw_B, 1.f, thread);
        write_matrix(shared.C[to], raw_C, 1.f, thread);
        read();
    };
    int steps_left = length;  // from the tile on that is stored next
    auto store = [&](int from) INLINE {
        static_assert(THREADS == N * CHANNELS && 2 * THREADS >= T * CHANNELS, "a thread stores one state");
        *to_states = shared.states[from][state_row][state_channel];
        if (out_row < T && out_row < steps_left) *(uint32 *)to_y = *(const uint32 *)&shared.y[from][out_row][out_channel];
        to_states += N * channels;
        to_y += (long long)T * dim;
        steps_left -= T;
    };

    float2 gate = {0.f, 1.f}, next_gate;
    float h = 0.f;
    auto scan = [&](int now) INLINE {
        shared.states[now][n][own] = h;
        open(1 - now, next_gate);
        float parts[T];
#pragma unroll
        for (int t = 0; t < T; t += 4) {
            float b[4], c[4], steps[8];
            load_four(b, &shared.B[now][n][t]);
            load_four(c, &shared.C[now][n][t]);
            load_four(steps, &shared.steps[now][warp][pair][t].x);
            load_four(steps + 4, &shared.steps[now][warp][pair][t + 2].x);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h = exp2_fast(steps[2 * i] * decay) * h + steps[2 * i + 1] * b[i];
                parts[t + i] = h * c[i];
            }
        }
        const float sum = sum_lanes(parts, columns, lane);
        shared.y[now][own_step][own] = to_map((sum + gate.x) * gate.y);
        gate = next_gate;
        __syncthreads();
    };
    read();
    open(0, gate);
    __syncthreads();
    scan(0);
    for (int tile = 1; tile < tiles; tile += 2) {
        store(0);
        scan(1);
        if (tile + 1 == tiles) break;
        store(1);
        scan(0);
    }
    store((tiles - 1) % 2);
    if (LAST) last[((long long)work.batch * dim + c + own) * N + n] = h;
}
