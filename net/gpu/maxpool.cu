// Max pooling on its own (paper, section 3.4); the fused form is in relu_lrn_pool.cu.
//
//     y[n, r, c, i] = max over kh, kw < size of x[n, r*stride + kh, c*stride + kw, i]
//
// winner is the row-major place kh*size + kw of the first maximum; the first NaN wins over everything. Backward each
// pixel of dx sums dy over the windows it won: a gather, no atomics. One element of the result a thread.

extern "C" __global__ void __launch_bounds__(THREADS) maxpool_forward(
    const real* x, real* y, uint8* winner, long long total, int height, int width, int channels, int out_height,
    int out_width, int size, int stride) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= total) return;
    int i = e % channels, c = e / channels % out_width, r = e / channels / out_width % out_height;
    long long image = e / channels / out_width / out_height;
    const real* corner = x + ((image * height + r * stride) * width + c * stride) * channels + i;
    float best = to_float(*corner);
    int at = 0;
    for (int kh = 0; kh < size; kh++)
        for (int kw = 0; kw < size; kw++) {
            float value = to_float(corner[(kh * width + kw) * channels]);
            if (value > best || (isnan(value) && !isnan(best))) {
                best = value;
                at = kh * size + kw;
            }
        }
    put(y[e], best);
    winner[e] = (uint8)at;
}

extern "C" __global__ void __launch_bounds__(THREADS) maxpool_backward(
    const real* dy, const uint8* winner, real* dx, long long total, int height, int width, int channels,
    int out_height, int out_width, int size, int stride) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= total) return;
    int i = e % channels, col = e / channels % width, row = e / channels / width % height;
    long long image = e / channels / width / height;
    float sum = 0.0f;
    for (int r = max(0, (row - size + stride) / stride); r <= min(row / stride, out_height - 1); r++)
        for (int c = max(0, (col - size + stride) / stride); c <= min(col / stride, out_width - 1); c++) {
            long long from = ((image * out_height + r) * out_width + c) * channels + i;
            if (winner[from] == (row - r * stride) * size + (col - c * stride)) sum += to_float(dy[from]);
        }
    put(dx[e], sum);
}
