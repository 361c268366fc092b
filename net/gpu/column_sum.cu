// Sum over the rows of a matrix x (rows, channels), the gradient of a bias:
//
//     out[channel] = sum over row of x[row, channel]
//
// in two steps of fixed order: blocks sum stretches of rows into `partial` (gridDim.y, channels), then column_sum_last
// sums those. No atomics: the same rows give the same bits.

// A block: 32 channels x 8 rows ("lanes"), every eighth row a lane; grid: x = stretches of 32 channels, y = stretches
// of `stretch` rows. Shared memory: each lane's sums, [lane][channel]; behind the barrier lane 0 adds them up in order.
extern "C" __global__ void __launch_bounds__(THREADS) column_sum(
    const real* x, float* partial, long long rows, int channels, long long stretch) {
    extern __shared__ float shared[];
    int i = threadIdx.x % 32, lane = threadIdx.x / 32, channel = blockIdx.x * 32 + i;
    long long end = min(rows, (blockIdx.y + 1) * stretch);
    float sum = 0.0f;
    if (channel < channels)
        for (long long row = blockIdx.y * stretch + lane; row < end; row += THREADS / 32)
            sum += to_float(x[row * channels + channel]);
    shared[lane * 32 + i] = sum;
    __syncthreads();
    if (lane > 0 || channel >= channels) return;
    for (int l = 1; l < THREADS / 32; l++) sum += shared[l * 32 + i];
    partial[(long long)blockIdx.y * channels + channel] = sum;
}

// out[channel] = sum of partial[part][channel]. The same block shape.
extern "C" __global__ void __launch_bounds__(THREADS) column_sum_last(
    const float* partial, float* out, int parts, int channels) {
    extern __shared__ float shared[];
    int i = threadIdx.x % 32, lane = threadIdx.x / 32, channel = blockIdx.x * 32 + i;
    float sum = 0.0f;
    if (channel < channels)
        for (int part = lane; part < parts; part += THREADS / 32) sum += partial[(long long)part * channels + channel];
    shared[lane * 32 + i] = sum;
    __syncthreads();
    if (lane > 0 || channel >= channels) return;
    for (int l = 1; l < THREADS / 32; l++) sum += shared[l * 32 + i];
    out[channel] = sum;
}
