/* What PyTorch does slowly on a CPU at the size of a small trial, in float32: tanh-GELU with its slope, causal
 * attention with dropout, the gradient of a cross-entropy, dropout, sorting rows by expert. Matrix products stay
 * PyTorch's. Compiled at first use by moe/native.py; moe/native.py states each function's contract. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
static inline v8 load(const float *p) { return *(const v8 *)p; }
static inline void store(float *p, v8 x) { *(v8 *)p = x; }

/* exp to about 1 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes); below -87 it is 2^-126, not a denormal. */
float moe_exp_low = -87.0f, moe_exp_high = 88.0f; /* known constants would be folded into branches and slow it down */

static inline float fast_exp(float x) {
    x = x < moe_exp_low ? moe_exp_low : x;
    x = x > moe_exp_high ? moe_exp_high : x;
    float shifted = x * 1.44269504088896341f + 12582912.0f; /* the mantissa now holds round(x / ln 2) */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline uint32_t mix(uint32_t x) { /* lowbias32, C. Wellons */
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ (x >> 16);
}

static inline uint32_t row_key(uint64_t seed, uint64_t row) {
    return mix(mix((uint32_t)row ^ (uint32_t)seed) + (uint32_t)(row >> 32) + (uint32_t)(seed >> 32));
}

/* 1 / (1 - p) where an element of a row is kept, else 0. */
static inline float keep(uint32_t key, uint32_t column, uint32_t threshold, float scale) {
    return mix(key + column * 0x9e3779b9U) >= threshold ? scale : 0.0f;
}

static inline uint32_t drop_threshold(float p) { return (uint32_t)((double)p * 4294967296.0); }

void gelu_forward(float *restrict pre, const float *restrict bias, float *restrict hidden, int64_t rows, int64_t width, int64_t pre_stride,
                  int64_t hidden_stride, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *restrict x_row = pre + r * pre_stride, *restrict h_row = hidden + r * hidden_stride;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            const float k = 1.5957691216057308f, a = 0.044715f; /* 2 sqrt(2/pi) */
            float x = x_row[c] + bias[c], square = x * x;
            float s = 1.0f / (1.0f + fast_exp(-k * x * (1.0f + a * square)));
            h_row[c] = x * s;
            x_row[c] = s + x * s * (1.0f - s) * k * (1.0f + 3.0f * a * square);
        }
    }
}

void scale_by_slope(float *restrict gradient, const float *restrict slope, float *restrict column_sum, int64_t rows,
                    int64_t width, int64_t gradient_stride, int64_t slope_stride) {
    memset(column_sum, 0, width * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        float *restrict g = gradient + r * gradient_stride;
        const float *restrict s = slope + r * slope_stride;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            g[c] *= s[c];
            column_sum[c] += g[c];
        }
    }
}

void sort_rows(const int64_t *slot, int64_t rows, int64_t experts, int64_t *order, int64_t *count) {
    int64_t *next = calloc(experts + 1, sizeof(int64_t));
    for (int64_t r = 0; r < rows; r++) next[slot[r] < 0 ? experts : slot[r]]++;
    memcpy(count, next, experts * sizeof(int64_t));
    int64_t start = 0;
    for (int64_t e = 0; e <= experts; e++) {
        int64_t size = next[e];
        next[e] = start;
        start += size;
    }
    for (int64_t r = 0; r < rows; r++) order[next[slot[r] < 0 ? experts : slot[r]]++] = r;
    free(next);
}

void combine(const float *restrict rows_RD, const int64_t *order, const float *weight, float *restrict y_TD,
             int64_t rows, int64_t tokens, int64_t choices, int64_t width) {
    memset(y_TD, 0, tokens * width * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        float w = weight ? weight[order[r]] : 1.0f;
        float *restrict y = y_TD + (order[r] / choices) * width;
        const float *restrict x = rows_RD + r * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) y[c] += w * x[c];
    }
}

void spread(const float *restrict dy_TD, const float *restrict out_RD, const int64_t *order, const float *weight,
            float *restrict dout_RD, float *restrict dweight, int64_t rows, int64_t choices, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        float w = weight[order[r]], dot = 0.0f;
        const float *restrict dy = dy_TD + (order[r] / choices) * width, *restrict out = out_RD + r * width;
        float *restrict dout = dout_RD + r * width;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < width; c++) {
            dot += dy[c] * out[c];
            dout[c] = w * dy[c];
        }
        dweight[order[r]] = dot;
    }
}

void softmax_gradient(float *restrict logits, const int64_t *label, float *restrict loss, int64_t rows,
                      int64_t vocabulary, int64_t ignore, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *restrict z = logits + r * vocabulary;
        if (label[r] == ignore) {
            memset(z, 0, vocabulary * sizeof(float));
            loss[r] = 0.0f;
            continue;
        }
        float target = z[label[r]], largest = z[0], sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t c = 0; c < vocabulary; c++) largest = z[c] > largest ? z[c] : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < vocabulary; c++) {
            z[c] = fast_exp(z[c] - largest);
            sum += z[c];
        }
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t c = 0; c < vocabulary; c++) z[c] *= inverse;
        z[label[r]] -= 1.0f;
        loss[r] = logf(sum) + largest - target;
    }
}

void dropout(const float *restrict x, float *restrict y, int64_t rows, int64_t width, float p, uint64_t seed) {
    uint32_t threshold = drop_threshold(p);
    float scale = 1.0f / (1.0f - p);
    for (int64_t r = 0; r < rows; r++) {
        uint32_t key = row_key(seed, r);
#pragma omp simd
        for (int c = 0; c < (int)width; c++) y[r * width + c] = x[r * width + c] * keep(key, c, threshold, scale);
    }
}

/* Causal attention. qkv [B, S, 3, H, d]; QUERIES queries at a time against all keys that they may see, KEYS keys a step. */

enum { QUERIES = 6, KEYS = 16 };

static void transpose(const float *restrict x, int64_t stride, float *restrict out, int64_t length, int64_t padded,
                      int64_t d) {
    for (int64_t c = 0; c < d; c++) {
        for (int64_t s = 0; s < length; s++) out[c * padded + s] = x[s * stride + c];
        for (int64_t s = length; s < padded; s++) out[c * padded + s] = 0.0f;
    }
}

/* out[r][j] = scale * sum_c rows[r][c] * columns[c][j] */
static void products(const float *const rows[QUERIES], const float *restrict columns, float *restrict out,
                     int64_t padded, int64_t keys, int64_t d, float scale) {
    for (int64_t j = 0; j < keys; j += KEYS) {
        v8 sum[QUERIES][2];
        memset(sum, 0, sizeof sum);
        for (int64_t c = 0; c < d; c++) {
            v8 low = load(columns + c * padded + j), high = load(columns + c * padded + j + 8);
            for (int r = 0; r < QUERIES; r++) {
                sum[r][0] += rows[r][c] * low;
                sum[r][1] += rows[r][c] * high;
            }
        }
        for (int r = 0; r < QUERIES; r++) {
            store(out + r * padded + j, sum[r][0] * scale);
            store(out + r * padded + j + 8, sum[r][1] * scale);
        }
    }
}

/* out[r][c] = sum_j weight[r][j] * rows[j][c], 16 columns at a time and 8 where no more are left */
static void weighted(const float *restrict weight, int64_t padded, const float *restrict rows, int64_t stride,
                     float *const out[QUERIES], int64_t count, int64_t keys, int64_t d) {
    for (int64_t c = 0; c < d; c += 16) {
        int wide = c + 8 < d;
        v8 sum[QUERIES][2];
        memset(sum, 0, sizeof sum);
        if (wide) {
            for (int64_t j = 0; j < keys; j++) {
                v8 low = load(rows + j * stride + c), high = load(rows + j * stride + c + 8);
                for (int r = 0; r < QUERIES; r++) {
                    sum[r][0] += weight[r * padded + j] * low;
                    sum[r][1] += weight[r * padded + j] * high;
                }
            }
        } else {
            for (int64_t j = 0; j < keys; j++)
                for (int r = 0; r < QUERIES; r++) sum[r][0] += weight[r * padded + j] * load(rows + j * stride + c);
        }
        for (int64_t r = 0; r < count; r++) {
            store(out[r] + c, sum[r][0]);
            if (wide) store(out[r] + c + 8, sum[r][1]);
        }
    }
}

/* out[j][c] += sum_r weight[r][j] * rows[r][c] */
static void outer(const float *restrict weight, int64_t padded, const float *const rows[QUERIES],
                  float *restrict out, int64_t keys, int64_t d) {
    for (int64_t c = 0; c < d; c += 8) {
        v8 row[QUERIES];
        for (int r = 0; r < QUERIES; r++) row[r] = load(rows[r] + c);
        for (int64_t j = 0; j < keys; j++) {
            v8 sum = load(out + j * d + c);
            for (int r = 0; r < QUERIES; r++) sum += weight[r * padded + j] * row[r];
            store(out + j * d + c, sum);
        }
    }
}

void attention_forward(const float *qkv, float *out, float *lse, int64_t batch, int64_t length, int64_t heads,
                       int64_t d, float scale, float p, uint64_t seed, int64_t threads) {
    int64_t padded = (length + KEYS - 1) / KEYS * KEYS, D = heads * d, stride = 3 * D;
    uint32_t threshold = drop_threshold(p);
    float kept = 1.0f / (1.0f - p);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t bh = 0; bh < batch * heads; bh++) {
        const float *q = qkv + bh / heads * length * stride + bh % heads * d, *k = q + D, *v = k + D;
        float *y = out + bh / heads * length * D + bh % heads * d;
        float *keys_T = malloc((d + QUERIES) * padded * sizeof(float)), *score = keys_T + d * padded;
        transpose(k, stride, keys_T, length, padded, d);
        for (int64_t i = 0; i < length; i += QUERIES) {
            int64_t count = length - i < QUERIES ? length - i : QUERIES;
            int64_t seen = (i + count + KEYS - 1) / KEYS * KEYS;
            const float *rows[QUERIES];
            float *result[QUERIES];
            for (int r = 0; r < QUERIES; r++) {
                rows[r] = q + (r < count ? i + r : i) * stride;
                result[r] = y + (r < count ? i + r : i) * D;
            }
            products(rows, keys_T, score, padded, seen, d, scale);
            for (int64_t r = 0; r < count; r++) {
                float *restrict s = score + r * padded, largest = s[0], sum = 0.0f;
                int64_t valid = i + r + 1;
#pragma omp simd reduction(max : largest)
                for (int64_t j = 0; j < valid; j++) largest = s[j] > largest ? s[j] : largest;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < valid; j++) {
                    s[j] = fast_exp(s[j] - largest);
                    sum += s[j];
                }
                float inverse = 1.0f / sum;
                lse[bh * length + i + r] = largest + logf(sum);
                if (p > 0.0f) {
                    uint32_t key = row_key(seed, bh * length + i + r);
#pragma omp simd
                    for (int j = 0; j < (int)valid; j++) s[j] *= inverse * keep(key, j, threshold, kept);
                } else {
#pragma omp simd
                    for (int64_t j = 0; j < valid; j++) s[j] *= inverse;
                }
                for (int64_t j = valid; j < seen; j++) s[j] = 0.0f;
            }
            weighted(score, padded, v, stride, result, count, i + count, d);
        }
        free(keys_T);
    }
}

void attention_backward(const float *qkv, const float *out, const float *dout, const float *lse, float *dqkv,
                        int64_t batch, int64_t length, int64_t heads, int64_t d, float scale, float p, uint64_t seed,
                        int64_t threads) {
    int64_t padded = (length + KEYS - 1) / KEYS * KEYS, D = heads * d, stride = 3 * D;
    uint32_t threshold = drop_threshold(p);
    float kept = 1.0f / (1.0f - p);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t bh = 0; bh < batch * heads; bh++) {
        int64_t at = bh / heads * length * stride + bh % heads * d, flat = bh / heads * length * D + bh % heads * d;
        const float *q = qkv + at, *k = q + D, *v = k + D;
        float *dq = dqkv + at;
        float *keys_T = malloc((4 * d + 2 * QUERIES) * padded * sizeof(float)), *values_T = keys_T + d * padded;
        float *dk = values_T + d * padded, *dv = dk + d * padded;
        float *dscore = dv + d * padded, *score = dscore + QUERIES * padded;
        transpose(k, stride, keys_T, length, padded, d);
        transpose(v, stride, values_T, length, padded, d);
        memset(dk, 0, 2 * d * padded * sizeof(float));
        for (int64_t i = 0; i < length; i += QUERIES) {
            int64_t count = length - i < QUERIES ? length - i : QUERIES;
            int64_t seen = (i + count + KEYS - 1) / KEYS * KEYS;
            const float *rows[QUERIES], *drows[QUERIES];
            float *result[QUERIES];
            for (int r = 0; r < QUERIES; r++) {
                int64_t row = r < count ? i + r : i;
                rows[r] = q + row * stride;
                drows[r] = dout + flat + row * D;
                result[r] = dq + row * stride;
            }
            products(rows, keys_T, score, padded, seen, d, scale);
            products(drows, values_T, dscore, padded, seen, d, 1.0f);
            for (int64_t r = 0; r < QUERIES; r++) {
                float *restrict s = score + r * padded, *restrict ds = dscore + r * padded;
                int64_t valid = r < count ? i + r + 1 : 0;
                if (valid) {
                    const float *o = out + flat + (i + r) * D;
                    float total = 0.0f, norm = lse[bh * length + i + r];
#pragma omp simd reduction(+ : total)
                    for (int64_t c = 0; c < d; c++) total += drows[r][c] * o[c];
                    uint32_t key = row_key(seed, bh * length + i + r);
                    if (p > 0.0f) {
#pragma omp simd
                        for (int j = 0; j < (int)valid; j++) {
                            float share = fast_exp(s[j] - norm), m = keep(key, j, threshold, kept);
                            ds[j] = scale * share * (ds[j] * m - total);
                            s[j] = share * m;
                        }
                    } else {
#pragma omp simd
                        for (int64_t j = 0; j < valid; j++) {
                            s[j] = fast_exp(s[j] - norm);
                            ds[j] = scale * s[j] * (ds[j] - total);
                        }
                    }
                }
                for (int64_t j = valid; j < seen; j++) s[j] = ds[j] = 0.0f;
            }
            weighted(dscore, padded, k, stride, result, count, i + count, d);
            outer(dscore, padded, rows, dk, i + count, d);
            outer(score, padded, drows, dv, i + count, d);
        }
        for (int64_t s = 0; s < length; s++) {
            memcpy(dq + D + s * stride, dk + s * d, d * sizeof(float));
            memcpy(dq + 2 * D + s * stride, dv + s * d, d * sizeof(float));
        }
        free(keys_T);
    }
}
