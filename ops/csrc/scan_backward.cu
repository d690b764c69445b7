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

// For the 32 channels of a warp: adds dt[t] dv[t] over the steps of a tile to the weight's gradient `sum`, dv as the sum of two 16-bit
// numbers, and turns steps[t][c] = dv into steps[t][r] = sum over c of dv weight times log2(e), both rounded to 16 bits.
DEVICE void through_low_rank(float4 (&sum)[2][RANK8 / 8][32], float *steps, const Rows &rows, const Weight &weight, int lane) {
    const int g = lane / 4, q = lane % 4;
    float v[2][2][4];  // channels 16 m + g and 8 more; steps q, q + 4, q + 8, q + 12
#pragma unroll
    for (int i = 0; i < 16; i++) v[i / 8][i / 4 % 2][i % 4] = steps[(q + i % 4 * 4) * STEP_ROW + 16 * (i / 8) + 8 * (i / 4 % 2) + g];
    float up = 1.f, down = 1.f;
    if (!BF16) {  // float16 has no room for a gradient's range: the largest of the tile becomes a number from 1 to 2
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < 16; i++) most = fmaxf(most, fabsf(v[i / 8][i / 4 % 2][i % 4]));
        const uint32 power = power_of(from_bits(warp_max(bits_of(most))));
        up = from_bits(0x7f000000u - power);
        down = from_bits(power);
    }
    uint32 high[2][4], low[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {  // the first operand has its steps in the order 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, ...
        const float *pair = v[i / 4][i % 2] + i / 2 % 2 * 2;
        const float first = pair[0] * up, second = pair[1] * up;
        high[i / 4][i % 4] = to_maps(first, second);
        const float2 taken = to_floats(high[i / 4][i % 4]);
        low[i / 4][i % 4] = to_maps(first - taken.x, second - taken.y);
    }
    const uint16 *dt = rows.row[lane / 8 % 2 * 8 + lane % 2 * 4 + lane % 8 / 2];
#pragma unroll
    for (int n = 0; n < RANK8 / 8; n++) {
        uint32 b[2];
        load_transposed(b, dt + 8 * n);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float d[4] = {0.f, 0.f, 0.f, 0.f};
            multiply_add(d, low[m][0], low[m][1], low[m][2], low[m][3], b[0], b[1]);
            multiply_add(d, high[m][0], high[m][1], high[m][2], high[m][3], b[0], b[1]);
            float4 &to = sum[m][n][lane];
            to = {to.x + d[0] * down, to.y + d[1] * down, to.z + d[2] * down, to.w + d[3] * down};
        }
    }
    uint32 a[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 pair = *(const float2 *)(steps + (g + i % 2 * 8) * STEP_ROW + 16 * (i / 4) + i / 2 % 2 * 8 + 2 * q);
        a[i / 4][i % 4] = to_maps(pair.x * up, pair.y * up);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < RANK8 / 8; n++) {
        uint32 b[4];
        load_transposed(b, &weight.w[0][lane][8 * n]);
        float d[4] = {0.f, 0.f, 0.f, 0.f};
        multiply_add(d, a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
        multiply_add(d, a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
        float2 *at = (float2 *)(steps + g * STEP_ROW + 8 * n + 2 * q);
        at[0] = {d[0] * down, d[1] * down};
        at[4 * STEP_ROW] = {d[2] * down, d[3] * down};
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
                if (c < channels && r < RANK) out[(long long)c * RANK + r] = d[i] * LOG2E;
            }
        }
}

// The gradient of a tile's rows of dt | B | C, added up over the warps of the block; B's came times log2(e).
DEVICE void store_rows(Row *drows, const Own (&own)[WARPS], const float (&sums)[WARPS][2 * T], const Places &places, int thread) {
    const int t = thread / SHARE;
    if (!(places.inside >> t & 1)) return;
    drows += (long long)places.position(t) * (PATH_COUNT * FIELDS);
#pragma unroll
    for (int i = 0; i < (FIELDS + SHARE - 1) / SHARE; i++) {
        const int field = thread % SHARE + i * SHARE;
        if ((i + 1) * SHARE <= FIELDS || field < FIELDS) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                sum += (i + 1) * SHARE <= RANK || field < RANK ? own[w].steps[t * STEP_ROW + field] : sums[w][(field - RANK) * T + t];
            drows[field] = to_row(field == RANK ? sum * LN2 : sum);
        }
    }
}

struct Sums {
    float A, D, bias;  // A's times log2(e), the bias's over log2(e)
};

// Walk the first STEPS steps of a tile down from the state `start` and up again; leaves dv over log2(e) in own.steps and writes dx.
template <int STEPS>
DEVICE void walk(
    float &carry, Sums &sums, float *channels_out, Own &own, float start, const uint16 *values, const uint16 *grads, float decay, float skip,
    uint16 *dx, uint16 *scales, const Places &places, int channels, int left, int lane) {
    float a[T][1], delta[T], slope[T];  // delta times log2(e), and so B comes times ln(2)
    float h = start;
    float *steps = own.steps + lane;
#pragma unroll
    for (int t = 0; t < STEPS; t++) {
        const float v = steps[t * STEP_ROW];
        float u;
        delta[t] = SOFTPLUS ? softplus<5>(v, u) : v;
        slope[t] = SOFTPLUS ? reciprocal(1.f + u) * (v > 0.f ? 1.f : u) : 1.f;
        a[t][0] = exp2_fast(delta[t] * decay);
        h = a[t][0] * h + delta[t] * to_float(values[t * WIDTH]) * own.B(t);
        steps[t * STEP_ROW] = h;
    }
    const float slow = decay * LN2;
    ChannelSums channel_sums;
    channel_sums.clear();
    float sum_A = 0.f, after_b = 0.f, after_c = 0.f;
#pragma unroll
    for (int t = STEPS - 1; t >= 0; t--) {
        const float value = to_float(values[t * WIDTH]), grad = to_float(grads[t * WIDTH]);
        const float g = grad * own.C(t) + carry;
        carry = a[t][0] * g;
        const float through_a = carry * (t ? steps[(t - 1) * STEP_ROW] : start);
        sum_A += through_a * delta[t];
        const float weighted = g * value;
        const float for_b = weighted * delta[t], for_c = grad * steps[t * STEP_ROW];
        if (t % 2) {
            after_b = for_b;
            after_c = for_c;
        } else {
            channel_sums.add(t + 1, after_b, after_c, for_b, for_c, lane);
        }
        sums.D += grad * value;
        const float change = (weighted * own.B(t) + through_a * slow) * slope[t];
        sums.bias += change;
        steps[t * STEP_ROW] = change;
        a[t][0] = g * own.B(t) * delta[t] + skip * grad;  // dx
    }
    sums.A += sum_A;
#pragma unroll
    for (int t = STEPS; t < T; t++) steps[t * STEP_ROW] = 0.f;
    store_tile<STEPS>(dx, scales, a, places, channels, left);
    channel_sums.write(channels_out, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(
    const uint16 *dy, const uint16 *x, const uint16 *projection, const float *A, const float *D, const float *dt_weight,
    const float *dt_bias, const float *states, uint16 *dx, uint16 *scales, Row *drows, float *dA, float *dD, float *dweight, float *dbias,
    int height, int width, int channels, int tiles, int batch, int images_per_block, int dy_image, int dy_path, int dy_position,
    int x_image, int x_path, int x_position, int projection_image, int projection_path, int projection_position, int sums_row) {
    constexpr int K = PATH_COUNT;
    SHARED(shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int blocks = (channels + WIDTH - 1) / WIDTH;
    const int block = blockIdx.x % blocks, k = blockIdx.x / blocks % K, group = blockIdx.x / blocks / K;
    const int first = group * images_per_block;
    const int count = (batch - first < images_per_block ? batch - first : images_per_block) * tiles;
    const int c = block * WIDTH + thread, in_block = channels - block * WIDTH, left = channels - c;
    const bool real = left > 0;  // an idle thread reads zeros and stores nothing
    const int own_channel = real ? c : channels - 1;
    const Map map = map_of(k, height, width);
    const int last = tiles - 1;

    dy += (long long)first * dy_image + (long long)k * dy_path + block * WIDTH;
    x += (long long)first * x_image + (long long)k * x_path + block * WIDTH;
    projection += (long long)first * projection_image + (long long)k * projection_path;
    dx += ((long long)first * K + k) * height * width * channels + own_channel;
    states += (((long long)first * K + k) * tiles + last) * channels + own_channel;
    scales += (((long long)first * K + k) * tiles + last) * channels + own_channel;
    drows += (((long long)block * batch + first) * height * width * K + k) * FIELDS;
    load_weight(
        shared.weights[warp], dt_weight + (long long)k * channels * RANK, dt_bias + k * channels, block * WIDTH + 32 * warp, channels, lane);
    const float decay = A[k * channels + own_channel];
    const float skip = HAS_D ? D[k * channels + own_channel] : 0.f;

    clear_rows(shared.rows, thread);
    int tile = last, before = tile > 0 ? tile - 1 : last, second = before > 0 ? before - 1 : last;
    if (warp == 0) {
        write_places(shared.places[0], map, tile, lane);
        write_places(shared.places[1], map, before, lane);
    }
    block_barrier();
    copy_tile(shared.x[0], x, x_position, in_block, shared.places[0], thread);
    copy_tile(shared.dy[0], dy, dy_position, in_block, shared.places[0], thread);
    copy_rows(shared.rows[0], projection, projection_position, shared.places[0], thread);
    float next_state = *states;
    wait_copies();

    float carry = 0.f;
    Sums sums = {0.f, 0.f, 0.f};
    float4(&weight_gradient)[2][RANK8 / 8][32] = shared.weight_gradients[warp];
#pragma unroll
    for (int i = 0; i < 2 * RANK8 / 8; i++) weight_gradient[i % 2][i / 2][lane] = {0.f, 0.f, 0.f, 0.f};
    block_barrier();
    for (int i = 0; i < count; i++) {
        Own &own = shared.own[i % (1 + APART)][warp];
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
            const Places &next = shared.places[(i + 1) % PLACES];
            copy_tile(shared.x[(i + 1) % 2], x, x_position, in_block, next, thread);
            copy_tile(shared.dy[(i + 1) % 2], dy, dy_position, in_block, next, thread);
            copy_rows(shared.rows[(i + 1) % 2], projection, projection_position, next, thread);
        }
        if (warp == 0) write_places(shared.places[(i + 2) % PLACES], map, second, lane);
        const Rows &rows = shared.rows[i % 2];
        const uint16 *values = shared.x[i % 2] + thread, *grads = shared.dy[i % 2] + thread;
        const Places &here = shared.places[i % PLACES];
        expand(own, rows, shared.weights[warp], lane);
        __syncwarp();
        if (here.ends())  // steps after the end of the path: nothing decays there, nor overflows
#pragma unroll 1
            for (int t = 0; t < T; t++)
                if (!here.exists(t)) own.steps[t * STEP_ROW + lane] = SOFTPLUS ? -1e30f : 0.f;
        float *in_sums = shared.sums[i % (1 + APART)][warp];
        if (LAST < T && tile == last)
            walk<LAST>(carry, sums, in_sums, own, start, values, grads, decay, skip, dx, scales, here, channels, left, lane);
        else walk<T>(carry, sums, in_sums, own, start, values, grads, decay, skip, dx, scales, here, channels, left, lane);
        __syncwarp();
        through_low_rank(weight_gradient, own.steps, rows, shared.weights[warp], lane);
        wait_copies();
        block_barrier();  // the next tile is here
        store_rows(drows, shared.own[i % (1 + APART)], shared.sums[i % (1 + APART)], here, thread);

        scales -= channels;
        if (tile == 0) {  // the next image
            carry = 0.f;
            dx += (long long)K * height * width * channels;
            drows += (long long)height * width * K * FIELDS;
            scales += (long long)(K + 1) * tiles * channels;
        }
        tile = before;
        before = second;
        second = before > 0 ? before - 1 : last;
        if (!APART) block_barrier();  // what this tile left in shared memory is read
    }
    const long long row = (long long)group * sums_row;
    store_weight(dweight + row + (long long)k * channels * RANK, weight_gradient, block * WIDTH + 32 * warp, channels, lane);
    if (real) {
        dA[row + k * channels + c] = sums.A * LN2;
        if (HAS_D) dD[row + k * channels + c] = sums.D;
        if (HAS_BIAS) dbias[row + k * channels + c] = sums.bias * LOG2E;
    }
}
