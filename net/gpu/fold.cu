// What implicit.cu's kernels are given: pictures with the stride folded away, and weights to match.

// A convolution of stride s is one of stride 1 over a picture of which s x s pixels have become the channels of one:
//
//     folded[n, r, c, a, b, i] = x[n, r*s + a, c*s + b, i],    zero beyond the edge
//
// A block makes a row of the folded picture, 16 bytes a thread. s*s*channels is a multiple of 8. Shared memory: the s
// rows of x that it needs, one behind the other as they lie in x; read only behind the barrier, for a thread's piece
// holds values that others have copied.
extern "C" __global__ void __launch_bounds__(THREADS) fold_picture(
    const real* x, real* folded, int height, int width, int channels, int s, int down, int across) {
    extern __shared__ __align__(16) uint8 lines[];
    real* rows = reinterpret_cast<real*>(lines);
    int image = blockIdx.x / down, first = blockIdx.x % down * s, line = width * channels;
    const real* from = x + ((long long)image * height + first) * line;
    int there = min(s, height - first) * line;
    for (int e = threadIdx.x; e < s * line; e += THREADS) {
        if (e < there)
            rows[e] = from[e];
        else
            put(rows[e], 0.0f);
    }
    __syncthreads();
    int each = s * channels, pieces = s * each / 8;  // values side by side in x; 16-byte pieces of a folded pixel
    real* to = folded + (long long)blockIdx.x * across * pieces * 8;
    for (int vector = threadIdx.x; vector < across * pieces; vector += THREADS) {
        int c = vector / pieces, a = vector % pieces * 8 / each, bi = vector % pieces * 8 % each;
        Pack<real, 8> pack;
#pragma unroll
        for (int v = 0; v < 8; v++) {
            if (c * each + bi < line)
                pack.at[v] = rows[a * line + c * each + bi];
            else
                put(pack.at[v], 0.0f);
            bi++;  // counted on: divisions would cost more than all else
            a += bi == each;
            bi = bi == each ? 0 : bi;
        }
        reinterpret_cast<Pack<real, 8>*>(to)[vector] = pack;
    }
}

// The weights that go with it, w float32 (KH, KW, each, maps): folded (KH/s, KW/s rounded up, s, s, each, maps), zero
// beyond the window's edge.
extern "C" __global__ void __launch_bounds__(THREADS) fold_weights(
    const float* w, real* folded, int size, int kernel_h, int kernel_w, int each, int maps, int s) {
    int e = blockIdx.x * THREADS + threadIdx.x;
    if (e >= size) return;
    int map = e % maps, k = e / maps, i = k % each, b = k / each % s, a = k / each / s % s, tap = k / each / s / s;
    int across = (kernel_w + s - 1) / s, kh = tap / across * s + a, kw = tap % across * s + b;
    put(folded[e], kh < kernel_h && kw < kernel_w ? w[((kh * kernel_w + kw) * each + i) * maps + map] : 0.0f);
}

// The gradient of the picture is a convolution too, of dy with the kernel turned round and its two sides exchanged:
//
//     turned[KH-1-kh, KW-1-kw, m, g, i] = w[kh, kw, i, g, m]
//
// w (taps, each, groups * maps_each), turned (taps, maps_each, groups * each). Eight i a thread.
extern "C" __global__ void __launch_bounds__(THREADS) turn_weights(
    const real* w, real* turned, int taps, int each, int groups, int maps_each) {
    int e = blockIdx.x * THREADS + threadIdx.x;
    int m = e % maps_each, i = e / maps_each % (each / 8) * 8, g = e / maps_each / (each / 8) % groups;
    int tap = e / maps_each / (each / 8) / groups;
    if (tap >= taps) return;
    Pack<real, 8> pack;
#pragma unroll
    for (int v = 0; v < 8; v++)
        pack.at[v] = w[((long long)tap * each + i + v) * groups * maps_each + g * maps_each + m];
    *reinterpret_cast<Pack<real, 8>*>(
        turned + ((long long)(taps - 1 - tap) * maps_each + m) * groups * each + g * each + i) = pack;
}
