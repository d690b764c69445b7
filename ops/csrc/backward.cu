// The backward scan with one state variable and a low-rank step, 16-bit maps.
//
// With g = dL/dh: g[t] = C[t] dy[t] + a[t+1] g[t+1]. Every tile is walked twice: down, to recompute its states from the one saved at its
// start, and up. The gradient of the full step before softplus, dv, never leaves the chip: two products on tensor cores take it through the
// low-rank step. Sums over the channels (the gradient of dt | B | C) are complete where one block has them all, else the launcher adds up
// the blocks' in a fixed order; so it does with the blocks' sums over positions (dA, dD, dt_weight, dbias).

#if ROWS_F32
typedef float Row;
DEVICE Row to_row(float v) { return v; }
#else
typedef uint16 Row;
DEVICE Row to_row(float v) { return to_map(v); }
#endif

// For the 32 channels of a warp: adds dt[t] dv[t] over the steps of a tile to the weight's gradient `sum`, to float32 accuracy, and turns
// steps[t][c] = dv into steps[t][r] = sum over c of dv weight, times log2(e).
DEVICE void through_low_rank(float4 (&sum)[2][RANK8 / 8][32], float *steps, const Rows &rows, const Weight &weight, int lane) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float high[2][4], low[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float v = steps[(8 * i + q + j / 2 * 4) * STEP_ROW + 16 * m + g + j % 2 * 8];
                high[i][j] = tf32_part(v);
                low[i][j] = v - high[i][j];
            }
#pragma unroll
        for (int n = 0; n < RANK8 / 8; n++) {
            float4 &to = sum[m][n][lane];
            float d[4] = {to.x, to.y, to.z, to.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float *b = rows.dt + (8 * i + q) * DT_ROW + 8 * n + g;
                multiply_add(d, low[i][0], low[i][1], low[i][2], low[i][3], b[0], b[4 * DT_ROW]);
                multiply_add(d, high[i][0], high[i][1], high[i][2], high[i][3], b[0], b[4 * DT_ROW]);
            }
            to = {d[0], d[1], d[2], d[3]};
        }
    }
    float ddt[RANK8 / 8][4];
#pragma unroll
    for (int n = 0; n < RANK8 / 8; n++) ddt[n][0] = ddt[n][1] = ddt[n][2] = ddt[n][3] = 0.f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float *a = steps + g * STEP_ROW + 8 * j + q;
        const float a0 = a[0], a1 = a[8 * STEP_ROW], a2 = a[4], a3 = a[8 * STEP_ROW + 4];
#pragma unroll
        for (int n = 0; n < RANK8 / 8; n++) {  // the weight lies as the second operand of full_steps: its transpose is picked out
            const float *w = (const float *)weight.w[n][j] + 2 * (4 * q + g % 4) + g / 4;
            multiply_add(ddt[n], a0, a1, a2, a3, w[0], w[32]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < RANK8 / 8; n++) {
        float2 *at = (float2 *)(steps + g * STEP_ROW + 8 * n + 2 * q);
        at[0] = {ddt[n][0], ddt[n][1]};
        at[4 * STEP_ROW] = {ddt[n][2], ddt[n][3]};
    }
}

// The weight's gradient of a warp to (channels, RANK).
DEVICE void store_weight(float *out, const float4 (&sum)[2][RANK8 / 8][32], int first_channel, int channels, int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < RANK8 / 8; n++) {
            const float4 &from = sum[m][n][lane];
            const float d[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = first_channel + 16 * m + lane / 4 + i / 2 * 8, r = 8 * n + lane % 4 * 2 + i % 2;
                if (c < channels && r < RANK) out[(long long)c * RANK + r] = d[i];
            }
        }
}

// The gradient of a tile's rows of dt | B | C, added up over the warps of the block; dt and B came times log2(e).
DEVICE void store_rows(Row *drows, const Shared &shared, const Places &places, int thread) {
#pragma unroll
    for (int i = 0; i < READS; i++) {
        const int e = thread + i * THREADS;
        const int t = e / FIELDS, field = e % FIELDS;
        if (e < T * FIELDS && (places.inside >> t & 1)) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                sum += field < RANK ? shared.steps[w][t * STEP_ROW + field] : shared.sums[w][(field - RANK) * T + t];
            drows[(long long)places.position(t) * (PATH_COUNT * FIELDS) + field] = to_row(field <= RANK ? sum * LN2 : sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(
    const uint16 *dy, const uint16 *x, const uint16 *projection, const float *A, const float *D, const float *dt_weight,
    const float *dt_bias, const float *states, uint16 *dx, uint16 *scales, Row *drows, float *dA, float *dD, float *dweight, float *dbias,
    int height, int width, int channels, int tiles, int batch, int images_per_block, int dy_image, int dy_path, int dy_position,
    int x_image, int x_path, int x_position, int projection_image, int projection_path, int projection_position, int sums_row) {
    constexpr int K = PATH_COUNT;
    SHARED(shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int blocks = (channels + THREADS - 1) / THREADS;
    const int block = blockIdx.x % blocks, k = blockIdx.x / blocks % K, group = blockIdx.x / blocks / K;
    const int first = group * images_per_block;
    const int count = (batch - first < images_per_block ? batch - first : images_per_block) * tiles;
    const int c = block * THREADS + thread;
    const bool real = c < channels;  // an idle thread reads zeros and stores nothing
    const int own = real ? c : channels - 1, left = channels - block * THREADS;
    const Map map = map_of(k, height, width);
    const int last = tiles - 1;

    dy += (long long)first * dy_image + (long long)k * dy_path + block * THREADS;
    x += (long long)first * x_image + (long long)k * x_path + block * THREADS;
    projection += (long long)first * projection_image + (long long)k * projection_path;
    dx += ((long long)first * K + k) * height * width * channels + own;
    states += (((long long)first * K + k) * tiles + last) * channels + own;
    scales += (((long long)first * K + k) * tiles + last) * channels + own;
    drows += (((long long)block * batch + first) * height * width * K + k) * FIELDS;
    load_weight(
        shared.weights[warp], dt_weight + (long long)k * channels * RANK, dt_bias + k * channels, block * THREADS + 32 * warp, channels, lane);
    const float decay = A[k * channels + own], slow = decay * LN2;
    const float skip = HAS_D ? D[k * channels + own] : 0.f;
    float *steps = shared.steps[warp];

    clear_rows(shared.rows, thread);
    if (warp == 0) {
        write_places(shared.places[0], map, last, lane);
        write_places(shared.places[1], map, last > 0 ? last - 1 : last, lane);
    }
    __syncthreads();
    uint16 raw[READS];
    copy_tile(shared.x[0], x, x_position, left, shared.places[0], thread);
    copy_tile(shared.dy[0], dy, dy_position, left, shared.places[0], thread);
    read_rows(raw, projection, projection_position, shared.places[0], thread);
    float next_state = *states;
    write_rows(shared.rows[0], raw, thread);
    wait_copies();

    float carry = 0.f, sum_A = 0.f, sum_D = 0.f, sum_bias = 0.f;
    float4(&weight_gradient)[2][RANK8 / 8][32] = shared.weight_gradients[warp];
#pragma unroll
    for (int i = 0; i < 2 * RANK8 / 8; i++) weight_gradient[i % 2][i / 2][lane] = {0.f, 0.f, 0.f, 0.f};
    int tile = last;
    for (int i = 0; i < count; i++) {
        __syncthreads();  // the next tile is here, and what the last one left in shared memory is read
        const int before = tile > 0 ? tile - 1 : last;
        const float start = next_state;
        if (i + 1 < count) {
            states -= channels;
            if (tile == 0) {  // the next image
                dy += dy_image;
                x += x_image;
                projection += projection_image;
                states += (long long)(K + 1) * tiles * channels;
            }
            next_state = *states;
            copy_tile(shared.x[(i + 1) % 2], x, x_position, left, shared.places[(i + 1) % 4], thread);
            copy_tile(shared.dy[(i + 1) % 2], dy, dy_position, left, shared.places[(i + 1) % 4], thread);
            read_rows(raw, projection, projection_position, shared.places[(i + 1) % 4], thread);
        }
        const Rows &row = shared.rows[i % 2];
        const uint16 *values = shared.x[i % 2] + thread, *grads = shared.dy[i % 2] + thread;

        full_steps(steps, row, shared.weights[warp], lane);
        __syncwarp();
        float a[T], delta[T], slope[T];  // delta times log2(e), and so B comes times ln(2)
        float h = start;
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float v = steps[t * STEP_ROW + lane];
            float u;
            delta[t] = SOFTPLUS ? softplus(v, u) : v;
            slope[t] = SOFTPLUS ? reciprocal(1.f + u) * (v > 0.f ? LOG2E : u * LOG2E) : LOG2E;
            a[t] = exp2_fast(delta[t] * decay);
            h = a[t] * h + delta[t] * to_float(values[t * THREADS]) * row.B(t);
            steps[t * STEP_ROW + lane] = h;
        }
        ChannelSums channel_sums;
        channel_sums.clear();
        float sum_dA = 0.f, after_b = 0.f, after_c = 0.f;
#pragma unroll
        for (int t = T - 1; t >= 0; t--) {
            const float value = to_float(values[t * THREADS]), grad = to_float(grads[t * THREADS]);
            const float g = grad * row.C(t) + carry;
            carry = a[t] * g;
            const float through_b = g * row.B(t);
            const float through_a = carry * (t ? steps[(t - 1) * STEP_ROW + lane] : start);
            sum_dA += through_a * delta[t];
            const float for_b = g * (delta[t] * value), for_c = grad * steps[t * STEP_ROW + lane];
            if (t % 2) {
                after_b = for_b;
                after_c = for_c;
            } else {
                channel_sums.add(t + 1, after_b, after_c, for_b, for_c, lane);
            }
            sum_D += grad * value;
            const float change = (through_b * value + through_a * slow) * slope[t];
            sum_bias += change;
            steps[t * STEP_ROW + lane] = change;
            a[t] = through_b * delta[t] + skip * grad;  // dx
        }
        sum_A += sum_dA;
        const Places &here = shared.places[i % 4];
        store_tile(dx, scales, a, here, channels, real);
        channel_sums.write(shared.sums[warp], lane);
        __syncwarp();
        through_low_rank(weight_gradient, steps, row, shared.weights[warp], lane);
        write_rows(shared.rows[(i + 1) % 2], raw, thread);
        if (warp == 0) write_places(shared.places[(i + 2) % 4], map, before > 0 ? before - 1 : last, lane);
        wait_copies();
        __syncthreads();
        store_rows(drows, shared, here, thread);

        scales -= channels;
        if (tile == 0) {  // the next image
            carry = 0.f;
            dx += (long long)K * height * width * channels;
            drows += (long long)height * width * K * FIELDS;
            scales += (long long)(K + 1) * tiles * channels;
        }
        tile = before;
    }
    const long long row = (long long)group * sums_row;
    store_weight(dweight + row + (long long)k * channels * RANK, weight_gradient, block * THREADS + 32 * warp, channels, lane);
    if (real) {
        dA[row + k * channels + c] = sum_A * LN2;
        if (HAS_D) dD[row + k * channels + c] = sum_D;
        if (HAS_BIAS) dbias[row + k * channels + c] = sum_bias;
    }
}
