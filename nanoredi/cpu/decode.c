/* Decode attention on a CPU: the C version of paged_attention.py's Triton kernel, with its formulas and terms.

Compiled for one shape: -DSIZE=E, a multiple of 4, -DGROUP=H/K, -DPAGE=tokens a page, and -DIN_BF16=1 or 0 for the
pool's dtype. A page at a time: its scores, their weights, the weighted sum of its values. The next keys and values are
prefetched meanwhile, since they are too far away for the processor's own prefetcher.
*/

#include "vectors.h"

enum { VECTORS = SIZE / LANES, SCORES = (PAGE + LANES - 1) / LANES * LANES };
/* Vectors whose sums stay in registers, for every query of the group, during the loop over a page's values. */
enum { TILE = VECTORS % 4 == 0 && GROUP <= 3 ? 4 : VECTORS % 2 == 0 && GROUP <= 6 ? 2 : 1 };

static inline void prefetch(const Stored *token) {
    for (unsigned at = 0; at < SIZE * sizeof(Stored); at += 64) __builtin_prefetch((const char *)token + at);
}

/* q (B, H, E) fp32, keys and values (P, K, page, E), page_table (B, ...) with its rows table_stride apart, lengths (B,)
-> outs (B, H, spans, E), maxima and sums (B, H, spans). A span has span_pages pages, or fewer at a row's end. */
void decode(const float *q, const Stored *keys, const Stored *values, const int64_t *page_table, const int64_t *lengths,
            float *outs, float *maxima, float *sums, int64_t table_stride, int64_t num_rows, int64_t num_kv_heads,
            int64_t num_spans, int64_t span_pages, float scale) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t program = 0; program < num_rows * num_kv_heads * num_spans; program++) {
        int64_t span = program % num_spans, k = program / num_spans % num_kv_heads;
        int64_t b = program / num_spans / num_kv_heads;
        int64_t num_pages = (lengths[b] + PAGE - 1) / PAGE;
        int64_t start = span * span_pages, end = start + span_pages < num_pages ? start + span_pages : num_pages;
        int64_t head = (b * num_kv_heads + k) * GROUP; /* of all rows' heads */

        Floats queries[VECTORS][GROUP], out[VECTORS][GROUP];
        float m[GROUP], total[GROUP];
        for (int g = 0; g < GROUP; g++) {
            m[g] = -1e30f; /* not -inf, since spans without tokens are combined with the others */
            total[g] = 0;
            for (int i = 0; i < VECTORS; i++) {
                queries[i][g] = load(q + (head + g) * SIZE + i * LANES) * (scale * LOG2_E);
                out[i][g] = (Floats){0};
            }
        }
        const int64_t *table = page_table + b * table_stride;
        for (int64_t number = start; number < end; number++) {
            int64_t here = (table[number] * num_kv_heads + k) * PAGE * SIZE;
            int64_t next = (table[number + 1 < end ? number + 1 : number] * num_kv_heads + k) * PAGE * SIZE;
            int count = number + 1 < num_pages ? PAGE : (int)(lengths[b] - number * PAGE);
            float weights[GROUP][SCORES];
            for (int t = 0; t < count; t++) {
                prefetch(values + here + t * SIZE);
                Floats scores[GROUP] = {0};
                for (int i = 0; i < VECTORS; i++) {
                    Floats key = wide(keys + here + t * SIZE + i * LANES);
                    for (int g = 0; g < GROUP; g++) scores[g] += queries[i][g] * key;
                }
                for (int g = 0; g < GROUP; g++) weights[g][t] = sum(scores[g]);
            }
            for (int g = 0; g < GROUP; g++) {
                for (int t = count; t < SCORES; t++) weights[g][t] = -1e30f;
                Floats high = load(weights[g]), added = {0};
                for (int t = LANES; t < SCORES; t += LANES) high = larger(high, load(weights[g] + t));
                float new_m = largest(high) > m[g] ? largest(high) : m[g];
                for (int t = 0; t < SCORES; t += LANES) {
                    Floats some = power_of_2(load(weights[g] + t) - new_m);
                    store(weights[g] + t, some);
                    added += some;
                }
                float shrink = power_of_2((Floats){0} + (m[g] - new_m))[0];
                total[g] = total[g] * shrink + sum(added);
                m[g] = new_m;
                for (int i = 0; i < VECTORS; i++) out[i][g] *= shrink;
            }
            for (int t = 0; t < count; t++) prefetch(keys + next + t * SIZE);
            for (int i = 0; i < VECTORS; i += TILE) {
                Floats tile[TILE][GROUP];
                for (int j = 0; j < TILE; j++)
                    for (int g = 0; g < GROUP; g++) tile[j][g] = out[i + j][g];
                for (int t = 0; t < count; t++)
                    for (int j = 0; j < TILE; j++) {
                        Floats value = wide(values + here + t * SIZE + (i + j) * LANES);
                        for (int g = 0; g < GROUP; g++) tile[j][g] += weights[g][t] * value;
                    }
                for (int j = 0; j < TILE; j++)
                    for (int g = 0; g < GROUP; g++) out[i + j][g] = tile[j][g];
            }
        }
        for (int g = 0; g < GROUP; g++) {
            int64_t index = (head + g) * num_spans + span;
            maxima[index] = m[g] * LOG_2;
            sums[index] = total[g];
            for (int i = 0; i < VECTORS; i++) store(outs + index * SIZE + i * LANES, out[i][g]);
        }
    }
}
