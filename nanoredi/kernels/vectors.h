/* What the C files share: vectors of fp32, as long as there are registers for and heads of -DSIZE=E are a multiple of;
tensors stored in fp32 or, with -DIN_BF16=1, in bf16; powers of 2. */

#include <stdint.h>
#include <string.h>

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

static inline Floats wide(const Stored *x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

/* To the nearest, of two as near the even one. */
static inline void narrow(Stored *x, Floats value) {
    Words bits = (Words)value;
    bits += 0x7fff + (bits >> 16 & 1);
    Halves halves = __builtin_convertvector(bits >> 16, Halves);
    memcpy(x, &halves, sizeof halves);
}
#else
typedef float Stored;

static inline Floats wide(const Stored *x) { return load(x); }

static inline void narrow(Stored *x, Floats value) { store(x, value); }
#endif

static const float LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

/* b where it is NaN. */
static inline Floats larger(Floats a, Floats b) {
    Integers first = a > b;
    return (Floats)((first & (Integers)a) | (~first & (Integers)b));
}

/* 2^x = 2^whole * e^f, |f| <= log(2) / 2, of x <= 0, to a few units in fp32's last place; next to nothing below -126. */
static inline Floats power_of_2(Floats x) {
    x = larger((Floats){0} - 126, x);
    Integers whole = __builtin_convertvector(x - 0.5f, Integers);
    Floats f = (x - __builtin_convertvector(whole, Floats)) * LOG_2;
    Floats e = 1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
    return e * (Floats)((whole + 127) << 23);
}

/* Over a vector: the sum; halves are added until four are left. */
static inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four fours[LANES / 4];
    memcpy(fours, &x, sizeof x);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) fours[i] += fours[half + i];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

/* And the largest. */
static inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
