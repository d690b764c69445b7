// The backward scan over mamba's layout.
//
// With g = dL/dh: g[t] = C[t] dy[t] + a[t+1] g[t+1]. Every tile is walked twice for each state, down, to recompute what it was from the
// one saved at the tile's start, and up; between tiles the gradient that comes back, and the sum for dA, rest in shared memory. A tile's
// state and its u, delta and z come while the tile after it is worked on, with COPIED its dy, B and C as well. Sums over channels (dB, dC)
// are complete for a block, sums over steps (dA, dD, dbias) for an image and split: the launcher adds up the rest in a fixed order.
//
//   COPIED  0 or 1; 1 takes more shared memory, and a dy of which two channels, side by side, are four bytes from a multiple of four on

constexpr int PIECES = T / 8 + 1, ROW = 8 * PIECES;  // of a row in shared memory; lanes that read their own rows' do not share a bank

struct alignas(16) Shared {
    uint16 delta[CHANNELS][ROW], z[CHANNELS][ROW], dy[COPIED ? T : 1][CHANNELS];
    uint16 raw[COPIED ? (SUMMARY ? N : 2 * N) : 1][ROW];  // rows of C and then of B, as copied
    float C[N][MATRIX_ROW];
    float A[N][CHANNELS], carry[N][CHANNELS];
#if !SUMMARY
    uint16 u[CHANNELS][ROW];
    float B[N][MATRIX_ROW];
    float dA[N][CHANNELS], states[N][CHANNELS];
    float grad[T / 4][CHANNELS][4];
    float sums[WARPS][N][2 * T];
    float columns[8][12];  // of ChannelSums, by lane / 4: the identity, with columns in the pairs that a product takes
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "kernels/sequence.py asks for too little shared memory");

// Start copying a piece of a row, of which `left` numbers exist from a tile on, or all three of a thread's own; and read those.
DEVICE void copy_piece(uint16 *row, const uint16 *from, int left, int piece) {
    const int skip = misplaced(from);
    copy_bytes(row + 8 * piece, from - skip + 8 * piece, left >= ROW ? 16 : bytes_of(left + skip - 8 * piece));
}

DEVICE void copy_row(uint16 *row, const uint16 *from, int left) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) copy_piece(row, from, left, i);
}

DEVICE void convert(float (&v)[T], const uint32 (&pairs)[T / 2]) {
#pragma unroll
    for (int i = 0; i < T / 2; i++) {
        const float2 both = to_floats(pairs[i]);
        v[2 * i] = both.x, v[2 * i + 1] = both.y;
    }
}

// The first time it is read, a row moves to its first two pieces, where it is read again.
DEVICE void load_row(float (&v)[T], uint16 *row, int skip) {
    uint32 pairs[T / 2];
    load_pairs(pairs, row, row + 8, row + 16, skip);
    if (!SUMMARY) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(int4 *)(row + 8 * i) = {(int)pairs[4 * i], (int)pairs[4 * i + 1], (int)pairs[4 * i + 2], (int)pairs[4 * i + 3]};
    }
    convert(v, pairs);
}

DEVICE void load_moved(float (&v)[T], const uint16 *row) {
    uint32 pairs[T / 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int4 words = *(const int4 *)(row + 8 * i);
        pairs[4 * i] = words.x, pairs[4 * i + 1] = words.y, pairs[4 * i + 2] = words.z, pairs[4 * i + 3] = words.w;
    }
    convert(v, pairs);
}

// What a map with adjacent channels holds of a thread's channel, `steps` of a tile and zeros after them. Of a pair of channels, which
// threads of a warp share, one thread copies the even steps, the other the odd ones.
DEVICE void copy_steps(uint16 (*to)[CHANNELS], const uint16 *from, int step, int steps, int thread) {
    const int odd = afresh(thread) % 2;
    from += (odd ? step : 0) - odd;
#pragma unroll
    for (int t = 0; t < T; t += 2) {
        copy_word(&to[t + odd][thread - odd], from, t + odd < steps);
        from += 2 * (long long)step;
    }
}

DEVICE void load_steps(float (&v)[T], const uint16 (*from)[CHANNELS], const uint16 *map, int step, int steps, int thread) {
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (COPIED) v[t] = to_float(from[t][thread]);
        else v[t] = t < steps ? to_float(*(const uint16 *)((const char *)map + (long long)t * (2 * step))) : 0.f;
    }
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
            load_four(grad, shared.grad[t / 4][own]);
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

    // Where a channel or a state variable has its row, worked out whenever it is wanted: what the compiler would keep, registers are short of.
    auto image = [&]() INLINE { return afresh(work.batch); };
    auto row_of = [&](const uint16 *map, int batch_stride, int row_stride) INLINE {
        return map + (long long)image() * batch_stride + (long long)(c + afresh(own)) * row_stride;
    };
    auto at_step = [&](int step) INLINE { return ((long long)image() * length + step) * dim + c + afresh(own); };  // of du, ddelta, dz
    auto states_of = [&](int tile) INLINE {
        return states + (((long long)image() * groups + work.k) * tiles + tile) * N * channels + work.first_channel + afresh(own);
    };
    carry += (path * splits + work.split) * N * channels + work.first_channel + own;

    load_decay(shared.A, A + (long long)c * N, work.left, thread);
#pragma unroll
    for (int n = 0; n < N; n++) {
        shared.carry[n][own] = !SUMMARY && work.split + 1 < splits && real ? carry[n * channels] : 0.f;
#if !SUMMARY
        shared.dA[n][own] = 0.f;
        copy_word(&shared.states[n][own], states_of(end - 1) + n * channels, real);
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
#endif

    auto grads_of = [&](int tile) INLINE {
        return dy + (long long)image() * dy_batch + (long long)tile * T * dy_step + c + afresh(own);
    };
    auto matrix_row = [&](int row) INLINE {
        const bool of_C = row < N;
        return (of_C ? C : B) + (long long)image() * (of_C ? C_batch : B_batch) + (long long)work.k * (of_C ? C_group : B_group)
               + (long long)(of_C ? row : row - N) * (of_C ? C_row : B_row);
    };
    auto fetch = [&](int tile) INLINE {  // start copying what a tile needs, but for its states
        const int first_step = tile * T, left = length - first_step, own_left = real ? left : -ROW;  // none of a piece either
        copy_row(shared.delta[own], row_of(delta, delta_batch, delta_row) + first_step, own_left);
        if (HAS_Z) copy_row(shared.z[own], row_of(z, z_batch, z_row) + first_step, own_left);
#if !SUMMARY
        copy_row(shared.u[own], row_of(u, u_batch, u_row) + first_step, own_left);
#endif
        if (!COPIED) return;
        copy_steps(shared.dy, grads_of(tile), dy_step, own_left, thread);
#pragma unroll 1
        for (int e = afresh(thread); e < (SUMMARY ? N : 2 * N) * PIECES; e += THREADS)
            copy_piece(shared.raw[e / PIECES], matrix_row(e / PIECES) + first_step, left, e % PIECES);
    };
    auto write = [&](float (&to)[N][MATRIX_ROW], int first_row, float times, int step) INLINE {  // B or C of a tile
        uint32 numbers[MATRIX_READS];
#pragma unroll
        for (int i = 0; i < MATRIX_READS; i++) {
            const int row = first_row + thread / T + i * ROWS;
            if (N * T % READERS && row >= first_row + N) continue;
            const uint16 *from = matrix_row(row);
            numbers[i] = COPIED ? shared.raw[row][misplaced(from) + thread % T] : from[existing(step + thread % T, length)];
        }
        write_matrix(to, numbers, times, thread);
    };
    fetch(end - 1);
    for (int tile = end - 1; tile >= begin; tile--) {
        const int first_step = tile * T;
        const int steps = length - first_step < T ? length - first_step : T;
        wait_copies();
        __syncthreads();  // the last tile's sums are stored
        write(shared.C, 0, 1.f, first_step);
#if !SUMMARY
        write(shared.B, N, LN2, first_step);
#endif
        __syncthreads();
        float step[T], grad[T];
        load_steps(grad, shared.dy, grads_of(tile), dy_step, real ? steps : 0, thread);
        auto load = [&](float (&v)[T], uint16 *row, const uint16 *map, int batch_stride, int row_stride) INLINE {
            load_row(v, row, misplaced(row_of(map, batch_stride, row_stride)));
        };
        load(step, shared.delta[own], delta, delta_batch, delta_row);
#pragma unroll
        for (int t = 0; t < T; t++) step[t] = step_of(step[t], own_bias);
        if (HAS_Z) {
            float gate[T];
            load(gate, shared.z[own], z, z_batch, z_row);
#pragma unroll
            for (int t = 0; t < T; t++) grad[t] *= silu(gate[t]);
        }
#if SUMMARY
        __syncwarp();  // dy is read
        if (tile > begin) fetch(tile - 1);
#pragma unroll
        for (int t = 0; t < T; t++) total += t < steps ? step[t] : 0.f;
        walk_states(shared, step, grad, own);
#else
        float input[T], through_b[T], through_a[T], y[T];
        load(input, shared.u[own], u, u_batch, u_row);
#pragma unroll
        for (int t = 0; t < T; t++) {
            input[t] *= step[t];
            shared.grad[t / 4][own][t % 4] = grad[t];  // read by this thread alone: registers are short
            through_b[t] = through_a[t] = y[t] = 0.f;
        }
        walk_states(
            shared, through_b, through_a, y, step, input, states_of(tile - 1), channels,
            real && tile > begin, own);
        float value[T], v[T], gate[T], gated[T];  // read again: registers are short
        if (HAS_Z) load_steps(gated, shared.dy, grads_of(tile), dy_step, real ? steps : 0, thread);
        const long long to = at_step(first_step);
        char *const to_du = (char *)(du + to), *const to_ddelta = (char *)(ddelta + to), *const to_dz = (char *)(dz + to);
        load_moved(value, shared.u[own]);
        load_moved(v, shared.delta[own]);
        if (HAS_Z) load_moved(gate, shared.z[own]);
        __syncwarp();  // dy is read
        if (tile > begin) fetch(tile - 1);
#pragma unroll
        for (int t = 0; t < T; t++) {
            float slope = LOG2E;
            if (SOFTPLUS) {
                const float full = v[t] * LOG2E + own_bias, e = exp2_fast(-fabsf(full));
                slope = reciprocal(1.f + e) * (full > 0.f ? LOG2E : e * LOG2E);
            }
            const float change = (through_b[t] * value[t] + through_a[t]) * slope;
            const float grad = shared.grad[t / 4][own][t % 4];
            sum_D += grad * value[t];
            sum_bias += change;
            if (!real || t >= steps) continue;
            const long long at = (long long)t * (2 * dim);
            *(uint16 *)(to_du + at) = to_map(through_b[t] * step[t] + skip * grad);
            *(uint16 *)(to_ddelta + at) = to_map(change);
            if (HAS_Z) {
                const float open = reciprocal(1.f + exp2_fast(gate[t] * -LOG2E));
                *(uint16 *)(to_dz + at) = to_map(gated[t] * (y[t] + skip * value[t]) * open * (1.f + gate[t] * (1.f - open)));
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
