// A convolution as a matrix product: every output pixel becomes a row of the values its window covers,
//
//     columns[(n, r, c), g, kh, kw, i] = x[n, r*stride + kh - pad, c*stride + kw - pad, g*channels/groups + i]
//
// and y = columns . w, group by group. Outside the picture the value is zero. A group's row has `depth` =
// KH*KW*channels/groups values, filled up with zeros to `padded`, a multiple of 8, so that every row starts at a
// 16-byte boundary and tensor cores can be used (conv1 has 363 values, filled up to 368).
//
// A thread owns a few places next to each other in the row and walks along one output row, so that the place is
// taken apart into (g, kh, kw, i) once. Grid: x = (image, output row), y = stretches of the row; `across` threads
// side by side, the block's remaining threads take further output pixels.

// Any shape: each of a thread's WIDE places is looked up by itself.
extern "C" __global__ void __launch_bounds__(THREADS) columns_any(
    const real* x, real* columns, int height, int width, int channels, int kernel_w, int stride, int pad,
    int out_height, int out_width, int groups, int depth, int padded, int across) {
    int image = blockIdx.x / out_height, r = blockIdx.x % out_height;
    int vector = blockIdx.y * across + threadIdx.x % across;
    int lane = threadIdx.x / across, lanes = THREADS / across;
    if (vector >= groups * padded / WIDE || lane >= lanes) return;
    int each = channels / groups, g = vector * WIDE / padded, k = vector * WIDE % padded;
    int row = r * stride - pad;
    const real* picture = x + (long long)image * height * width * channels;
    real* to = columns + (long long)blockIdx.x * out_width * groups * padded + vector * WIDE;
    // Where this thread's places lie relative to the window's corner.
    int offset[WIDE], kh[WIDE], kw[WIDE];
#pragma unroll
    for (int v = 0; v < WIDE; v++) {
        int i = (k + v) % each;
        kw[v] = (k + v) / each % kernel_w;
        kh[v] = (k + v) / each / kernel_w;
        offset[v] = (kh[v] * width + kw[v]) * channels + g * each + i;
    }
    for (int c = lane; c < out_width; c += lanes) {
        int col = c * stride - pad;
        int corner = (row * width + col) * channels;
        Pack<real, WIDE> pack;
#pragma unroll
        for (int v = 0; v < WIDE; v++) {
            // Without padding every window lies inside the picture, and only the filling has no value.
            bool inside = k + v < depth;
            if (pad > 0)
                inside = inside && row + kh[v] >= 0 && row + kh[v] < height && col + kw[v] >= 0 && col + kw[v] < width;
            if (inside)
                pack.at[v] = picture[corner + offset[v]];
            else
                put(pack.at[v], 0.0f);
        }
        *reinterpret_cast<Pack<real, WIDE>*>(to + (long long)c * groups * padded) = pack;
    }
}

// Where channels/groups is a multiple of WIDE (all layers but the first) a thread's places lie side by side in x too.
extern "C" __global__ void __launch_bounds__(THREADS) columns_wide(
    const real* x, real* columns, int height, int width, int channels, int kernel_w, int stride, int pad,
    int out_height, int out_width, int groups, int depth, int padded, int across) {
    int image = blockIdx.x / out_height, r = blockIdx.x % out_height;
    int vector = blockIdx.y * across + threadIdx.x % across;
    int lane = threadIdx.x / across, lanes = THREADS / across;
    if (vector >= groups * padded / WIDE || lane >= lanes) return;
    int each = channels / groups, g = vector * WIDE / padded, k = vector * WIDE % padded;
    int i = k % each, kw = k / each % kernel_w, kh = k / each / kernel_w;
    int row = r * stride - pad + kh;
    bool row_inside = k < depth && row >= 0 && row < height;
    const real* from = x + (long long)image * height * width * channels + (long long)row * width * channels +
                       g * each + i;
    real* to = columns + (long long)blockIdx.x * out_width * groups * padded + vector * WIDE;
#pragma unroll 4
    for (int c = lane; c < out_width; c += lanes) {
        int col = c * stride - pad + kw;
        Pack<real, WIDE> pack;
        if (row_inside && col >= 0 && col < width) {
            pack = *reinterpret_cast<const Pack<real, WIDE>*>(from + col * channels);
        } else {
#pragma unroll
            for (int v = 0; v < WIDE; v++) put(pack.at[v], 0.0f);
        }
        *reinterpret_cast<Pack<real, WIDE>*>(to + (long long)c * groups * padded) = pack;
    }
}

// The gradient's way back: each pixel of dx sums the places of dcolumns that were copied from it,
//
//     dx[n, row, col, g, i] = sum over kh, kw of dcolumns[(n, r, c), g, kh, kw, i],
//     r = (row + pad - kh) / stride, c = (col + pad - kw) / stride where these are whole and inside the output.
//
// A gather: no atomics, so the sum's order never changes. Grid: x = (image, row), y = stretches of channels.
template <int V>
__device__ __forceinline__ void gather(
    const real* dcolumns, real* dx, int height, int width, int channels, int kernel_h, int kernel_w, int stride,
    int pad, int out_height, int out_width, int groups, int padded, int across) {
    int image = blockIdx.x / height, row = blockIdx.x % height;
    int vector = blockIdx.y * across + threadIdx.x % across;
    int lane = threadIdx.x / across, lanes = THREADS / across;
    if (vector >= channels / V || lane >= lanes) return;
    int each = channels / groups, g = vector * V / each, i = vector * V % each;
    const real* from = dcolumns + (long long)image * out_height * out_width * groups * padded + g * padded + i;
    for (int col = lane; col < width; col += lanes) {
        float sum[V];
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] = 0.0f;
        for (int kh = 0; kh < kernel_h; kh++) {
            int down = row + pad - kh, r = down / stride;
            if (down < 0 || r * stride != down || r >= out_height) continue;
            for (int kw = 0; kw < kernel_w; kw++) {
                int right = col + pad - kw, c = right / stride;
                if (right < 0 || c * stride != right || c >= out_width) continue;
                float part[V];
                load<V>(from + (long long)(r * out_width + c) * groups * padded + (kh * kernel_w + kw) * each, part);
#pragma unroll
                for (int v = 0; v < V; v++) sum[v] += part[v];
            }
        }
        store<V>(dx + ((long long)blockIdx.x * width + col) * channels + vector * V, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_wide(
    const real* dcolumns, real* dx, int height, int width, int channels, int kernel_h, int kernel_w, int stride,
    int pad, int out_height, int out_width, int groups, int padded, int across) {
    gather<WIDE>(dcolumns, dx, height, width, channels, kernel_h, kernel_w, stride, pad, out_height, out_width, groups,
                 padded, across);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_any(
    const real* dcolumns, real* dx, int height, int width, int channels, int kernel_h, int kernel_w, int stride,
    int pad, int out_height, int out_width, int groups, int padded, int across) {
    gather<1>(dcolumns, dx, height, width, channels, kernel_h, kernel_w, stride, pad, out_height, out_width, groups,
              padded, across);
}
