// What the scans over mamba's layout, maps (batch, dim, length) with N state variables, share. See device.cuh for the macros that both
// sets of kernels take; these have moreover
//   N   states of a channel;  STAGE  steps that are brought to shared memory at once;  HAS_Z  0 or 1
//   CHANNEL_WARPS, STATE_WARPS  a block has 32 * CHANNEL_WARPS channels, a lane each, and its STATE_WARPS groups of warps share their states
//   FULL     1 where the channels of a group are a multiple of those of a block
//   SUMMARY  1 for a pass that finds out only what a split of the sequence hands on: its end from zero, and its sum of delta
//
// Rows of a map start anywhere (their length may be odd), so a map is read two bytes a lane, lanes along the steps. What is written,
// channels-last, is stored two bytes a lane as well, lanes along the channels. The scan runs in tiles of T steps, a channel a thread,
// the loop over states outside, that over the steps inside: the steps are registers. delta comes times log2(e), and so B times ln(2).

constexpr int CHANNELS = 32 * CHANNEL_WARPS;
constexpr int READS = STAGE / STATE_WARPS;                         // a thread's share of a stage of a map
constexpr int MATRIX_READS = (N * STAGE + THREADS - 1) / THREADS;     // and of B or C
constexpr int ROWS = THREADS / STAGE;                                 // rows that are read at once
constexpr int OWN_STATES = N / STATE_WARPS;
static_assert(THREADS == CHANNELS * STATE_WARPS && STAGE % T == 0 && THREADS % STAGE == 0 && STAGE % STATE_WARPS == 0 && N % STATE_WARPS == 0, "");

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

// Where a thread's share of a stage lies: a thread always takes the same step, of every ROWS-th row.
DEVICE const uint16 *share(const uint16 *map, int stride, int thread) { return map + thread / STAGE * stride + thread % STAGE; }

// Start reading a thread's share of a stage of rows first, first + 1, ...; zeros beyond `rows` of them, and where `inside` is false. Nothing
// is converted here, so that the reads go on while another stage is computed. An address by one multiplication: an index takes three.
template <int COUNT>
DEVICE void read_rows(uint16 (&raw)[COUNT], const uint16 *from, int stride, int rows, bool inside, int thread) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const bool real = inside && thread / STAGE + i * ROWS < rows;
        raw[i] = real ? *(const uint16 *)((const char *)from + (long long)i * (2 * ROWS * stride)) : (uint16)0;
    }
}

DEVICE void write_matrix(float (&to)[N][STAGE], const uint16 (&raw)[MATRIX_READS], float times, int thread) {
#pragma unroll
    for (int i = 0; i < MATRIX_READS; i++) {
        const int e = thread + i * THREADS;
        if (e < N * STAGE) to[e / STAGE][e % STAGE] = to_float(raw[i]) * times;
    }
}

// A (channels, N) of the block as [N][CHANNELS]; zeros beyond the group's channels.
DEVICE void load_decay(float (&to)[N][CHANNELS], const float *A, int channels, int thread) {
    for (int e = thread; e < N * CHANNELS; e += THREADS) to[e % N][e / N] = e / N < channels ? A[e] : 0.f;
}

// Four steps of a row of B or C.
DEVICE void load_four(float (&to)[4], const float *from) {
    const float4 v = *(const float4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
