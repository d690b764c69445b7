// The backward scan over mamba's layout.
//
// With g = dL/dh: g[t] = C[t] dy[t] + a[t+1] g[t+1]. Every tile is walked twice for each state, down, to recompute what it was from the
// one saved at the tile's start, which came while the tile after it was walked, and up; between tiles the gradient that comes back, and
// the sum for dA, rest in shared memory. Sums over channels (dB, dC) are complete for a block, sums over steps (dA, dD, dbias) for an
// image and split: the launcher adds up the rest in a fixed order.

constexpr int ROW = T + 8;  // of a map in shared memory: lanes that read 16 bytes of their own rows do not share a bank

struct alignas(16) Shared {
    uint16 delta[CHANNELS][ROW], z[CHANNELS][ROW];
    float C[N][MATRIX_ROW];
    float A[N][CHANNELS], carry[N][CHANNELS];
#if !SUMMARY
    uint16 u[CHANNELS][ROW];
    float B[N][MATRIX_ROW];
    float dA[N][CHANNELS], states[N][CHANNELS];
    float grad[CHANNELS][T + 4];
    float sums[WARPS][N][2 * T];
    float columns[8][12];  // of ChannelSums, by lane / 4: the identity, with columns in the pairs that a product takes
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

// The 16-byte words of a thread's own row, eight steps each.
DEVICE void load_row(float (&v)[T], const uint16 *row) {
#pragma unroll
    for (int i = 0; i < T / 8; i++) {
        const int4 words = *(const int4 *)(row + 8 * i);
        const int word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 8; j++) v[8 * i + j] = to_float((uint16)(word[j / 2] >> 16 * (j % 2)));
    }
}

DEVICE void write_rows(uint16 (&to)[CHANNELS][ROW], const uint32 (&raw)[T], int thread) {
#pragma unroll
    for (int i = 0; i < T; i++) to[thread / T + i * ROWS][thread % T] = (uint16)raw[i];
}

// What a map with adjacent channels holds of a thread's channel, `steps` of a tile and zeros after them.
DEVICE void read_steps(uint32 (&raw)[T], const uint16 *from, int step, int steps) {
#pragma unroll
    for (int t = 0; t < T; t++) raw[t] = t < steps ? *(const uint16 *)((const char *)from + (long long)t * (2 * step)) : 0u;
}

// delta and dL/dy before the gate, of a thread's tile.
DEVICE void open_tile(float (&step)[T], float (&grad)[T], const uint16 *delta_row, const uint16 *z_row, float bias) {
    load_row(step, delta_row);
#pragma unroll
    for (int t = 0; t < T; t++) step[t] = step_of(step[t], bias);
    if (!HAS_Z) return;
    float z[T];
    load_row(z, z_row);
#pragma unroll
    for (int t = 0; t < T; t++) grad[t] *= silu(z[t]);
}

#if SUMMARY
DEVICE void walk_states(Shared &shared, const float (&step)[T], const float (&grad)[T], int own) {
#pragma unroll 4
    for (int n = 0; n < N; n++) {
        const float decay = shared.A[n][own];
        float carry = shared.carry[n][own];
#pragma unroll
        for (int t = T - 4; t >= 0; t -= 4) {
            float c[4];
            load_four(c, &shared.C[n][t]);
#pragma unroll
            for (int i = 3; i >= 0; i--) carry = exp2_fast(step[t + i] * decay) * (grad[t + i] * c[i] + carry);
        }
        shared.carry[n][own] = carry;
    }
}
#else
// For every state: adds up g B (`through_b`), the gradient of delta through the decay (`through_a`), and y without D u. B came times ln(2).
// A state that was read makes room for that of the tile before, which comes from `before` while this tile is walked.
DEVICE void walk_states(
    Shared &shared, float (&through_b)[T], float (&through_a)[T], float (&y)[T], const float (&step)[T], const float (&input)[T],
    const float *before, int stride, bool more, int own) {
    const int lane = own % 32;
#pragma unroll 1
    for (int n = 0; n < N; n++) {
        const float decay = shared.A[n][own], slow = decay * LN2, start = shared.states[n][own];
        float carry = shared.carry[n][own], dA = 0.f, h = start;
        float a[T], hs[T];
#pragma unroll
        for (int t = 0; t < T; t += 4) {
            float b[4];
            load_four(b, &shared.B[n][t]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[t + i] = exp2_fast(step[t + i] * decay);
                hs[t + i] = h = a[t + i] * h + input[t + i] * b[i];
            }
        }
        if (more) copy_word(&shared.states[n][own], before, true);
        before += stride;
        ChannelSums sums;
        sums.clear();
        float columns[8], after_b = 0.f, after_c = 0.f;
        load_four(columns, shared.columns[lane / 4]);
        load_four(columns + 4, shared.columns[lane / 4] + 4);
#pragma unroll
        for (int t = T - 4; t >= 0; t -= 4) {
            float b[4], c[4], grad[4];
            load_four(grad, &shared.grad[own][t]);
            load_four(b, &shared.B[n][t]);
            load_four(c, &shared.C[n][t]);
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                const int s = t + i;
                const float g = grad[i] * c[i] + carry;
                carry = a[s] * g;
                through_b[s] += g * b[i];
                const float change = carry * (s ? hs[s - 1] : start);
                dA += change * step[s];
                through_a[s] += change * slow;
                if (HAS_Z) y[s] += hs[s] * c[i];
                const float for_b = g * input[s], for_c = grad[i] * hs[s];
                if (s % 2) {
                    after_b = for_b;
                    after_c = for_c;
                } else {
                    sums.add(s + 1, after_b, after_c, for_b, for_c, columns[s % 8], columns[(s + 1) % 8]);
                }
            }
        }
        shared.carry[n][own] = carry;
        shared.dA[n][own] += dA;
        sums.write(shared.sums[own / 32][n], lane);
    }
}

// The block's sums of a tile, to parts (2, batch, groups, N, length) of dB and dC; a lane has always the same of the two and the same step.
DEVICE void store_sums(float *parts, long long part, const Shared &shared, int length, int steps, int thread) {
    const int lane = thread % (2 * T), t = lane % T;
    const bool of_c = lane >= T;
    parts += (of_c ? part : 0) + thread / (2 * T) * length + t;
#pragma unroll
    for (int i = 0; i < (N + WARPS - 1) / WARPS; i++) {
        const int n = thread / (2 * T) + i * WARPS;
        if (t >= steps || n >= N) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += shared.sums[w][n][lane];
        *(float *)((char *)parts + (long long)i * (4 * WARPS * length)) = of_c ? sum : sum * LN2;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sequence_backward(
    const uint16 *u, const uint16 *delta, const uint16 *z, const uint16 *B, const uint16 *C, const float *A, const float *D,
    const float *bias, const uint16 *dy, const float *states, uint16 *du, uint16 *ddelta, uint16 *dz, float *parts, float *dA, float *dD,
    float *dbias, float *carry, float *totals, int length, int channels, int groups, int tiles, int tiles_per_split, int splits,
    int u_batch, int u_row, int delta_batch, int delta_row, int z_batch, int z_row, int B_batch, int B_group, int B_row, int C_batch,
    int C_group, int C_row, int dy_batch, int dy_step, int batch, int sums_row) {
    SHARED(shared);
    const Work work = work_of(channels, groups, splits);
    const int thread = threadIdx.x, own = thread;
    const bool real = FULL || own < work.left;
    const int dim = groups * channels, c = work.k * channels + work.first_channel;  // the block's first channel of all
    const int begin = work.split * tiles_per_split;
    const int end = begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles;
    const long long path = (long long)work.batch * groups + work.k;

    u = share(u + (long long)work.batch * u_batch + (long long)c * u_row, u_row, thread);
    delta = share(delta + (long long)work.batch * delta_batch + (long long)c * delta_row, delta_row, thread);
    if (HAS_Z) z = share(z + (long long)work.batch * z_batch + (long long)c * z_row, z_row, thread);
    B = share(B + (long long)work.batch * B_batch + (long long)work.k * B_group, B_row, thread);
    C = share(C + (long long)work.batch * C_batch + (long long)work.k * C_group, C_row, thread);
    dy += (long long)work.batch * dy_batch + c + own;
    states += path * tiles * N * channels + work.first_channel + own;
    carry += (path * splits + work.split) * N * channels + work.first_channel + own;

    load_decay(shared.A, A + (long long)c * N, work.left, thread);
#pragma unroll
    for (int n = 0; n < N; n++) {
        shared.carry[n][own] = !SUMMARY && work.split + 1 < splits && real ? carry[n * channels] : 0.f;
#if !SUMMARY
        shared.dA[n][own] = 0.f;
        copy_word(&shared.states[n][own], states + ((long long)(end - 1) * N + n) * channels, real);
#endif
    }
#if !SUMMARY
    if (thread < 32)
        for (int i = thread % 4; i < 8; i += 4) shared.columns[thread / 4][i ^ 1] = thread / 4 == i ? 1.f : 0.f;
#endif
    const float own_bias = HAS_BIAS && real ? bias[c + own] * LOG2E : 0.f;
#if SUMMARY
    float total = 0.f;
#else
    const float skip = HAS_D && real ? D[c + own] : 0.f;
    float sum_D = 0.f, sum_bias = 0.f;
    const int block = work.first_channel / CHANNELS;
    const long long part = (long long)batch * groups * N * length;
    parts += 2 * block * part + path * N * length;
    const long long image = (long long)work.batch * length * dim + c + own;
    du += image, ddelta += image, dz += image;
#endif

    for (int tile = end - 1; tile >= begin; tile--) {
        const int first_step = tile * T;
        const int steps = length - first_step < T ? length - first_step : T;
        __syncthreads();  // the last tile's sums are stored
        const int read = existing(first_step + thread % T, length);
        // every read is on its way before the first write waits for one
        uint32 raw_delta[T], raw_z[T], raw_C[MATRIX_READS];
        read_rows<FULL>(raw_delta, delta + read, delta_row, work.left, thread);
        if (HAS_Z) read_rows<FULL>(raw_z, z + read, z_row, work.left, thread);
        read_matrix(raw_C, C + read, C_row, thread);
#if !SUMMARY
        uint32 raw_u[T], raw_B[MATRIX_READS];
        read_rows<FULL>(raw_u, u + read, u_row, work.left, thread);
        read_matrix(raw_B, B + read, B_row, thread);
#endif
        uint32 raw_dy[T];
        const uint16 *grads = dy + (long long)first_step * dy_step;
        read_steps(raw_dy, grads, dy_step, real ? steps : 0);
        write_rows(shared.delta, raw_delta, thread);
        if (HAS_Z) write_rows(shared.z, raw_z, thread);
        write_matrix(shared.C, raw_C, 1.f, thread);
#if !SUMMARY
        write_rows(shared.u, raw_u, thread);
        write_matrix(shared.B, raw_B, LN2, thread);
        wait_copies();  // of states
#endif
        float step[T], grad[T];
#pragma unroll
        for (int t = 0; t < T; t++) grad[t] = to_float((uint16)raw_dy[t]);
        __syncthreads();
        open_tile(step, grad, shared.delta[own], shared.z[own], own_bias);
#if SUMMARY
#pragma unroll
        for (int t = 0; t < T; t++) total += t < steps ? step[t] : 0.f;
        walk_states(shared, step, grad, own);
#else
        float input[T], through_b[T], through_a[T], y[T];
        load_row(input, shared.u[own]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            input[t] *= step[t];
            shared.grad[own][t] = grad[t];  // read by this thread alone: registers are short
            through_b[t] = through_a[t] = y[t] = 0.f;
        }
        walk_states(
            shared, through_b, through_a, y, step, input, states + (long long)(tile - 1) * N * channels, channels,
            real && tile > begin, own);
        if (HAS_Z) read_steps(raw_dy, afresh(grads), dy_step, real ? steps : 0);  // again: registers are short
        float value[T], v[T], gate[T];
        char *const to_du = (char *)(du + (long long)first_step * dim), *const to_dz = (char *)(dz + (long long)first_step * dim);
        char *const to_ddelta = (char *)(ddelta + (long long)first_step * dim);
        load_row(value, shared.u[own]);
        load_row(v, shared.delta[own]);
        if (HAS_Z) load_row(gate, shared.z[own]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            float slope = LOG2E;
            if (SOFTPLUS) {
                const float full = v[t] * LOG2E + own_bias, e = exp2_fast(-fabsf(full));
                slope = reciprocal(1.f + e) * (full > 0.f ? LOG2E : e * LOG2E);
            }
            const float change = (through_b[t] * value[t] + through_a[t]) * slope;
            const float grad = shared.grad[own][t];
            sum_D += grad * value[t];
            sum_bias += change;
            if (!real || t >= steps) continue;
            const long long at = (long long)t * (2 * dim);
            *(uint16 *)(to_du + at) = to_map(through_b[t] * step[t] + skip * grad);
            *(uint16 *)(to_ddelta + at) = to_map(change);
            if (HAS_Z) {
                const float open = reciprocal(1.f + exp2_fast(gate[t] * -LOG2E));
                const float out = to_float((uint16)raw_dy[t]);
                *(uint16 *)(to_dz + at) = to_map(out * (y[t] + skip * value[t]) * open * (1.f + gate[t] * (1.f - open)));
            }
        }
        __syncthreads();
        store_sums(parts + first_step, part, shared, length, steps, thread);
#endif
    }
    if (!real) return;
#if SUMMARY
    totals[(path * splits + work.split) * channels + work.first_channel + own] = total * LN2;
#pragma unroll
    for (int n = 0; n < N; n++) carry[n * channels] = shared.carry[n][own];
#else
    const long long row = (long long)(work.batch * splits + work.split) * sums_row + c + own;
    if (HAS_D) dD[row] = sum_D;
    if (HAS_BIAS) dbias[row] = sum_bias;
    dA += row - (c + own) + (long long)(c + own) * N;
#pragma unroll
    for (int n = 0; n < N; n++) dA[n] = shared.dA[n][own] * LN2;
#endif
}
