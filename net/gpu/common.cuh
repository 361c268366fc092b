// What the kernels share: how activations are stored, vectors of them, and the ReLU.
//
// `real` is the type that activations are stored in: float, or with -DBF16 bfloat16 (the upper half of a float's
// bits). Arithmetic is always done in float. This text is put in front of every .cu file of this folder when it is
// compiled; the files use no header of CUDA's.

typedef unsigned char uint8;
typedef unsigned int uint32;
typedef unsigned long long uint64;

struct bf16 {
    unsigned short bits;
};

#ifdef BF16
typedef bf16 real;
#else
typedef float real;
#endif

// Threads that a block of the elementwise kernels has.
#define THREADS 256

#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)
#define INFINITE __uint_as_float(0x7f800000u)

// bfloat16 holds the upper half of a float's bits; rounding is to nearest, ties to even.
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32)x.bits << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ bf16 round_to_bf16(float x) {
    bf16 y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(SHIM)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    uint32 bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = nan ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return y;
}

__device__ __forceinline__ void put(bf16& to, float x) { to = round_to_bf16(x); }
__device__ __forceinline__ void put(float& to, float x) { to = x; }

// V neighbours moved at once. The address must be a multiple of their size.
template <typename T, int V>
struct __align__(sizeof(T) * V) Pack {
    T at[V];
};

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&x)[V]) {
    Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = to_float(pack.at[v]);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&x)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) put(pack.at[v], x[v]);
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Elements of `real` in 16 bytes, the widest access a thread has.
#define WIDE ((int)(16 / sizeof(real)))

// By the bits, because comparisons take subnormal numbers for zero. NaN passes through.
__device__ __forceinline__ bool positive(float x) { return __float_as_int(x) > 0 && !isnan(x); }
__device__ __forceinline__ float relu(float x) { return __float_as_int(x) < 0 && !isnan(x) ? 0.0f : x; }

// Square root and reciprocal by the hardware's own instructions, off by an ulp or two; the IEEE ones take ten times as
// many instructions, and kernels that normalise are bound by those.
__device__ __forceinline__ float fast_sqrt(float x) {
#ifdef SHIM
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef SHIM
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// s^-beta. The paper's beta = 3/4 needs two roots where powf needs a logarithm and an exponential.
__device__ __forceinline__ float power(float s, float beta) {
    if (beta == 0.75f) {
        float r = rsqrtf(s);
        return r * fast_sqrt(r);
    }
    return powf(s, -beta);
}
