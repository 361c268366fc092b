// Local response normalisation on its own (paper, section 3.3); the fused form is in relu_lrn_pool.cu.
//
//     y_i = x_i * s_i^-beta,   s_i = k + alpha * sum of x_j^2 over the window of i
//     dx_i = dy_i * s_i^-beta - 2 alpha beta x_i * sum of dy_j x_j s_j^(-beta-1) over the window of i
//
// lrn: the window is the channels within `half` of i. map_norm: the pixels of the same channel within `half` rows and
// columns of i. Windows are clipped at the border, and j lies in i's window where i lies in j's. x (pixels, channels)
// or (N, height, width, channels); s is float32 in either precision. One element a thread.

extern "C" __global__ void __launch_bounds__(THREADS) lrn_forward(
    const real* x, real* y, float* s, long long size, int channels, int half, float k, float alpha, float beta) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= size) return;
    int i = e % channels;
    float sum = 0.0f;
    for (int j = max(-half, -i); j <= min(half, channels - 1 - i); j++) sum += to_float(x[e + j]) * to_float(x[e + j]);
    sum = k + alpha * sum;
    s[e] = sum;
    put(y[e], to_float(x[e]) * power(sum, beta));
}

extern "C" __global__ void __launch_bounds__(THREADS) lrn_backward(
    const real* dy, const real* x, const float* s, real* dx, long long size, int channels, int half, float alpha,
    float beta) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= size) return;
    int i = e % channels;
    float sum = 0.0f;
    for (int j = max(-half, -i); j <= min(half, channels - 1 - i); j++)
        sum += to_float(dy[e + j]) * to_float(x[e + j]) * power(s[e + j], beta) * reciprocal(s[e + j]);
    put(dx[e], to_float(dy[e]) * power(s[e], beta) - 2.0f * alpha * beta * to_float(x[e]) * sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) map_norm_forward(
    const real* x, real* y, float* s, long long size, int height, int width, int channels, int half, float k,
    float alpha, float beta) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= size) return;
    int col = e / channels % width, row = e / channels / width % height;
    float sum = 0.0f;
    for (int r = max(-half, -row); r <= min(half, height - 1 - row); r++)
        for (int c = max(-half, -col); c <= min(half, width - 1 - col); c++) {
            float value = to_float(x[e + (r * width + c) * channels]);
            sum += value * value;
        }
    sum = k + alpha * sum;
    s[e] = sum;
    put(y[e], to_float(x[e]) * power(sum, beta));
}

extern "C" __global__ void __launch_bounds__(THREADS) map_norm_backward(
    const real* dy, const real* x, const float* s, real* dx, long long size, int height, int width, int channels,
    int half, float alpha, float beta) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= size) return;
    int col = e / channels % width, row = e / channels / width % height;
    float sum = 0.0f;
    for (int r = max(-half, -row); r <= min(half, height - 1 - row); r++)
        for (int c = max(-half, -col); c <= min(half, width - 1 - col); c++) {
            long long j = e + (r * width + c) * channels;
            sum += to_float(dy[j]) * to_float(x[j]) * power(s[j], beta) * reciprocal(s[j]);
        }
    put(dx[e], to_float(dy[e]) * power(s[e], beta) - 2.0f * alpha * beta * to_float(x[e]) * sum);
}
