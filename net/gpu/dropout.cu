// Dropout (paper, section 4.2): y = x * scale where the unit is kept, else 0. The same kernel is its own gradient.
//
// Element e is kept where word e % 4 of Philox4x32-10 with counter (e / 4, layer, step, step >> 32) and key (seed,
// seed >> 32) is below floor(keep * 2^32) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the
// mask is a function of seed, step, layer and place, the same on every backend, and nothing need be saved. The step
// is read from device memory where `step_words` says how many 32-bit words it has, so that a recorded graph can be
// replayed at other steps. The element's place counts from the batch's first row, `first` rows before x's: read from
// device memory too where `first_at` is given. Four elements a thread.

__device__ __forceinline__ void philox(uint32 (&counter)[4], uint32 key0, uint32 key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64 a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
        uint32 next0 = (uint32)(b >> 32) ^ counter[1] ^ key0, next2 = (uint32)(a >> 32) ^ counter[3] ^ key1;
        counter[1] = (uint32)b;
        counter[3] = (uint32)a;
        counter[0] = next0;
        counter[2] = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) dropout(
    const real* x, real* y, long long size, uint64 threshold, float scale, uint32 layer, uint64 seed, uint64 step,
    const uint32* step_at, int step_words, uint64 first, const uint32* first_at, long long width) {
    uint64 start = (first_at ? first_at[0] : first) * width, block = (uint64)blockIdx.x * THREADS + threadIdx.x;
    long long e = (long long)(block * 4) - (long long)(start % 4);
    if (e >= size) return;
    if (step_words > 0) step = step_at[0] | (step_words > 1 ? (uint64)step_at[1] << 32 : 0);
    uint32 words[4] = {(uint32)(start / 4 + block), layer, (uint32)step, (uint32)(step >> 32)};
    philox(words, (uint32)seed, (uint32)(seed >> 32));
#pragma unroll
    for (int v = 0; v < 4; v++)
        if (e + v >= 0 && e + v < size)
            put(y[e + v], to_float(x[e + v]) * (words[v] < threshold ? 1.0f : 0.0f) * scale);
}
