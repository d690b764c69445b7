// The forward scan with one state variable and a low-rank step, 16-bit maps.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(
    const uint16 *x, const uint16 *projection, const float *A, const float *D, const float *dt_weight, const float *dt_bias,
    uint16 *y, uint16 *scales, float *states, int height, int width, int channels, int tiles, int batch, int images_per_block,
    int x_image, int x_path, int x_position, int projection_image, int projection_path, int projection_position) {
    constexpr int K = PATH_COUNT;
    SHARED(shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int blocks = (channels + THREADS - 1) / THREADS;
    const int block = blockIdx.x % blocks, k = blockIdx.x / blocks % K;
    const int first = blockIdx.x / blocks / K * images_per_block;
    const int count = (batch - first < images_per_block ? batch - first : images_per_block) * tiles;
    const int c = block * THREADS + thread;
    const bool real = c < channels;  // an idle thread reads zeros and stores nothing
    const int own = real ? c : channels - 1, left = channels - block * THREADS;
    const Map map = map_of(k, height, width);

    x += (long long)first * x_image + (long long)k * x_path + block * THREADS;
    projection += (long long)first * projection_image + (long long)k * projection_path;
    y += ((long long)first * K + k) * height * width * channels + own;
    states += ((long long)first * K + k) * tiles * channels + own;
    scales += ((long long)first * K + k) * tiles * channels + own;
    load_weight(
        shared.weights[warp], dt_weight + (long long)k * channels * RANK, dt_bias + k * channels, block * THREADS + 32 * warp, channels, lane);
    const float decay = A[k * channels + own];
    const float skip = HAS_D ? D[k * channels + own] : 0.f;
    float *steps = shared.steps[warp];

    clear_rows(shared.rows, thread);
    if (warp == 0) {
        write_places(shared.places[0], map, 0, lane);
        write_places(shared.places[1], map, tiles > 1 ? 1 : 0, lane);
    }
    __syncthreads();
    uint16 raw[READS];
    copy_tile(shared.x[0], x, x_position, left, shared.places[0], thread);
    read_rows(raw, projection, projection_position, shared.places[0], thread);
    write_rows(shared.rows[0], raw, thread);
    wait_copies();
    __syncthreads();

    float h = 0.f;
    int tile = 0;
    for (int i = 0; i < count; i++) {
        const int after = tile + 1 < tiles ? tile + 1 : 0;
        if (i + 1 < count) {
            if (after == 0) {
                x += x_image;
                projection += projection_image;
            }
            copy_tile(shared.x[(i + 1) % 2], x, x_position, left, shared.places[(i + 1) % 4], thread);
            read_rows(raw, projection, projection_position, shared.places[(i + 1) % 4], thread);
        }
        const Rows &row = shared.rows[i % 2];
        const uint16 *values = shared.x[i % 2] + thread;
        if (real) *states = h;

        full_steps(steps, row, shared.weights[warp], lane);
        __syncwarp();
        float out[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            float delta = steps[t * STEP_ROW + lane], u;  // times log2(e), and so B comes times ln(2)
            if (SOFTPLUS) delta = softplus(delta, u);
            const float value = to_float(values[t * THREADS]);
            h = exp2_fast(delta * decay) * h + delta * value * row.B(t);
            out[t] = h * row.C(t) + skip * value;
        }
        store_tile(y, scales, out, shared.places[i % 4], channels, real);
        write_rows(shared.rows[(i + 1) % 2], raw, thread);
        if (warp == 0) write_places(shared.places[(i + 2) % 4], map, after + 1 < tiles ? after + 1 : 0, lane);
        wait_copies();
        __syncthreads();

        tile = after;
        states += channels;
        scales += channels;
        if (tile == 0) {  // the next image
            h = 0.f;
            y += (long long)K * height * width * channels;
            states += (long long)(K - 1) * tiles * channels;
            scales += (long long)(K - 1) * tiles * channels;
        }
    }
}
