/* One new token a row attends to its row's pages, on a CPU: what decode.py's Triton kernel does, in the same terms.

Compiled for one shape: -DSIZE=E, a multiple of 16, -DGROUP=H/K, -DPAGE=tokens a page, and -DIN_BF16=1 or 0 for
the pool's dtype. A page's scores are made at once, brought to weights, and its values are weighed; meanwhile what comes next
is asked of the memory, for a page's keys and values lie too far apart for a processor to foresee them.
*/

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { VECTORS = SIZE / LANES };
/* Vectors whose sums, for every query of the group, stay in registers while a page's values are gone over. */
enum { TILE = VECTORS % 4 == 0 && GROUP <= 3 ? 4 : VECTORS % 2 == 0 && GROUP <= 6 ? 2 : 1 };

typedef float Floats __attribute__((vector_size(4 * LANES)));

#if IN_BF16
typedef uint16_t Stored;
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

static inline Floats wide(const Stored *x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}
#else
typedef float Stored;

static inline Floats wide(const Stored *x) {
    Floats floats;
    memcpy(&floats, x, sizeof floats);
    return floats;
}
#endif

static inline void ask_for(const Stored *token) {
    for (unsigned at = 0; at < SIZE * sizeof(Stored); at += 64) __builtin_prefetch((const char *)token + at);
}

static inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four fours[LANES / 4];
    memcpy(fours, &x, sizeof x);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) fours[i] += fours[half + i];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

/* 2^x of x <= 0, to a few units in fp32's last place; next to nothing below -126. 2^x = 2^whole * e^f, |f| <= log(2)/2. */
static inline float power_of_2(float x) {
    x = x < -126 ? -126 : x;
    int32_t whole = (int32_t)(x - 0.5f);
    float f = (x - (float)whole) * 0.693147181f;
    float e = 1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
    union { int32_t bits; float value; } power = {(whole + 127) << 23};
    return e * power.value;
}

/* q (B, H, E) fp32, keys and values (P, K, page, E), page_table (B, ...) with its rows table_stride apart, lengths (B,)
-> outs (B, H, splits, E), tops and sums (B, H, splits). */
void decode(const float *q, const Stored *keys, const Stored *values, const int64_t *page_table, const int64_t *lengths,
            float *outs, float *tops, float *sums, int64_t table_stride, int64_t num_rows, int64_t num_kv_heads,
            int64_t num_splits, float scale) {
    const float log2e = 1.44269504f;
#pragma omp parallel for schedule(dynamic)
    for (int64_t program = 0; program < num_rows * num_kv_heads * num_splits; program++) {
        int64_t split = program % num_splits, k = program / num_splits % num_kv_heads;
        int64_t b = program / num_splits / num_kv_heads;
        int64_t num_pages = (lengths[b] + PAGE - 1) / PAGE;
        int64_t start = num_pages * split / num_splits, end = num_pages * (split + 1) / num_splits;
        int64_t head = (b * num_kv_heads + k) * GROUP; /* of all rows' heads */

        Floats queries[GROUP][VECTORS], out[VECTORS][GROUP];
        float top[GROUP], total[GROUP];
        memset(out, 0, sizeof out);
        memcpy(queries, q + head * SIZE, sizeof queries);
        for (int g = 0; g < GROUP; g++) {
            top[g] = -1e30f; /* not -inf: a split without tokens is put together with the others */
            total[g] = 0;
            for (int i = 0; i < VECTORS; i++) queries[g][i] *= scale * log2e;
        }
        const int64_t *table = page_table + b * table_stride;
        for (int64_t number = start; number < end; number++) {
            int64_t here = (table[number] * num_kv_heads + k) * PAGE * SIZE;
            int64_t next = (table[number + 1 < end ? number + 1 : number] * num_kv_heads + k) * PAGE * SIZE;
            int count = number + 1 < num_pages ? PAGE : (int)(lengths[b] - number * PAGE);
            float weights[GROUP][PAGE];
            for (int t = 0; t < count; t++) {
                ask_for(values + here + t * SIZE);
                Floats scores[GROUP] = {0};
                for (int i = 0; i < VECTORS; i++) {
                    Floats key = wide(keys + here + t * SIZE + i * LANES);
                    for (int g = 0; g < GROUP; g++) scores[g] += queries[g][i] * key;
                }
                for (int g = 0; g < GROUP; g++) weights[g][t] = sum(scores[g]);
            }
            for (int g = 0; g < GROUP; g++) {
                float new_top = top[g], added = 0;
#pragma omp simd reduction(max : new_top)
                for (int t = 0; t < count; t++) new_top = weights[g][t] > new_top ? weights[g][t] : new_top;
#pragma omp simd reduction(+ : added)
                for (int t = 0; t < count; t++) added += weights[g][t] = power_of_2(weights[g][t] - new_top);
                float shrink = power_of_2(top[g] - new_top);
                total[g] = total[g] * shrink + added;
                top[g] = new_top;
                for (int i = 0; i < VECTORS; i++) out[i][g] *= shrink;
            }
            for (int t = 0; t < count; t++) ask_for(keys + next + t * SIZE);
            for (int i = 0; i < VECTORS; i += TILE) {
                Floats tile[TILE][GROUP];
                memcpy(tile, out[i], sizeof tile);
                for (int t = 0; t < count; t++)
                    for (int j = 0; j < TILE; j++) {
                        Floats value = wide(values + here + t * SIZE + (i + j) * LANES);
                        for (int g = 0; g < GROUP; g++) tile[j][g] += weights[g][t] * value;
                    }
                memcpy(out[i], tile, sizeof tile);
            }
        }
        for (int g = 0; g < GROUP; g++) {
            int64_t place = (head + g) * num_splits + split;
            tops[place] = top[g] / log2e;
            sums[place] = total[g];
            for (int i = 0; i < VECTORS; i++) memcpy(outs + place * SIZE + i * LANES, &out[i][g], sizeof(Floats));
        }
    }
}
