// What the scans over mamba's layout, maps (batch, dim, length) with N state variables, share. Beside those of device.cuh they take the
// macros
//   N   states of a channel;  HAS_Z  0 or 1
//   FULL     1 where the channels of a group are a multiple of those of a block
//   LANES    threads that share a channel: 1, or 8 in sequence_spread.cu
//   SUMMARY  1 for a pass that finds out only what a split of the sequence hands on: its end from zero, and its sum of delta
//
// Rows of a map start anywhere (their length may be odd), so a map is read two bytes a lane, lanes along the steps. What is written,
// channels-last, is stored two bytes a lane as well, lanes along the channels. The scan runs in tiles of T steps. With a channel a thread,
// the loop over states is outside, that over the steps inside: the steps are registers. delta comes times log2(e), and so B times ln(2).
// sequence_spread.cu says how it differs.

constexpr int CHANNELS = THREADS / LANES;                      // of a block
constexpr int READERS = LANES == 1 ? THREADS : THREADS / 2;    // threads that read
constexpr int MATRIX_READS = (N * T + READERS - 1) / READERS;  // a reader's share of a tile of B or C; of a map it is T
constexpr int ROWS = READERS / T;                              // rows that are read at once
constexpr int MATRIX_ROW = LANES == 1 ? T : T + 4;  // of a matrix in shared memory: rows that a warp reads at once do not share a bank

struct Work {  // of a block
    int k, split, batch;
    int first_channel, left;  // in group k; channels from there to its end, CHANNELS at most
};

DEVICE Work work_of(int channels, int groups, int splits) {
    const int blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int rest = blockIdx.x / blocks, first = blockIdx.x % blocks * CHANNELS;
    const int left = FULL || channels - first > CHANNELS ? CHANNELS : channels - first;
    return {rest % groups, rest / groups % splits, rest / groups / splits, first, left};
}

// A thread's share of a tile: always the same step, thread % T, of every ROWS-th row.
DEVICE const uint16 *share(const uint16 *map, int stride, int thread) { return map + thread / T * stride; }
DEVICE int existing(int step, int length) { return step < length ? step : length - 1; }  // beyond the last step that one again

// Start reading a thread's share of a tile of rows first, first + 1, ..., of which there are `rows`; the caller takes care that all its
// steps exist. Nothing is converted here, nor packed, so that the reads go on while another tile is computed. An address by one
// multiplication: an index takes three instructions. WHOLE: no thread's share goes beyond the last row.
template <bool WHOLE, int COUNT>
DEVICE void read_rows(uint32 (&raw)[COUNT], const uint16 *from, int stride, int rows, int thread) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const bool real = WHOLE || thread / T + i * ROWS < rows;
        raw[i] = real ? *(const uint16 *)((const char *)from + (long long)i * (2 * ROWS * stride)) : 0u;
    }
}

DEVICE void read_matrix(uint32 (&raw)[MATRIX_READS], const uint16 *from, int stride, int thread) {
    read_rows<N * T % READERS == 0>(raw, from, stride, N, thread);
}

DEVICE void write_matrix(float (&to)[N][MATRIX_ROW], const uint32 (&raw)[MATRIX_READS], float times, int thread) {
#pragma unroll
    for (int i = 0; i < MATRIX_READS; i++) {
        const int e = thread + i * READERS;
        if (N * T % READERS == 0 || e < N * T) to[e / T][e % T] = to_float((uint16)raw[i]) * times;
    }
}

// A (channels, N) of the block as [N][CHANNELS]; zeros beyond the group's channels.
DEVICE void load_decay(float (&to)[N][CHANNELS], const float *A, int channels, int thread) {
    for (int e = thread; e < N * CHANNELS; e += THREADS) to[e % N][e / N] = e / N < channels ? A[e] : 0.f;
}

// delta of a step, times log2(e), from what the map holds and the bias times log2(e).
DEVICE float step_of(float delta, float bias) {
    float v = delta * LOG2E + bias, unused;
    if (SOFTPLUS) v = softplus<8>(v, unused);
    return v;
}

DEVICE float silu(float v) { return v * reciprocal(1.f + exp2_fast(v * -LOG2E)); }

// Four numbers side by side, from a multiple of 16 bytes.
DEVICE void load_four(float *to, const float *from) {
    const float4 v = *(const float4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
DEVICE void store_four(float *to, const float *v) { *(float4 *)to = {v[0], v[1], v[2], v[3]}; }
