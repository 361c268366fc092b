// One step of gradient descent (paper, section 5), in place:
//
//     v <- momentum * v - decay * lr * w - lr * dw,   w <- w + v
//
// The learning rate is read from device memory where `rate` is given, so that a recorded graph can be replayed with
// another. Four elements a thread.
extern "C" __global__ void __launch_bounds__(THREADS) sgd_update(
    float* w, float* v, const float* dw, long long size, float lr, const float* rate, float momentum, float decay) {
    long long e = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (rate) lr = *rate;
    if (e + 4 <= size) {
        float weight[4], speed[4], slope[4];
        load<4>(w + e, weight);
        load<4>(v + e, speed);
        load<4>(dw + e, slope);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            speed[j] = momentum * speed[j] - decay * lr * weight[j] - lr * slope[j];
            weight[j] += speed[j];
        }
        store<4>(v + e, speed);
        store<4>(w + e, weight);
        return;
    }
    for (; e < size; e++) {
        v[e] = momentum * v[e] - decay * lr * w[e] - lr * dw[e];
        w[e] += v[e];
    }
}
