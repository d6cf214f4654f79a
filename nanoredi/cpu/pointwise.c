/* The pointwise parts of a block on a CPU, forward and backward: RMSNorm (formulas in norm.py), SwiGLU and the rotary
embedding; and the size of AdamW's update. Each is one pass over its tensors in fp32, rounded once at the end.

Compiled with -DSIZE=a divisor of the rows' sizes, and -DIN_BF16=1 or 0 for the tensors' dtype.
*/

#include <math.h>

#include "vectors.h"

/* x (n, d), weight (d,) -> out (n, d), and r (n,). */
void rms_norm(const Stored *x, const float *weight, Stored *out, float *r, int64_t n, int64_t d, float eps) {
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++) {
        Floats squares = {0};
        for (int64_t i = t * d; i < (t + 1) * d; i += LANES) squares += wide(x + i) * wide(x + i);
        r[t] = 1 / sqrt((double)sum(squares) / d + eps);
        for (int64_t i = 0; i < d; i += LANES) narrow(out + t * d + i, wide(x + t * d + i) * r[t] * load(weight + i));
    }
}

/* From out's grad (n, d): grad_x (n, d), and for each of num_parts parts of the rows grad_weight (num_parts, d). */
void rms_norm_backward(const Stored *x, const float *weight, const float *r, const Stored *grad, Stored *grad_x,
                       float *grad_weight, int64_t n, int64_t d, int64_t num_parts) {
#pragma omp parallel for
    for (int64_t part = 0; part < num_parts; part++) {
        float *sums = grad_weight + part * d;
        memset(sums, 0, d * sizeof(float));
        for (int64_t t = n * part / num_parts; t < n * (part + 1) / num_parts; t++) {
            const Stored *x_row = x + t * d, *grad_row = grad + t * d;
            Floats along = {0};
            for (int64_t i = 0; i < d; i += LANES) {
                Floats product = wide(grad_row + i) * wide(x_row + i);
                along += product * load(weight + i);
                store(sums + i, load(sums + i) + product * r[t]);
            }
            float share = sum(along) * r[t] * r[t] / d;
            for (int64_t i = 0; i < d; i += LANES)
                narrow(grad_x + t * d + i, (wide(grad_row + i) * load(weight + i) - wide(x_row + i) * share) * r[t]);
        }
    }
}

static inline Floats sigmoid(Floats x) {
    Integers positive = x >= 0;
    Floats e = power_of_e((Floats)((Integers)x | INT32_MIN)); /* of -|x| */
    Integers above = (positive & (Integers)((Floats){0} + 1)) | (~positive & (Integers)e);
    return (Floats)above / (1 + e);
}

/* gate and up (count,) -> out (count,): gate * sigmoid(gate) * up. */
void swiglu(const Stored *gate, const Stored *up, Stored *out, int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += LANES) {
        Floats x = wide(gate + i);
        narrow(out + i, x * sigmoid(x) * wide(up + i));
    }
}

/* And grad (count,), out's -> out once more, grad_gate and grad_up (count,). */
void swiglu_backward(const Stored *gate, const Stored *up, const Stored *grad, Stored *out, Stored *grad_gate,
                     Stored *grad_up, int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += LANES) {
        Floats x = wide(gate + i), y = wide(up + i), g = wide(grad + i), s = sigmoid(x);
        narrow(out + i, x * s * y);
        narrow(grad_gate + i, g * y * s * (1 + x * (1 - s)));
        narrow(grad_up + i, g * x * s);
    }
}

/* x (n, heads, e), cos and sin (n, e) -> out (n, heads, e): x * cos + (x, its halves exchanged) * sin * sign. */
void rotate(const Stored *x, const Stored *cos, const Stored *sin, Stored *out, int64_t n, int64_t heads, int64_t e,
            float sign) {
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++)
        for (int64_t at = t * heads * e; at < (t + 1) * heads * e; at += e)
            for (int64_t i = 0, half = e / 2; i < half; i += LANES) {
                Floats a = wide(x + at + i), b = wide(x + at + half + i);
                narrow(out + at + i, a * wide(cos + t * e + i) + b * wide(sin + t * e + i) * sign);
                narrow(out + at + half + i, b * wide(cos + t * e + half + i) + a * wide(sin + t * e + half + i) * sign);
            }
}

static inline Floats square_root(Floats x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
}

/* new, mean and mean_square (n,) -> squares, one for each PIECE numbers: of AdamW's last step (optimizer.py). */
void update_square(const float *new, const float *mean, const float *mean_square, float *squares, int64_t n,
                   int64_t piece, float rate, float correction, float eps, float decayed) {
#pragma omp parallel for
    for (int64_t start = 0; start < n; start += piece) {
        Floats square = {0};
        for (int64_t i = start; i < n && i < start + piece; i += LANES) {
            Floats root = square_root(load(mean_square + i) / correction);
            Floats step = rate * load(mean + i) / (root + eps) + decayed * load(new + i);
            square += step * step;
        }
        squares[start / piece] = sum(square) / ((1 - decayed) * (1 - decayed));
    }
}
