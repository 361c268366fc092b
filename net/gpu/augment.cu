// From uint8 crops to the network's input (paper, sections 2 and 4.1), with a border of zeros:
//
//     y[n, before + r, before + c, ch] = ((pixel[n, r, c', p] - mean) + shift[n, p]) * scale
//
// c' = W - 1 - c in a mirrored picture, else c; p = 2 - ch where the network's channel order is BGR, else ch.
// The mean picture (M, M, 3) is taken at (r, c) where M is the crop's side, else at the crop's place in the stored
// picture, (corner_r + r, corner_c + c'), so that it moves and mirrors with the crop.
//
// images (N, height, width, 3); y (N, height + before + after, width + before + after, 3); one element a thread,
// `blocks` blocks a picture.
extern "C" __global__ void __launch_bounds__(THREADS) augment(
    const uint8* images, const int* corner, const uint8* flip, const float* shift, const float* mean, real* y,
    int height, int width, int mean_side, int before, int after, float scale, int bgr, int blocks) {
    int n = blockIdx.x / blocks;
    int e = (blockIdx.x % blocks) * THREADS + threadIdx.x;
    int out_width = width + before + after, out_height = height + before + after;
    int size = out_height * out_width * 3;
    if (e >= size) return;
    int ch = e % 3, c = (e / 3) % out_width - before, r = e / 3 / out_width - before;
    float value = 0.0f;
    if (r >= 0 && r < height && c >= 0 && c < width) {
        int p = bgr ? 2 - ch : ch;
        int from = flip[n] ? width - 1 - c : c;
        float m = 0.0f;
        if (mean) {
            bool fixed = mean_side == height;
            int row = fixed ? r : corner[2 * n] + r, col = fixed ? c : corner[2 * n + 1] + from;
            m = mean[(row * mean_side + col) * 3 + p];
        }
        float pixel = images[((long long)n * height + r) * width * 3 + from * 3 + p];
        value = ((pixel - m) + shift[3 * n + p]) * scale;
    }
    put(y[(long long)n * size + e], value);
}
