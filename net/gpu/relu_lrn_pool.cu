// What follows a convolution, in one pass over its result c (paper, sections 3.1, 3.3, 3.4):
//
//     a = relu(c + b)
//     n = a * s^-beta,   s_i = k + alpha * sum of a_j^2 over the channels j within `half` of i      (where lrn)
//     y = max of n over size x size windows, `stride` apart; the first maximum (first NaN) wins    (size 1: y = n)
//
// and backward, again in one pass, recomputing a and s from c:
//
//     dn_i = sum of dy over the windows that i won
//     da_i = dn_i * s_i^-beta - 2 alpha beta a_i * sum over j within `half` of i of t_j,   t_j = dn_j a_j s_j^(-beta-1)
//     dc = da where a > 0, else 0;   db = sum of dc over all pixels
//
// With `relu_last` (block 1 of the authors' code) the ReLU follows the pool instead: a = c + b, y = relu(max of n), and
// backward dn is 0 where a <= 0, for n has a's sign, while dc = da.
//
// c (N, height, width, channels); y, winner (N, out_height, out_width, channels); winner is the row-major place in the
// window. A thread owns V neighbouring channels; channels/V threads side by side make a pixel, and the block's
// further threads ("lanes") take further pixels. V = 4, half = 2 is AlexNet's case, V = 1 takes any.

// x > best, or only x is NaN; written so that it takes two instructions.
__device__ __forceinline__ bool beats(float x, float best) { return !(x <= best) && best == best; }

// sums[v] = sum over the channels within `half` of i + v of f(pixel[channel]), for one pixel's channels in shared
// memory. HALF 2 and V 4 need three vector reads.
template <int V, bool SQUARE>
__device__ __forceinline__ void window_sums(const float* pixel, int i, int channels, int half, float (&sums)[V]) {
    if constexpr (V == 4) {
        float x[3 * V], part[V];
#pragma unroll
        for (int p = 0; p < 3; p++) {
            int from = i + (p - 1) * V;
            if (from >= 0 && from < channels) {
                load<V>(pixel + from, part);
            } else {
#pragma unroll
                for (int v = 0; v < V; v++) part[v] = 0.0f;
            }
#pragma unroll
            for (int v = 0; v < V; v++) x[p * V + v] = SQUARE ? part[v] * part[v] : part[v];
        }
#pragma unroll
        for (int v = 0; v < V; v++) sums[v] = (x[V + v - 2] + x[V + v - 1]) + x[V + v] + (x[V + v + 1] + x[V + v + 2]);
    } else {
#pragma unroll
        for (int v = 0; v < V; v++) {
            sums[v] = 0.0f;
            for (int j = max(0, i + v - half); j <= min(channels - 1, i + v + half); j++)
                sums[v] += SQUARE ? pixel[j] * pixel[j] : pixel[j];
        }
    }
}

// One block computes a tile of tile_rows x tile_cols outputs of one image from the pixels under it, held in shared
// memory as floats: [row][col][channel]. Grid: image, tile row, tile column. SIZE and STRIDE are the pool's where they
// are known when compiling, else 0: loops over a window are written out and divisions by the stride are shifts.
// Barriers: behind the loading, since windows and LRN's sums take what other threads have loaded; with LRN, in each
// round between the sums and the overwriting; and behind the last round, since the windows take others' results.
template <int V, int SIZE, int STRIDE>
__device__ __forceinline__ void forward(
    const real* c, const float* b, real* y, uint8* winner, int height, int width, int channels, int out_height,
    int out_width, int tile_rows, int tile_cols, int tiles_down, int tiles_right, int any_size, int any_stride, int lrn,
    int half, float k, float alpha, float beta, int relu_last) {
    extern __shared__ __align__(16) float shared[];
    const int size = SIZE ? SIZE : any_size, stride = SIZE ? STRIDE : any_stride;
    int vectors = channels / V, lane = threadIdx.x / vectors, lanes = blockDim.x / vectors;
    int i = threadIdx.x % vectors * V;
    int image = blockIdx.x / (tiles_down * tiles_right);
    int first_row = blockIdx.x / tiles_right % tiles_down * tile_rows, first_col = blockIdx.x % tiles_right * tile_cols;
    int rows = min(tile_rows, out_height - first_row), cols = min(tile_cols, out_width - first_col);
    int across = (cols - 1) * stride + size, pixels = ((rows - 1) * stride + size) * across;
    // p / across without dividing, exact while pixels * across < 2^20: a tile is far smaller.
    uint32 magic = ((1u << 20) + across - 1) / across;
    const real* picture = c + (long long)image * height * width * channels;

    if (lane < lanes) {
        float bias[V];
        load<V>(b + i, bias);
        for (int p = lane; p < pixels; p += lanes) {
            int down = (int)(p * magic >> 20);
            int row = first_row * stride + down, col = first_col * stride + p - down * across;
            float a[V];
            load<V>(picture + (row * width + col) * channels + i, a);
#pragma unroll
            for (int v = 0; v < V; v++) a[v] = relu_last ? a[v] + bias[v] : relu(a[v] + bias[v]);
            store<V>(shared + p * channels + i, a);
        }
    }
    __syncthreads();
    if (lrn) {
        // In place: everyone has read a pixel's neighbours before its owner overwrites it.
        for (int start = 0; start < pixels; start += lanes) {
            int p = start + lane;
            bool mine = lane < lanes && p < pixels;
            float n[V], sums[V];
            if (mine) {
                window_sums<V, true>(shared + p * channels, i, channels, half, sums);
                load<V>(shared + p * channels + i, n);
#pragma unroll
                for (int v = 0; v < V; v++) n[v] *= power(k + alpha * sums[v], beta);
            }
            __syncthreads();
            if (mine) store<V>(shared + p * channels + i, n);
        }
        __syncthreads();
    }
    if (lane >= lanes) return;
    for (int o = lane; o < rows * cols; o += lanes) {
        int r = o / cols, q = o % cols;
        float best[V], x[V];
        int at[V];
#pragma unroll
        for (int kh = 0; kh < size; kh++) {
#pragma unroll
            for (int kw = 0; kw < size; kw++) {
                int place = kh * size + kw;
                load<V>(shared + ((r * stride + kh) * across + q * stride + kw) * channels + i, x);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    if (place == 0 || beats(x[v], best[v])) {
                        best[v] = x[v];
                        at[v] = place;
                    }
                }
            }
        }
        if (relu_last) {
#pragma unroll
            for (int v = 0; v < V; v++) best[v] = relu(best[v]);
        }
        long long to = (((long long)image * out_height + first_row + r) * out_width + first_col + q) * channels + i;
        store<V>(y + to, best);
        if (winner) {
            Pack<uint8, V> pack;
#pragma unroll
            for (int v = 0; v < V; v++) pack.at[v] = (uint8)at[v];
            *reinterpret_cast<Pack<uint8, V>*>(winner + to) = pack;
        }
    }
}

// Pixels are dealt out over blocks and lanes; a thread keeps its channels, so db adds up in its registers. `partial`
// (gridDim.x, channels) holds each block's share of db, added up by column_sum.cu in a fixed order. Where winner is
// null there was no pool; where b is null, c is already a. Shared memory: a and t, [lane][channel] each. A window
// reaches into the channels of other threads, so a barrier stands behind the writing of a and one behind that of t.
// They serve for the next round too: a is written again after t's barrier, when all have read it, and t after a's.
template <int V, int SIZE, int STRIDE>
__device__ __forceinline__ void backward(
    const real* dy, const uint8* winner, const real* c, const float* b, real* dc, float* partial, int pixels,
    int height, int width, int channels, int out_height, int out_width, int any_size, int any_stride, int lrn, int half,
    float k, float alpha, float beta, int relu_last) {
    extern __shared__ __align__(16) float shared[];
    const int size = SIZE ? SIZE : any_size, stride = SIZE ? STRIDE : any_stride;
    // Windows along one side that a pixel lies in, at most.
    const int windows = SIZE ? (SIZE + STRIDE - 1) / STRIDE : any_size;
    int vectors = channels / V, lane = threadIdx.x / vectors, lanes = blockDim.x / vectors;
    int i = threadIdx.x % vectors * V;
    int own_a = lane * channels, own_t = own_a + lanes * channels;
    float bias[V], db[V];
#pragma unroll
    for (int v = 0; v < V; v++) bias[v] = db[v] = 0.0f;
    if (b && lane < lanes) load<V>(b + i, bias);

    // The pixel's place, carried along from one round to the next instead of divided out each time.
    int step = gridDim.x * lanes, p = blockIdx.x * lanes + lane;
    int col = p % width, row = p / width % height, image = p / width / height;
    int step_col = step % width, step_row = step / width % height, step_image = step / width / height;
    for (int start = blockIdx.x * lanes; start < pixels; start += step) {
        bool mine = lane < lanes && p < pixels;
        long long here = (long long)p * channels + i;
        float a[V], d[V], sums[V], inverse[V];
        if (mine) {
            load<V>(c + here, a);
#pragma unroll
            for (int v = 0; v < V; v++) a[v] = relu_last ? a[v] + bias[v] : relu(a[v] + bias[v]);
            if (winner) {
#pragma unroll
                for (int v = 0; v < V; v++) d[v] = 0.0f;
                int first_r = max(0, (row - size + stride) / stride), last_r = min(row / stride, out_height - 1);
                int first_q = max(0, (col - size + stride) / stride), last_q = min(col / stride, out_width - 1);
                long long first = (long long)image * out_height * out_width * channels + i;
#pragma unroll
                for (int down = 0; down < windows; down++) {
                    int r = first_r + down;
                    if (r > last_r) break;
#pragma unroll
                    for (int right = 0; right < windows; right++) {
                        int q = first_q + right;
                        if (q > last_q) break;
                        long long from = first + (r * out_width + q) * channels;
                        int place = (row - r * stride) * size + (col - q * stride);
                        Pack<uint8, V> won = *reinterpret_cast<const Pack<uint8, V>*>(winner + from);
                        float g[V];
                        load<V>(dy + from, g);
#pragma unroll
                        for (int v = 0; v < V; v++) d[v] += won.at[v] == place ? g[v] : 0.0f;
                    }
                }
            } else {
                load<V>(dy + here, d);
            }
            if (relu_last) {
#pragma unroll
                for (int v = 0; v < V; v++) d[v] = positive(a[v]) ? d[v] : 0.0f;
            }
        }
        if (lrn) {
            if (mine) store<V>(shared + own_a + i, a);
            __syncthreads();
            if (mine) {
                float t[V];
                window_sums<V, true>(shared + own_a, i, channels, half, sums);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float s = k + alpha * sums[v];
                    inverse[v] = power(s, beta);
                    t[v] = d[v] * a[v] * inverse[v] * reciprocal(s);
                }
                store<V>(shared + own_t + i, t);
            }
            __syncthreads();
            if (mine) {
                window_sums<V, false>(shared + own_t, i, channels, half, sums);
#pragma unroll
                for (int v = 0; v < V; v++) d[v] = d[v] * inverse[v] - 2.0f * alpha * beta * a[v] * sums[v];
            }
        }
        if (mine) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                d[v] = relu_last || positive(a[v]) ? d[v] : 0.0f;
                db[v] += d[v];
            }
            store<V>(dc + here, d);
        }
        p += step;
        col += step_col;
        row += step_row + (col >= width);
        col -= col >= width ? width : 0;
        image += step_image + (row >= height);
        row -= row >= height ? height : 0;
    }
    __syncthreads();
    if (lane < lanes) store<V>(shared + own_a + i, db);
    __syncthreads();
    for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
        float sum = 0.0f;
        for (int l = 0; l < lanes; l++) sum += shared[l * channels + channel];
        partial[(long long)blockIdx.x * channels + channel] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) block_forward_4(
    const real* c, const float* b, real* y, uint8* winner, int height, int width, int channels, int out_height,
    int out_width, int tile_rows, int tile_cols, int tiles_down, int tiles_right, int size, int stride, int lrn,
    int half, float k, float alpha, float beta, int relu_last) {
    if (size == 3 && stride == 2)
        forward<4, 3, 2>(c, b, y, winner, height, width, channels, out_height, out_width, tile_rows, tile_cols,
                         tiles_down, tiles_right, size, stride, lrn, half, k, alpha, beta, relu_last);
    else
        forward<4, 0, 0>(c, b, y, winner, height, width, channels, out_height, out_width, tile_rows, tile_cols,
                         tiles_down, tiles_right, size, stride, lrn, half, k, alpha, beta, relu_last);
}

extern "C" __global__ void __launch_bounds__(512) block_forward_1(
    const real* c, const float* b, real* y, uint8* winner, int height, int width, int channels, int out_height,
    int out_width, int tile_rows, int tile_cols, int tiles_down, int tiles_right, int size, int stride, int lrn,
    int half, float k, float alpha, float beta, int relu_last) {
    forward<1, 0, 0>(c, b, y, winner, height, width, channels, out_height, out_width, tile_rows, tile_cols, tiles_down,
                     tiles_right, size, stride, lrn, half, k, alpha, beta, relu_last);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) block_backward_4(
    const real* dy, const uint8* winner, const real* c, const float* b, real* dc, float* partial, int pixels,
    int height, int width, int channels, int out_height, int out_width, int size, int stride, int lrn, int half,
    float k, float alpha, float beta, int relu_last) {
    if (size == 3 && stride == 2)
        backward<4, 3, 2>(dy, winner, c, b, dc, partial, pixels, height, width, channels, out_height, out_width, size,
                          stride, lrn, half, k, alpha, beta, relu_last);
    else
        backward<4, 0, 0>(dy, winner, c, b, dc, partial, pixels, height, width, channels, out_height, out_width, size,
                          stride, lrn, half, k, alpha, beta, relu_last);
}

extern "C" __global__ void __launch_bounds__(512, 1) block_backward_1(
    const real* dy, const uint8* winner, const real* c, const float* b, real* dc, float* partial, int pixels,
    int height, int width, int channels, int out_height, int out_width, int size, int stride, int lrn, int half,
    float k, float alpha, float beta, int relu_last) {
    backward<1, 0, 0>(dy, winner, c, b, dc, partial, pixels, height, width, channels, out_height, out_width, size,
                      stride, lrn, half, k, alpha, beta, relu_last);
}
