/* Shared by the C files: fp32 vectors of the CPU's longest kind that divides -DSIZE; tensors stored in fp32 or, with
-DIN_BF16=1, in bf16; powers of 2. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && SIZE % 16 == 0
enum { LANES = 16 };
#elif defined(__AVX__) && SIZE % 8 == 0
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float *x) {
    Floats floats;
    memcpy(&floats, x, sizeof floats);
    return floats;
}

static inline void store(float *x, Floats value) { memcpy(x, &value, sizeof value); }

#if IN_BF16
typedef uint16_t Stored;
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

static inline float wide_one(const Stored *x) {
    uint32_t bits = (uint32_t)*x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline Floats wide(const Stored *x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

/* Rounds to nearest, ties to even. */
static inline void narrow(Stored *x, Floats value) {
    Words bits = (Words)value;
    bits += 0x7fff + (bits >> 16 & 1);
    Halves halves = __builtin_convertvector(bits >> 16, Halves);
    memcpy(x, &halves, sizeof halves);
}
#else
typedef float Stored;

static inline float wide_one(const Stored *x) { return *x; }

static inline Floats wide(const Stored *x) { return load(x); }

static inline void narrow(Stored *x, Floats value) { store(x, value); }
#endif

static const float LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

/* e^f for |f| <= log(2) / 2, within one unit in fp32's last place. */
static inline Floats series(Floats f) {
    Floats rest = 1 / 24.f + f * (1 / 120.f + f * (1 / 720.f + f * (1 / 5040.f)));
    return 1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * rest)));
}

/* `larger` gives b where b is NaN; `rounded` is for x <= 0; `scaled` is x * 2^whole for a whole number from -126 on. */
#if defined(__AVX512F__) && SIZE % 16 == 0
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }

static inline Floats rounded(Floats x) { return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }

static inline Floats scaled(Floats x, Floats whole) { return (Floats)_mm512_scalef_ps((__m512)x, (__m512)whole); }
#else
static inline Floats larger(Floats a, Floats b) {
    Integers first = a > b;
    return (Floats)((first & (Integers)a) | (~first & (Integers)b));
}

static inline Floats rounded(Floats x) {
    return __builtin_convertvector(__builtin_convertvector(x - 0.5f, Integers), Floats);
}

static inline Floats scaled(Floats x, Floats whole) {
    return x * (Floats)((__builtin_convertvector(whole, Integers) + 127) << 23);
}
#endif

/* 2^x for x <= 0; below -126 it is 2^-126. */
static inline Floats power_of_2(Floats x) {
    x = larger((Floats){0} - 126, x);
    Floats whole = rounded(x);
    return scaled(series((x - whole) * LOG_2), whole);
}

/* e^x for x <= 0; below -87 it is e^-87. x - whole * log(2) is computed in two steps, the first of which is exact. */
static inline Floats power_of_e(Floats x) {
    x = larger((Floats){0} - 87, x);
    Floats whole = rounded(x * LOG2_E);
    return scaled(series(x - whole * 0.693359375f + whole * 2.12194440e-4f), whole);
}

/* The sum of a vector's elements; halves are added until four are left. */
static inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four fours[LANES / 4];
    memcpy(fours, &x, sizeof x);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) fours[i] += fours[half + i];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

/* The largest element. */
static inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
