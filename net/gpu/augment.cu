// From uint8 crops to the network's input (paper, sections 2 and 4.1), with a border of zeros:
//
//     y[n, before + r, before + c, ch] = ((pixel[n, r, c', p] - mean) + shift[n, p]) * scale
//
// c' = W - 1 - c in a mirrored picture, else c; p = 2 - ch where the network's channel order is BGR, else ch.
// The mean picture (M, M, 3) is taken at (r, c) where M is the crop's side, else at the crop's place in the stored
// picture, (corner_r + r, corner_c + c'), so that it moves and mirrors with the crop.
//
// images (N, height, width, 3); y (N, height + before + after, width + before + after, 3). A block makes a row of a
// picture, a thread a pixel: taking an element's number apart would cost more than all else.
extern "C" __global__ void __launch_bounds__(THREADS) augment(
    const uint8* images, const int* corner, const uint8* flip, const float* shift, const float* mean, real* y,
    int height, int width, int mean_side, int before, int after, float scale, int bgr) {
    int out_width = width + before + after, out_height = height + before + after;
    int n = blockIdx.x / out_height, r = blockIdx.x % out_height - before;
    bool row_inside = r >= 0 && r < height, mirrored = flip[n], fixed = mean_side == height;
    const uint8* from_row = images + ((long long)n * height + r) * width * 3;
    real* to = y + (long long)blockIdx.x * out_width * 3;
    float add[3];
#pragma unroll
    for (int p = 0; p < 3; p++) add[p] = shift[3 * n + p];
    for (int column = threadIdx.x; column < out_width; column += THREADS) {
        int c = column - before, from = mirrored ? width - 1 - c : c;
        bool inside = row_inside && c >= 0 && c < width;
#pragma unroll
        for (int p = 0; p < 3; p++) {
            float value = 0.0f;
            if (inside) {
                float m = 0.0f;
                if (mean) {
                    int row = fixed ? r : corner[2 * n] + r, col = fixed ? c : corner[2 * n + 1] + from;
                    m = mean[(row * mean_side + col) * 3 + p];
                }
                value = ((from_row[from * 3 + p] - m) + add[p]) * scale;
            }
            put(to[column * 3 + (bgr ? 2 - p : p)], value);
        }
    }
}
