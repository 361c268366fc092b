// Changes of type, bias, ReLU and its gradient; one element a thread unless said otherwise.

// y = x in the storage type, followed by zeros up to `total`: a weight matrix whose rows are filled up.
extern "C" __global__ void __launch_bounds__(THREADS) cast_from_float(
    const float* x, real* y, long long size, long long total) {
    long long e = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (e + 4 <= size) {
        float part[4];
        load<4>(x + e, part);
        store<4>(y + e, part);
        return;
    }
    for (int v = 0; v < 4 && e + v < total; v++) put(y[e + v], e + v < size ? x[e + v] : 0.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_to_float(const real* x, float* y, long long size) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e < size) y[e] = to_float(x[e]);
}

// y = x + b, or relu(x + b), over rows of `channels`; in place where y is x.
template <int V>
__device__ __forceinline__ void bias(
    const real* x, const float* b, real* y, long long size, int channels, int rectify) {
    long long e = ((long long)blockIdx.x * THREADS + threadIdx.x) * V;
    if (e >= size) return;
    float value[V], shift[V];
    load<V>(x + e, value);
    load<V>(b + e % channels, shift);
#pragma unroll
    for (int v = 0; v < V; v++) {
        value[v] += shift[v];
        if (rectify) value[v] = relu(value[v]);
    }
    store<V>(y + e, value);
}

extern "C" __global__ void __launch_bounds__(THREADS) bias_4(
    const real* x, const float* b, real* y, long long size, int channels, int rectify) {
    bias<4>(x, b, y, size, channels, rectify);
}

extern "C" __global__ void __launch_bounds__(THREADS) bias_1(
    const real* x, const float* b, real* y, long long size, int channels, int rectify) {
    bias<1>(x, b, y, size, channels, rectify);
}

// y = 0 where x < 0, else x.
extern "C" __global__ void __launch_bounds__(THREADS) relu_forward(const real* x, real* y, long long size) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e < size) put(y[e], relu(to_float(x[e])));
}

// dx = dy where y > 0, else 0.
extern "C" __global__ void __launch_bounds__(THREADS) relu_backward(
    const real* dy, const real* y, real* dx, long long size) {
    long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e < size) put(dx[e], positive(to_float(y[e])) ? to_float(dy[e]) : 0.0f);
}
