// The forward scan over mamba's layout.
//
// The threads that read a tile also work out what each of its elements needs once (delta, delta u, D u, silu(z)); a thread then runs the
// states of its channel, four side by side, so that one's chain of products does not wait for the other's.

struct alignas(16) Shared {
    float B[N][MATRIX_ROW], C[N][MATRIX_ROW];
    float A[N][CHANNELS], h[N][CHANNELS];
    float2 steps[T][CHANNELS + 1];  // delta, delta u
#if !SUMMARY
    float2 gates[T][CHANNELS + 1];  // D u, silu(z)
#endif
    float2 parameters[CHANNELS];  // bias, D
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

DEVICE void write_steps(
    Shared &shared, const uint32 (&u)[T], const uint32 (&delta)[T], const uint32 (&z)[T], bool inside, int thread) {
    const int t = thread % T;
#pragma unroll
    for (int i = 0; i < T; i++) {
        const int c = thread / T + i * ROWS;
        const float2 parameters = shared.parameters[c];
        const float value = to_float((uint16)u[i]);
        float v = step_of(to_float((uint16)delta[i]), parameters.x);
        v = inside ? v : 0.f;  // a step after the last changes no state
        shared.steps[t][c] = {v, v * value};
#if !SUMMARY
        shared.gates[t][c] = {parameters.y * value, HAS_Z ? silu(to_float((uint16)z[i])) : 1.f};
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sequence_forward(
    const uint16 *u, const uint16 *delta, const uint16 *z, const uint16 *B, const uint16 *C, const float *A, const float *D,
    const float *bias, uint16 *y, float *states, float *last, float *totals, int length, int channels, int groups, int tiles,
    int tiles_per_split, int splits, int u_batch, int u_row, int delta_batch, int delta_row, int z_batch, int z_row, int B_batch,
    int B_group, int B_row, int C_batch, int C_group, int C_row) {
    SHARED(shared);
    const Work work = work_of(channels, groups, splits);
    const int thread = threadIdx.x, own = thread;  // its channel of the block
    const bool real = FULL || own < work.left;
    const int dim = groups * channels, c = work.k * channels + work.first_channel;  // the block's first channel of all
    const int begin = work.split * tiles_per_split;
    const int end = begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles;

    u = share(u + (long long)work.batch * u_batch + (long long)c * u_row, u_row, thread);
    delta = share(delta + (long long)work.batch * delta_batch + (long long)c * delta_row, delta_row, thread);
    if (HAS_Z) z = share(z + (long long)work.batch * z_batch + (long long)c * z_row, z_row, thread);
    B = share(B + (long long)work.batch * B_batch + (long long)work.k * B_group, B_row, thread);
    C = share(C + (long long)work.batch * C_batch + (long long)work.k * C_group, C_row, thread);
    y += ((long long)work.batch * length + begin * T) * dim + c + own;
    const int slot = KEEP ? begin : work.split;  // without KEEP there is a state a split: before it, or of a summary at its end
    const long long path = (long long)work.batch * groups + work.k;
    states += (path * (KEEP ? tiles : splits) + slot) * N * channels + work.first_channel + own;

    load_decay(shared.A, A + (long long)c * N, work.left, thread);
    shared.parameters[own] = {HAS_BIAS && real ? bias[c + own] * LOG2E : 0.f, HAS_D && real ? D[c + own] : 0.f};
#pragma unroll
    for (int n = 0; n < N; n++)
        shared.h[n][own] = !SUMMARY && work.split > 0 && real ? states[n * channels] : 0.f;
    uint32 raw_u[T], raw_delta[T], raw_z[T], raw_B[MATRIX_READS], raw_C[MATRIX_READS];
    auto read = [&](int tile) {
        const int step = existing(tile * T + thread % T, length);
        read_rows<FULL>(raw_u, u + step, u_row, work.left, thread);
        read_rows<FULL>(raw_delta, delta + step, delta_row, work.left, thread);
        read_matrix(raw_B, B + step, B_row, thread);
        if (SUMMARY) return;
        if (HAS_Z) read_rows<FULL>(raw_z, z + step, z_row, work.left, thread);
        read_matrix(raw_C, C + step, C_row, thread);
    };
    read(begin);
    float total = 0.f;
    for (int tile = begin; tile < end; tile++) {
        __syncthreads();  // the last tile is read, the parameters are written
        write_steps(shared, raw_u, raw_delta, raw_z, tile * T + thread % T < length, thread);
        write_matrix(shared.B, raw_B, LN2, thread);
        if (!SUMMARY) write_matrix(shared.C, raw_C, 1.f, thread);
        __syncthreads();
        if (tile + 1 < end) read(tile + 1);

        float step[T], input[T], out[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float2 v = shared.steps[t][own];
            step[t] = v.x;
            input[t] = v.y;
            out[t] = 0.f;
            if (SUMMARY) total += v.x;
        }
#pragma unroll 4
        for (int n = 0; n < N; n++) {
            const float decay = shared.A[n][own];
            float h = shared.h[n][own];
            if (KEEP && real) states[n * channels] = h;
#pragma unroll
            for (int t = 0; t < T; t += 4) {
                float b[4], c[4];
                load_four(b, &shared.B[n][t]);
                if (!SUMMARY) load_four(c, &shared.C[n][t]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    h = exp2_fast(step[t + i] * decay) * h + input[t + i] * b[i];
                    if (!SUMMARY) out[t + i] += h * c[i];
                }
            }
            shared.h[n][own] = h;
        }
#if !SUMMARY
        states += (long long)N * channels;
        const int steps = real ? length - tile * T : 0;
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float2 gate = shared.gates[t][own];
            if (t < steps) *(uint16 *)((char *)y + (long long)t * (2 * dim)) = to_map((out[t] + gate.x) * gate.y);
        }
        y += (long long)T * dim;
#endif
    }
    if (!real) return;
    if (SUMMARY) totals[(path * splits + work.split) * channels + work.first_channel + own] = total * LN2;
    if (SUMMARY || (LAST && end == tiles)) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (SUMMARY) states[n * channels] = shared.h[n][own];
            else last[((long long)work.batch * dim + c + own) * N + n] = shared.h[n][own];
        }
    }
}
