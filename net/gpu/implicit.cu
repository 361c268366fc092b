// Convolution as a matrix product whose columns are never stored ("implicit GEMM"), for bfloat16 and stride 1:
//
//     y[n, r, c, g, m] = b[g, m] + sum over kh, kw, i of x[n, r + kh - pad, c + kw - pad, g, i] w[kh, kw, i, g, m]
//     dw[kh, kw, i, g, m] = sum over n, r, c of x[n, r + kh - pad, c + kw - pad, g, i] dy[n, r, c, g, m]
//
// for group g, its input channels i and its maps m; bias and a ReLU are added where wanted.
//
// As matrix products, of each group (rows x terms times terms x columns):
//
//     y:    left (pixels x depth) = the windows,        right (depth x maps) = w,    depth = KH * KW * channels/groups
//     dw:   left (depth x pixels) = their transpose,    right (pixels x maps) = dy
//
// dx is y of dy with turned weights (fold.cu). columns.cu writes the matrix of all windows to memory, where it is nine
// to twenty-five times as large as the picture; here a block copies the part of it that it needs next straight from the
// picture into shared memory. Row p of the matrix is the window of output pixel p and column k a place in it, so that
//
//     windows[p, k] = x[corner(p) + offset(k)],    or 0 where corner row + kh or corner column + kw leaves the picture
//
// where corner(p) is the place of the window's upper left pixel and offset(k) that of (kh, kw, i) from there. Both are
// worked out once (struct Place) and added for each copy. 8 neighbouring k are 8 neighbouring channels: 16 bytes.
//
// A block of four warps computes 128 rows x COLS columns of a product, and goes along the sum in slices of 64 terms:
//
//     copy slices 0 .. stages - 2                                         each ends a group of cp.async
//     for each slice s:
//         wait for the group of s; barrier                                all threads' copies of s are there, and all
//                                                                         have finished with slice s - 1
//         multiply slice s, copy slice s + stages - 1 beside it           into the buffer that slice s - 1 had
//     write the 128 x COLS sums
//
// The buffers are a ring of `stages`, so that copies are on their way while the tensor cores work. On Hopper
// (-DHOPPER) the four warps together hand two products of 64 x COLS x 16 at a time to the tensor cores, which read both
// operands from shared memory by themselves (wgmma), so the multiplication is started before the copies are; on other
// cards each warp fetches operands of its own part into registers, 16 x 8 x 16 at a time (mma.sync), and the copies are
// started first. Products are of bfloat16, sums float32.
//
// The file has parts: shared memory; the tensor cores' instructions, for Hopper and for the others; what both kernels
// do; y (and dx); dw.
//
// The instructions have a body in C++ beside them, by which the tests run this file on the CPU.

#ifdef BF16

#define BLOCK 128
#define ROWS 128
#define DEPTH 64  // terms of the sum in one slice
#define OUTSIDE (-(1 << 14))

// --- shared memory -------------------------------------------------------------------------------------------------

// Operands lie in shared memory in panels of 64 values (128 bytes) a row; wider ones in several panels behind each
// other. The eight 16-byte pieces of a row are exchanged among each other by the row's number, so that the same piece
// of eight neighbouring rows lies in eight different groups of four banks. Hopper's tensor cores know this order as
// "128-byte swizzle".
#define PANEL (DEPTH * 64)  // values in a panel of 64 rows

__device__ __forceinline__ int place_in_panel(int row, int piece) { return row * 64 + (piece ^ row % 8) * 8; }

// Copies 16 bytes to shared memory in the background, or fills with zeros. Past the first-level cache: what is left of
// that beside shared memory is too small to hold a window's pixels until they are wanted again.
__device__ __forceinline__ void copy_async(real* to, const real* from, bool inside) {
#ifdef SHIM
    for (int v = 0; v < 8; v++) to[v].bits = inside ? from[v].bits : 0;
#elif __CUDA_ARCH__ >= 800
    uint32 address = (uint32)__cvta_generic_to_shared(to), bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#endif
}

// Everything this thread has asked for since the last call is one group.
__device__ __forceinline__ void end_group() {
#if !defined(SHIM) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most LEFT of this thread's groups are on their way.
template <int LEFT>
__device__ __forceinline__ void wait_groups() {
#if !defined(SHIM) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// --- the tensor cores ----------------------------------------------------------------------------------------------

#ifdef HOPPER

// Where a thread's results lie in the block's 128 x COLS: pairs of neighbours, in two rows eight apart.
template <int COLS>
struct Tile {
    static constexpr int DOWN = 2, RIGHT = COLS / 8;  // sum[DOWN][RIGHT][4]
    static __device__ __forceinline__ int row(int i) { return i * 64 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int col(int j) { return j * 8 + threadIdx.x % 4 * 2; }
};

#ifndef SHIM
// What tells the tensor cores where an operand lies: 128-byte swizzle, eight rows are 1024 bytes, panels `panel` bytes.
__device__ __forceinline__ uint64 descriptor(const real* from) {
    uint64 address = (uint64)((uint32)__cvta_generic_to_shared(from) & 0x3ffff) >> 4;
    return address | (uint64)(PANEL * sizeof(real) >> 4) << 16 | (uint64)(1024 >> 4) << 32 | (uint64)1 << 62;
}

#define SUM(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SUMS_6 SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5)
#define SUMS_12 SUMS_6, SUM(6), SUM(7), SUM(8), SUM(9), SUM(10), SUM(11)
#define SUMS_16 SUMS_12, SUM(12), SUM(13), SUM(14), SUM(15)
#define NAMES_24 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_48                                                                                                      \
    NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
             "%44, %45, %46, %47"
#define NAMES_64 \
    NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT(COLS, NAMES, SUMS, A, B, TURNED)                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.bf16.bf16 {" NAMES "}, %" #A ", %" #B      \
                 ", 1, 1, 1, %" #TURNED ", 1;"                                                                 \
                 : SUMS                                                                                        \
                 : "l"(a), "l"(b), "n"(TRANSPOSED))
#endif

// c += a b: 64 rows, COLS columns, and the 16 terms from k on. Terms are the rows of `right` in shared memory, and of
// `left` where TRANSPOSED; else they run along the rows of `left`.
template <int COLS, bool TRANSPOSED>
__device__ __forceinline__ void multiply_add(float (&c)[COLS / 8][4], const real* left, const real* right, int k) {
#ifdef SHIM
    for (int term = k; term < k + 16; term++)
        for (int j = 0; j < COLS / 8; j++)
            for (int v = 0; v < 4; v++) {
                int m = Tile<COLS>::row(0) + v / 2 * 8, n = Tile<COLS>::col(j) + v % 2;
                real a = TRANSPOSED ? left[place_in_panel(term, m / 8) + m % 8]
                                    : left[place_in_panel(m, term / 8) + term % 8];
                real b = right[n / 64 * PANEL + place_in_panel(term, n % 64 / 8) + n % 8];
                c[j][v] += to_float(a) * to_float(b);
            }
#else
    uint64 a = descriptor(left + (TRANSPOSED ? k * 64 : k)), b = descriptor(right + k * 64);
    if constexpr (COLS == 128) PRODUCT(128, NAMES_64, SUMS_16, 64, 65, 66);
    if constexpr (COLS == 96) PRODUCT(96, NAMES_48, SUMS_12, 48, 49, 50);
    if constexpr (COLS == 48) PRODUCT(48, NAMES_24, SUMS_6, 24, 25, 26);
#endif
}

// Hands one slice to the tensor cores, which work on it while the threads go on.
template <int COLS, bool TRANSPOSED>
__device__ __forceinline__ void start_products(float (&sum)[2][COLS / 8][4], const real* left, const real* right) {
#ifndef SHIM
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16)
#pragma unroll
        for (int i = 0; i < 2; i++) multiply_add<COLS, TRANSPOSED>(sum[i], left + i * PANEL, right, k);
#ifndef SHIM
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until the tensor cores have finished.
__device__ __forceinline__ void finish_products() {
#ifndef SHIM
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// What the threads have copied to shared memory is to be seen by the tensor cores, which go there by a way of their
// own.
__device__ __forceinline__ void publish() {
#ifndef SHIM
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#else  // any card from compute capability 8.0 on

// Two warps side by side compute 64 rows each, or, of a narrow tile, four below each other 32 rows each.
template <int COLS>
struct Tile {
    static constexpr int ACROSS = COLS > 64 ? 2 : 1, M = ROWS / 4 * ACROSS, N = COLS / ACROSS;  // of a warp
    static constexpr int DOWN = M / 16, RIGHT = N / 8;                                          // sum[DOWN][RIGHT][4]
    static __device__ __forceinline__ int top() { return threadIdx.x / 32 / ACROSS * M; }
    static __device__ __forceinline__ int side() { return threadIdx.x / 32 % ACROSS * N; }
    static __device__ __forceinline__ int row(int i) { return top() + i * 16 + threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int col(int j) { return side() + j * 8 + threadIdx.x % 4 * 2; }
};

// Four matrices of 8 x 8 values; lane l names row l % 8 of matrix l / 8. Lane l then holds of each matrix the values
// (l / 4, 2 (l % 4)) and the one beside it, or, transposed, (2 (l % 4), l / 4) and the one below it.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32 (&x)[4], const real* row) {
#ifdef SHIM
    const void* const* rows = shim::exchange(row);
    int lane = threadIdx.x % 32, down = lane / 4, right = lane % 4 * 2;
    for (int q = 0; q < 4; q++) {
        auto value = [&](int r, int c) { return (uint32) static_cast<const real*>(rows[8 * q + r])[c].bits; };
        x[q] = TRANSPOSED ? value(right, down) | value(right + 1, down) << 16
                          : value(down, right) | value(down, right + 1) << 16;
    }
    shim::warp_barrier();
#elif __CUDA_ARCH__ >= 800
    uint32 address = (uint32)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
#endif
}

// c += a b for a 16 x 16, b 16 x 8, c 16 x 8, spread over the warp. Lane l holds of c (l / 4, 2 (l % 4)), the value
// beside it, and the two eight rows further down.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#ifdef SHIM
    struct Fragments {
        uint32 a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const void* const* all = shim::exchange(&mine);
    auto of = [&](int lane) { return static_cast<const Fragments*>(all[lane]); };
    auto half = [](uint32 pair, int k) { return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16); };
    int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 4; i++) {
            float left = half(of(row * 4 + k % 8 / 2)->a[i / 2 + k / 8 * 2], k);
            float right = half(of((col + i % 2) * 4 + k % 8 / 2)->b[k / 8], k);
            c[i] += left * right;
        }
    shim::warp_barrier();
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// One slice: the warp's part of the product. Terms are the rows of `right`, and of `left` where TRANSPOSED.
template <int COLS, bool TRANSPOSED>
__device__ __forceinline__ void start_products(
    float (&sum)[Tile<COLS>::DOWN][Tile<COLS>::RIGHT][4], const real* left, const real* right) {
    constexpr int DOWN = Tile<COLS>::DOWN, RIGHT = Tile<COLS>::RIGHT;
    int lane = threadIdx.x % 32, top = Tile<COLS>::top(), side = Tile<COLS>::side();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32 b[RIGHT / 2][4];
#pragma unroll
        for (int j = 0; j < RIGHT / 2; j++) {
            int piece = side / 8 + j * 2 + lane / 16;
            load_matrices<true>(b[j], right + piece / 8 * PANEL + place_in_panel(k + lane % 16, piece % 8));
        }
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            uint32 a[4];
            int m = top + i * 16;
            if (TRANSPOSED) {
                int piece = m / 8 + lane / 8 % 2, term = k + lane / 16 * 8 + lane % 8;
                load_matrices<true>(a, left + piece / 8 * PANEL + place_in_panel(term, piece % 8));
            } else {
                load_matrices<false>(a, left + place_in_panel(m + lane % 16, k / 8 + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < RIGHT; j++) multiply_add(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

__device__ __forceinline__ void finish_products() {}
__device__ __forceinline__ void publish() {}

#endif

// --- what both kernels do ------------------------------------------------------------------------------------------

// Where a place of the window lies relative to its corner: in memory, and in rows and columns.
struct Place {
    int offset;
    short row, col;
};

// The place of 8 neighbouring values of the sum, number `vector`, in group g; OUTSIDE beyond the window's end.
__device__ __forceinline__ Place window_place(
    int vector, int depth, int each, int g, int kernel_w, int width, int channels) {
    Place place = {0, OUTSIDE, 0};
    if (vector * 8 < depth) {
        int k = vector * 8, i = k % each, kw = k / each % kernel_w, kh = k / each / kernel_w;
        place = {(kh * width + kw) * channels + g * each + i, (short)kh, (short)kw};
    }
    return place;
}

// The upper left corner of the window of output pixel p, likewise relative to the pictures' start.
__device__ __forceinline__ Place window_corner(
    int p, int pixels, int out_height, int out_width, int pad, int height, int width, int channels) {
    Place place = {0, OUTSIDE, 0};
    if (p < pixels) {
        int c = p % out_width - pad, r = p / out_width % out_height - pad, image = p / out_width / out_height;
        place = {((image * height + r) * width + c) * channels, (short)r, (short)c};
    }
    return place;
}

__device__ __forceinline__ void copy_pixel(
    real* to, const real* x, const Place& corner, const Place& place, int height, int width) {
    int row = corner.row + place.row, col = corner.col + place.col;
    bool inside = row >= 0 && row < height && col >= 0 && col < width;
    copy_async(to, x + (inside ? corner.offset + place.offset : 0), inside);
}

// 64 rows of COLS values, from a matrix whose rows are `stride` apart; beyond `have` rows or `cols` columns: zeros.
template <int COLS>
__device__ __forceinline__ void copy_rows(real* to, const real* from, int have, int cols, int stride) {
    constexpr int ACROSS = COLS / 8, DOWN = BLOCK / ACROSS;
    int piece = threadIdx.x % ACROSS, first = threadIdx.x / ACROSS;
    if (first >= DOWN) return;
    bool column = piece * 8 < cols;
#pragma unroll
    for (int row = first; row < DEPTH; row += DOWN) {
        bool inside = column && row < have;
        copy_async(to + piece / 8 * PANEL + place_in_panel(row, piece % 8),
                   from + (inside ? (long long)row * stride + piece * 8 : 0), inside);
    }
}

// Waits until the slice to be worked on is there (all but the newest `stages` - 2 groups), and everyone has finished
// with the one before, whose buffer is the next to be filled.
__device__ __forceinline__ void wait_for_slice(int stages) {
    if (stages == 2)
        wait_groups<0>();
    else if (stages == 3)
        wait_groups<1>();
    else
        wait_groups<2>();
    publish();
    __syncthreads();
}

// --- y -------------------------------------------------------------------------------------------------------------

// x (images, height, width, channels), w (KH, KW, channels/groups, maps), y (images, out_height, out_width, maps).
// Grid: tiles of pixels x groups x tiles of maps, the last fastest, so that neighbours read the same pixels. b may be
// null; with `rectify` a ReLU follows. Shared memory: `stages` slices of both operands, then the places of the window.
template <int COLS>
__device__ __forceinline__ void convolve(
    const real* x, const real* w, const float* b, real* y, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int rectify, int stages) {
    constexpr int STAGE = ROWS * DEPTH + (COLS + 63) / 64 * PANEL;
    extern __shared__ __align__(1024) uint8 shared[];
    real* buffers = reinterpret_cast<real*>(shared);
    Place* places = reinterpret_cast<Place*>(buffers + stages * STAGE);
    int each = channels / groups, maps_each = maps / groups, tiles = (maps_each + COLS - 1) / COLS;
    int first_map = blockIdx.x % tiles * COLS, g = blockIdx.x / tiles % groups;
    int first_pixel = blockIdx.x / tiles / groups * ROWS;
    int slices = (depth + DEPTH - 1) / DEPTH;
    const real* weights = w + g * maps_each + first_map;

    for (int v = threadIdx.x; v < slices * DEPTH / 8; v += BLOCK)
        places[v] = window_place(v, depth, each, g, kernel_w, width, channels);
    // This thread copies one piece of every 16th row.
    constexpr int DOWN = BLOCK * 8 / DEPTH;
    int piece = threadIdx.x % (DEPTH / 8), row = threadIdx.x / (DEPTH / 8);
    Place corners[ROWS / DOWN];
#pragma unroll
    for (int j = 0; j < ROWS / DOWN; j++)
        corners[j] = window_corner(
            first_pixel + row + j * DOWN, pixels, out_height, out_width, pad, height, width, channels);
    __syncthreads();  // places are written by some threads and read by all

    auto copy_slice = [&](int slice) {
        real* to = buffers + slice % stages * STAGE;
        Place place = places[slice * (DEPTH / 8) + piece];
#pragma unroll
        for (int j = 0; j < ROWS / DOWN; j++)
            copy_pixel(to + place_in_panel(row + j * DOWN, piece), x, corners[j], place, height, width);
        copy_rows<COLS>(to + ROWS * DEPTH, weights + (long long)slice * DEPTH * maps, depth - slice * DEPTH,
                        maps_each - first_map, maps);
    };
    float sum[Tile<COLS>::DOWN][Tile<COLS>::RIGHT][4] = {};
    for (int slice = 0; slice < stages - 1; slice++) {
        if (slice < slices) copy_slice(slice);
        end_group();
    }
    for (int slice = 0; slice < slices; slice++) {
        wait_for_slice(stages);
        const real* now = buffers + slice % stages * STAGE;
#ifdef HOPPER
        start_products<COLS, false>(sum, now, now + ROWS * DEPTH);
#endif
        if (slice + stages - 1 < slices) copy_slice(slice + stages - 1);
        end_group();
#ifndef HOPPER
        start_products<COLS, false>(sum, now, now + ROWS * DEPTH);
#endif
        finish_products();
    }
    wait_groups<0>();
    __syncthreads();

    // Through shared memory, so that the results leave in 16-byte pieces. All have finished with the last slice, whose
    // buffer is overwritten. Lines are 8 values longer than the tile, so that rows begin in different banks.
    constexpr int LINE = COLS + 8;
#pragma unroll
    for (int j = 0; j < Tile<COLS>::RIGHT; j++) {
        int col = Tile<COLS>::col(j);
        float shift[2] = {0.0f, 0.0f};
        if (b && first_map + col < maps_each) load<2>(b + g * maps_each + first_map + col, shift);
#pragma unroll
        for (int i = 0; i < Tile<COLS>::DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float value[2] = {sum[i][j][half * 2] + shift[0], sum[i][j][half * 2 + 1] + shift[1]};
                if (rectify) value[0] = relu(value[0]), value[1] = relu(value[1]);
                store<2>(buffers + (Tile<COLS>::row(i) + half * 8) * LINE + col, value);
            }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < ROWS * (COLS / 8); place += BLOCK) {
        int down = place / (COLS / 8), right = place % (COLS / 8) * 8;
        if (first_pixel + down >= pixels || first_map + right >= maps_each) continue;
        real* to = y + (long long)(first_pixel + down) * maps + g * maps_each + first_map + right;
        *reinterpret_cast<Pack<real, 8>*>(to) = *reinterpret_cast<const Pack<real, 8>*>(buffers + down * LINE + right);
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) convolve_128(
    const real* x, const real* w, const float* b, real* y, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int rectify, int stages) {
    convolve<128>(x, w, b, y, pixels, height, width, channels, depth, kernel_w, pad, out_height, out_width, groups,
                  maps, rectify, stages);
}

extern "C" __global__ void __launch_bounds__(128, 2) convolve_96(
    const real* x, const real* w, const float* b, real* y, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int rectify, int stages) {
    convolve<96>(x, w, b, y, pixels, height, width, channels, depth, kernel_w, pad, out_height, out_width, groups, maps,
                 rectify, stages);
}

extern "C" __global__ void __launch_bounds__(128, 3) convolve_48(
    const real* x, const real* w, const float* b, real* y, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int rectify, int stages) {
    convolve<48>(x, w, b, y, pixels, height, width, channels, depth, kernel_w, pad, out_height, out_width, groups, maps,
                 rectify, stages);
}

// --- dw ------------------------------------------------------------------------------------------------------------

// The sum runs over the pixels, which are many, while dw is small: gridDim.y blocks each sum a stretch of `stretch`
// pixels (a multiple of 64) of the same 128 x COLS values into `partial` (gridDim.y, depth, maps), and add_parts adds
// those in a fixed order. Grid x: tiles of the window x groups x tiles of maps. Shared memory: the slices, then the
// corners of two slices' pixels.
template <int COLS>
__device__ __forceinline__ void weight_gradient(
    const real* x, const real* dy, float* partial, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int stretch, int stages) {
    constexpr int STAGE = ROWS * DEPTH + (COLS + 63) / 64 * PANEL;
    extern __shared__ __align__(1024) uint8 shared[];
    real* buffers = reinterpret_cast<real*>(shared);
    Place* corners = reinterpret_cast<Place*>(buffers + stages * STAGE);
    int each = channels / groups, maps_each = maps / groups, tiles = (maps_each + COLS - 1) / COLS;
    int first_map = blockIdx.x % tiles * COLS, g = blockIdx.x / tiles % groups;
    int first_place = blockIdx.x / tiles / groups * ROWS;
    int first_pixel = blockIdx.y * stretch, end = min(pixels, first_pixel + stretch);
    int slices = (end - first_pixel + DEPTH - 1) / DEPTH;

    constexpr int DOWN = BLOCK * 8 / ROWS;
    int piece = threadIdx.x % (ROWS / 8), row = threadIdx.x / (ROWS / 8);
    Place place = window_place(first_place / 8 + piece, depth, each, g, kernel_w, width, channels);
    // Corners are found by a thread each and read by all one slice later.
    auto find_corners = [&](int slice) {
        if (threadIdx.x < DEPTH)
            corners[slice % 2 * DEPTH + threadIdx.x] = window_corner(
                first_pixel + slice * DEPTH + threadIdx.x, end, out_height, out_width, pad, height, width, channels);
    };
    auto copy_slice = [&](int slice) {
        real* to = buffers + slice % stages * STAGE;
#pragma unroll
        for (int j = 0; j < DEPTH / DOWN; j++)
            copy_pixel(to + piece / 8 * PANEL + place_in_panel(row + j * DOWN, piece % 8), x,
                       corners[slice % 2 * DEPTH + row + j * DOWN], place, height, width);
        long long pixel = first_pixel + slice * DEPTH;
        copy_rows<COLS>(to + ROWS * DEPTH, dy + pixel * maps + g * maps_each + first_map, end - (int)pixel,
                        maps_each - first_map, maps);
    };
    float sum[Tile<COLS>::DOWN][Tile<COLS>::RIGHT][4] = {};
    find_corners(0);
    for (int slice = 0; slice < stages - 1; slice++) {
        __syncthreads();  // this slice's corners are there; those that the next ones replace have been read
        if (slice < slices) copy_slice(slice);
        end_group();
        find_corners(slice + 1);
    }
    for (int slice = 0; slice < slices; slice++) {
        wait_for_slice(stages);
        const real* now = buffers + slice % stages * STAGE;
#ifdef HOPPER
        start_products<COLS, true>(sum, now, now + ROWS * DEPTH);
#endif
        if (slice + stages - 1 < slices) copy_slice(slice + stages - 1);
        end_group();
        find_corners(slice + stages);
#ifndef HOPPER
        start_products<COLS, true>(sum, now, now + ROWS * DEPTH);
#endif
        finish_products();
    }
    wait_groups<0>();
#pragma unroll
    for (int i = 0; i < Tile<COLS>::DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int k = first_place + Tile<COLS>::row(i) + half * 8;
            float* to = partial + ((long long)blockIdx.y * depth + k) * maps + g * maps_each + first_map;
#pragma unroll
            for (int j = 0; j < Tile<COLS>::RIGHT; j++) {
                int col = Tile<COLS>::col(j);
                float value[2] = {sum[i][j][half * 2], sum[i][j][half * 2 + 1]};
                if (k < depth && first_map + col < maps_each) store<2>(to + col, value);
            }
        }
}

extern "C" __global__ void __launch_bounds__(128, 2) weight_gradient_128(
    const real* x, const real* dy, float* partial, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int stretch, int stages) {
    weight_gradient<128>(x, dy, partial, pixels, height, width, channels, depth, kernel_w, pad, out_height, out_width,
                         groups, maps, stretch, stages);
}

extern "C" __global__ void __launch_bounds__(128, 2) weight_gradient_96(
    const real* x, const real* dy, float* partial, int pixels, int height, int width, int channels, int depth,
    int kernel_w, int pad, int out_height, int out_width, int groups, int maps, int stretch, int stages) {
    weight_gradient<96>(x, dy, partial, pixels, height, width, channels, depth, kernel_w, pad, out_height, out_width,
                         groups, maps, stretch, stages);
}

// dw (kernel_h, kernel_w, each, maps) from partial (parts, depth, maps). Where the picture was folded (`fold` > 1) the
// partial sums are those of the folded weights. Four maps a thread.
extern "C" __global__ void __launch_bounds__(THREADS) add_parts(
    const float* partial, float* dw, int parts, int depth, int size, int kernel_w, int each, int maps, int fold) {
    int e = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (e >= size) return;
    int map = e % maps, k = e / maps;
    if (fold > 1) {
        int i = k % each, kw = k / each % kernel_w, kh = k / each / kernel_w, across = (kernel_w + fold - 1) / fold;
        k = (((kh / fold * across + kw / fold) * fold + kh % fold) * fold + kw % fold) * each + i;
    }
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, part[4];
    for (int p = 0; p < parts; p++) {
        load<4>(partial + ((long long)p * depth + k) * maps + map, part);
#pragma unroll
        for (int v = 0; v < 4; v++) total[v] += part[v];
    }
    store<4>(dw + e, total);
}

#endif
