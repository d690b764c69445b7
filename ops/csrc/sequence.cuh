// What the scans over mamba's layout, maps (batch, dim, length) with N state variables, share. Beside those of device.cuh they take the
// macros
//   N   states of a channel;  HAS_Z  0 or 1
//   FULL     1 where the channels of a group are a multiple of those of a block
//   LANES    threads that share a channel: 1, 8 in sequence_spread.cu, 16 in sequence_tiles.cu
//   SUMMARY  1 for a pass that finds out only what a split of the sequence hands on: its end from zero, and its sum of delta
//   KEEP     1 for a forward pass that leaves the states before every tile for the backward pass
//   LAST     1 for one that leaves the state behind the last step
//
// Rows of a map start anywhere (their length may be odd), so a map is read two bytes a lane, lanes along the steps, or copied in pieces.
// What is written, channels-last, is stored two bytes a lane, lanes along the channels. The scan runs in tiles of T steps. With a channel a
// thread, the loop over states is outside, that over the steps inside: the steps are registers. delta comes times log2(e), and so B times
// ln(2). sequence_spread.cu and sequence_tiles.cu say how they differ.

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

// Rows start anywhere, copies at multiples of 16 bytes: a row is copied in pieces of eight numbers, the first from `skip` numbers before it
// on. A tile is then somewhere in three of them.
DEVICE int misplaced(const uint16 *row) { return (int)((unsigned long long)row % 16 / 2); }  // the numbers to skip

DEVICE int bytes_of(int left) { return left <= 0 ? 0 : left >= 8 ? 16 : 2 * left; }  // that exist of a piece, `left` numbers before the end

// The pairs of numbers from the `skip`-th of three pieces on.
DEVICE void load_pairs(uint32 (&pairs)[T / 2], const uint16 *first, const uint16 *second, const uint16 *third, int skip) {
    const int4 pieces[3] = {*(const int4 *)first, *(const int4 *)second, *(const int4 *)third};
    uint32 words[12];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        words[4 * i] = pieces[i].x, words[4 * i + 1] = pieces[i].y;
        words[4 * i + 2] = pieces[i].z, words[4 * i + 3] = pieces[i].w;
    }
#pragma unroll
    for (int i = 0; i < 10; i++) words[i] = skip & 4 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 9; i++) words[i] = skip & 2 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = shifted(words[i], words[i + 1], skip & 1 ? 16 : 0);
}

// Four numbers side by side, from a multiple of 16 bytes.
DEVICE void load_four(float *to, const float *from) {
    const float4 v = *(const float4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
DEVICE void store_four(float *to, const float *v) { *(float4 *)to = {v[0], v[1], v[2], v[3]}; }
