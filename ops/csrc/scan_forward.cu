// The forward scan with one state variable and a low-rank step, 16-bit maps.

// Walk the first STEPS steps of a tile from the states h, and write y.
template <int STEPS>
DEVICE void walk(
    float (&h)[EACH], const Own &own, const uint16 *values, const float (&decay)[EACH], const float (&skip)[EACH], uint16 *y, uint16 *scales,
    const Places &places, int channels, int left, int lane) {
    float out[T][EACH];
#pragma unroll
    for (int t = 0; t < STEPS; t++) {
        float delta[EACH], value[EACH], u;  // delta times log2(e), and so B comes times ln(2)
        load_each(delta, own.steps + t * STEP_ROW + EACH * lane);
        load_each(value, values + t * WIDTH);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (SOFTPLUS) delta[j] = softplus<5>(delta[j], u);
            h[j] = exp2_fast(delta[j] * decay[j]) * h[j] + delta[j] * value[j] * own.B(t);
            out[t][j] = h[j] * own.C(t) + skip[j] * value[j];
        }
    }
    store_tile<STEPS>(y, scales, out, places, channels, left);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(
    const uint16 *x, const uint16 *projection, const float *A, const float *D, const float *dt_weight, const float *dt_bias,
    uint16 *y, uint16 *scales, float *states, int height, int width, int channels, int tiles, int batch, int images_per_block,
    int x_image, int x_path, int x_position, int projection_image, int projection_path, int projection_position) {
    constexpr int K = PATH_COUNT;
    SHARED(shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int blocks = (channels + WIDTH - 1) / WIDTH;
    const int block = blockIdx.x % blocks, k = blockIdx.x / blocks % K;
    const int first = blockIdx.x / blocks / K * images_per_block;
    const int count = (batch - first < images_per_block ? batch - first : images_per_block) * tiles;
    const int in_block = SPAN * warp + EACH * lane, c = block * WIDTH + in_block;
    const int left = channels - c;  // a channel that is none reads zeros and stores nothing
    const Map map = map_of(k, height, width);

    x += (long long)first * x_image + (long long)k * x_path + block * WIDTH;
    projection += (long long)first * projection_image + (long long)k * projection_path;
    y += ((long long)first * K + k) * height * width * channels + c;
    states += ((long long)first * K + k) * tiles * channels + c;
    scales += ((long long)first * K + k) * tiles * channels + c;
    load_weight(
        shared.weights[warp], dt_weight + (long long)k * channels * RANK, dt_bias + k * channels, block * WIDTH + SPAN * warp, channels, lane);
    float decay[EACH], skip[EACH], h[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        decay[j] = left > j ? A[k * channels + c + j] : 0.f;
        skip[j] = HAS_D && left > j ? D[k * channels + c + j] : 0.f;
        h[j] = 0.f;
    }
    Own &own = shared.own[0][warp];

    clear_rows(shared.rows, thread);
    int tile = 0, after = tiles > 1 ? 1 : 0, second = after + 1 < tiles ? after + 1 : 0;
    if (warp == 0) {
        write_places(shared.places[0], map, tile, lane);
        write_places(shared.places[1], map, after, lane);
    }
    block_barrier();
    copy_tile(shared.x[0], x, x_position, channels - block * WIDTH, shared.places[0], thread);
    copy_rows(shared.rows[0], projection, projection_position, shared.places[0], thread);
    wait_copies();
    block_barrier();

    for (int i = 0; i < count; i++) {
        if (i + 1 < count) {
            if (after == 0) {
                x += x_image;
                projection += projection_image;
            }
            const Places &next = shared.places[(i + 1) % PLACES];
            copy_tile(shared.x[(i + 1) % 2], x, x_position, channels - block * WIDTH, next, thread);
            copy_rows(shared.rows[(i + 1) % 2], projection, projection_position, next, thread);
        }
        if (warp == 0) write_places(shared.places[(i + 2) % PLACES], map, second, lane);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (left > j) states[j] = h[j];

        expand(own, shared.rows[i % 2], shared.weights[warp], lane);
        __syncwarp();
        const uint16 *values = shared.x[i % 2] + in_block;
        const Places &here = shared.places[i % PLACES];
        if (LAST < T && tile == tiles - 1) walk<LAST>(h, own, values, decay, skip, y, scales, here, channels, left, lane);
        else walk<T>(h, own, values, decay, skip, y, scales, here, channels, left, lane);
        wait_copies();
        block_barrier();

        tile = after;
        after = second;
        second = after + 1 < tiles ? after + 1 : 0;
        states += channels;
        scales += channels;
        if (tile == 0) {  // the next image
#pragma unroll
            for (int j = 0; j < EACH; j++) h[j] = 0.f;
            y += (long long)K * height * width * channels;
            states += (long long)(K - 1) * tiles * channels;
            scales += (long long)(K - 1) * tiles * channels;
        }
    }
}
