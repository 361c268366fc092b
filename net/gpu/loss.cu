// Softmax and cross-entropy of (N, classes) scores, one block a row (paper, section 3.5):
//
//     p_j = exp(z_j - m) / sum of exp(z_i - m),   m = max of z
//     loss = log(sum of exp(z_i - m)) + m - z_label,   dz = (p - onehot(label)) / N
//
// A label outside the classes gives NaN: a wrong label must not pass for a right one.

// Every thread gets the sum (or maximum) over the block: within a warp by shuffles, then over the warps through
// `shared`, a float a warp. The first barrier waits until all warps have written theirs, the second until all have read
// them, for the next call overwrites them. A maximum lets NaN win.
template <bool MAXIMUM>
__device__ __forceinline__ float reduce(float x, float* shared) {
    for (int distance = 16; distance > 0; distance /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = MAXIMUM ? (other > x || isnan(other) ? other : x) : x + other;
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int warp = 1; warp < THREADS / 32; warp++)
        x = MAXIMUM ? (shared[warp] > x || isnan(shared[warp]) ? shared[warp] : x) : x + shared[warp];
    __syncthreads();
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) softmax(const float* z, float* p, int classes) {
    extern __shared__ float shared[];
    z += (long long)blockIdx.x * classes;
    p += (long long)blockIdx.x * classes;
    float most = -INFINITE, sum = 0.0f;
    for (int j = threadIdx.x; j < classes; j += THREADS) most = z[j] > most || isnan(z[j]) ? z[j] : most;
    most = reduce<true>(most, shared);
    for (int j = threadIdx.x; j < classes; j += THREADS) sum += expf(z[j] - most);
    sum = reduce<false>(sum, shared);
    for (int j = threadIdx.x; j < classes; j += THREADS) p[j] = expf(z[j] - most) / sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(
    const float* z, const int* labels, float* loss, float* dz, int classes) {
    extern __shared__ float shared[];
    z += (long long)blockIdx.x * classes;
    dz += (long long)blockIdx.x * classes;
    int label = labels[blockIdx.x];
    bool known = label >= 0 && label < classes;
    float most = -INFINITE, sum = 0.0f;
    for (int j = threadIdx.x; j < classes; j += THREADS) most = z[j] > most || isnan(z[j]) ? z[j] : most;
    most = reduce<true>(most, shared);
    for (int j = threadIdx.x; j < classes; j += THREADS) sum += expf(z[j] - most);
    sum = reduce<false>(sum, shared);
    for (int j = threadIdx.x; j < classes; j += THREADS) {
        float onehot = known ? (j == label ? 1.0f : 0.0f) : NOT_A_NUMBER;
        dz[j] = (expf(z[j] - most) / sum - onehot) / gridDim.x;
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = known ? logf(sum) + most - z[label] : NOT_A_NUMBER;
}
