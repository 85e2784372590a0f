/* What kernel.py does with a tile (and gram_norms.py with factors), for the processor that it is compiled on: a chunk of
   elements at a time, from factors to scores, while its gradients lie in a core's own cache. native_kernel.py compiles
   and calls it.

   Samples lie in lanes: a vector holds one number of LANES samples, a block; a tile has BLOCKS of them. Factors are
   packed [block][panel of PANEL features][token][feature of the panel][lane], so that products read one stretch of
   memory and need no sum over lanes; gradients of a chunk are [element][block][lane], as products of pairs read them.
   Lanes without a sample, and tokens that a sample does not have, are 0. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef QKOV_DOUBLE
typedef double real;
typedef int64_t bits;
#define SQRT __builtin_sqrt
#else
typedef float real;
typedef int32_t bits;
#define SQRT __builtin_sqrtf
#endif

#if defined(__AVX512F__) /* 32 registers of 64 bytes */
#define BYTES 64
#define PAIR_COLS 4
#define FORM_ROWS 4
#elif defined(__AVX2__) /* 16 of 32 */
#define BYTES 32
#define PAIR_COLS 2
#define FORM_ROWS 2
#else
#define BYTES 16
#define PAIR_COLS 2
#define FORM_ROWS 2
#endif

#define LANES ((int)(BYTES / sizeof(real)))
#define PANEL 4         /* features that are multiplied with as many others at a time */
#define PAIR_ROWS 6     /* samples i of such a product of pairs; of j there are PAIR_COLS blocks */
#define COL_PANELS 4    /* of a chunk; at most ROW_PANELS rows of them, fewer where samples are many */
#define ROW_PANELS 8
#define CHUNK (ROW_PANELS * COL_PANELS * PANEL * PANEL)
#define CHUNK_BYTES (512 * 1024) /* of gradients and their maps, which a core's own cache should hold */
#define LINE ((int)(64 / sizeof(real))) /* of a cache */
#define TOKENS 96       /* that are added up in registers at a time */

typedef real vec __attribute__((vector_size(BYTES)));
typedef bits mask __attribute__((vector_size(BYTES)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* keeps a vector in its register: compilers would load it again for each product */
#if defined(__x86_64__)
#define HOLD(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define HOLD(v) __asm__("" : "+w"(v))
#else
#define HOLD(v)
#endif

/* stores what is not read soon, past the caches: to fetch lines first that are then overwritten takes twice as long */
#if defined(__AVX512F__)
#define STREAM(to, v) _mm512_stream_si512((__m512i *)(to), (__m512i)(v))
#define FENCE _mm_sfence()
#elif defined(__AVX2__)
#define STREAM(to, v) _mm256_stream_si256((__m256i *)(to), (__m256i)(v))
#define FENCE _mm_sfence()
#else
#define STREAM(to, v) (*(vec *)(to) = (v))
#define FENCE ((void)0)
#endif

enum map { GRADIENT, MAGNITUDE, SQUARE };

/* A tile of one head; native_kernel.py has the same in Python. All [lanes] are BLOCKS * LANES long. */
typedef struct {
    const real *x, *d;                /* packed factors of the whole projection */
    const int64_t *x_at, *d_at;       /* where each block's begin [blocks] */
    const int64_t *tokens;            /* of each block [blocks] */
    int64_t blocks;
    int64_t row, rows, col, cols;     /* the tile among the features that are packed; size = rows * cols */
    int64_t tasks;
    const real *weights;              /* of samples in the Fisher [tasks, lanes] */
    const real *mean_weights;         /* of samples in the mean gradient of their task [tasks, lanes] */
    int64_t own_squares;              /* F of a task is formed with these weights, too; else as in the Fisher */
    double epsilon, ridge, least;     /* least: what the Fisher must reach to count for more than these */
    int64_t left_map, right_map;
    int64_t alike;                    /* both maps are the left one, times the root of 1 / R */
    int64_t half;                     /* scores are a symmetric matrix, of which half is wanted */
    int64_t left, left_end, right, right_end; /* samples in the role of i, and of j */
    real *scores;                     /* [left, right], added to; of half, those on and above the diagonal */
    double *fisher;                   /* least of I, how many are below `least`, sums of tasks [2 + tasks] */
    double *products;                 /* of vectors [2 tasks, 2 tasks + 2], added to; none: no effects are wanted */
    real *influences;                 /* of samples with mean gradients, then with steps [2 tasks, lanes], added to */
    const uint8_t *chosen;            /* at which elements own shares are looked at [size]; none: nowhere */
    const real *own_weights, *rest;   /* of samples in the Fisher, and W / (W - w) of each [lanes] */
    const real *of_tasks;             /* which task a sample is of, 0 and 1 [tasks, lanes] */
    real *own_shares;                 /* sums of own_shares.py [SUMS, tasks, lanes], added to */
    real *scratch;                    /* qkov_scratch() numbers */
} tile;

/* A chunk in work: `num` elements, `across` in a row, of which those in the tile begin at (row, col) of it. Vectors are
   those of influence_sums.py: what tasks add to the Fisher, squares of mean gradients and of steps, 1 / sqrt(R), 1,
   mean gradients, steps; each [CHUNK]. */
typedef struct {
    int64_t row, col, down, across, num;
    vec *gradients, *maps;
    real *vectors, *fisher, *factor;
} chunk;

int64_t qkov_lanes(void) { return LANES; }

int64_t qkov_panel(void) { return PANEL; }

int64_t qkov_scratch(int64_t blocks, int64_t left, int64_t tasks)
{
    return (2 * CHUNK + left + PAIR_ROWS) * blocks * LANES + (5 * tasks + 4) * CHUNK;
}

typedef real part __attribute__((vector_size(16)));

#if !defined(QKOV_DOUBLE) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif

/* Four features of all samples, each sample's in a row of LINE, to where each feature's lanes are. */
INLINE void put_panel(const real (*line)[LINE], int64_t feature, real *to)
{
#ifdef SHUFFLE
    UNROLL for (int first = 0; first < LANES; first += 4) {
        part of[4];
        UNROLL for (int n = 0; n < 4; n++) memcpy(&of[n], line[first + n] + feature, sizeof of[n]);
        const part low = SHUFFLE(of[0], of[1], 0, 4, 1, 5), low_2 = SHUFFLE(of[2], of[3], 0, 4, 1, 5);
        const part high = SHUFFLE(of[0], of[1], 2, 6, 3, 7), high_2 = SHUFFLE(of[2], of[3], 2, 6, 3, 7);
        of[0] = SHUFFLE(low, low_2, 0, 1, 4, 5);
        of[1] = SHUFFLE(low, low_2, 2, 3, 6, 7);
        of[2] = SHUFFLE(high, high_2, 0, 1, 4, 5);
        of[3] = SHUFFLE(high, high_2, 2, 3, 6, 7);
        UNROLL for (int k = 0; k < PANEL; k++) memcpy(to + k * LANES + first, &of[k], sizeof of[k]);
    }
#else
    UNROLL for (int k = 0; k < PANEL; k++)
        UNROLL for (int n = 0; n < LANES; n++) to[k * LANES + n] = line[n][feature + k];
#endif
}

/* Factors [rows, width], of which sample n has `lengths[n]` rows from `starts[n]` on, to those packed of all blocks,
   each times its sample's scale. Samples are [lanes]; those that are not there have no rows. */
void qkov_pack(const real *values, int64_t of_row, int64_t width, const int64_t *starts, const int64_t *lengths,
               const real *scales, int64_t blocks, const int64_t *tokens, const int64_t *at, real *packed)
{
    const int64_t whole = (width + PANEL - 1) / PANEL * PANEL;
    real line[LANES][LINE];
    vec turned[LINE];
    for (int64_t block = 0; block < blocks; block++, starts += LANES, lengths += LANES) {
        const vec scale = scales ? ((const vec *)scales)[block] : (vec){0} + 1;
        for (int64_t token = 0; token < tokens[block]; token++)
            for (int64_t first = 0; first < whole; first += LINE) {
                const int64_t num = width - first < LINE ? width - first : LINE;
                vec *to = (vec *)(packed + at[block]) + (first / PANEL * tokens[block] + token) * PANEL;
                for (int64_t n = 0; n < LANES; n++) {
                    const real *from = values + (starts[n] + token) * of_row + first;
                    if (token >= lengths[n])
                        memset(line[n], 0, sizeof line[n]);
                    else if (num == LINE)
                        memcpy(line[n], from, sizeof line[n]);
                    else
                        for (int64_t k = 0; k < LINE; k++) line[n][k] = k < num ? from[k] : 0;
                }
                UNROLL for (int k = 0; k < LINE; k += PANEL) put_panel(line, k, (real *)(turned + k));
                const int64_t panels = whole - first < LINE ? (whole - first) / PANEL : LINE / PANEL;
                for (int64_t panel = 0; panel < panels; panel++, to += tokens[block] * PANEL)
                    UNROLL for (int k = 0; k < PANEL; k++) STREAM(to + k, turned[panel * PANEL + k] * scale);
            }
    }
    FENCE;
}

typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)))); /* wherever it lies */

INLINE vec all(real value) { return value - (vec){0}; }

INLINE real sum_of(vec v)
{
    part parts[BYTES / 16];
    memcpy(parts, &v, sizeof v);
#if BYTES == 64
    parts[0] += parts[2];
    parts[1] += parts[3];
#endif
#if BYTES >= 32
    parts[0] += parts[1];
#endif
#ifdef QKOV_DOUBLE
    return parts[0][0] + parts[0][1];
#else
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
#endif
}

/* The products of rows i to i + PANEL with rows j to j + PANEL, of FORM_ROWS of the former at a time. */
INLINE void gram_part(const real *const i[PANEL], const real *const j[PANEL], int64_t width, real found[PANEL][PANEL])
{
    const int64_t whole = width / LANES * LANES;
    for (int half = 0; half < PANEL; half += FORM_ROWS) {
        vec sums[FORM_ROWS][PANEL];
        UNROLL for (int r = 0; r < FORM_ROWS; r++)
            UNROLL for (int c = 0; c < PANEL; c++) sums[r][c] = (vec){0};
        for (int64_t k = 0; k < whole; k += LANES) {
            vec of_j[PANEL];
            UNROLL for (int c = 0; c < PANEL; c++)
            {
                of_j[c] = *(const loose *)(j[c] + k);
                HOLD(of_j[c]);
            }
            UNROLL for (int r = 0; r < FORM_ROWS; r++)
            {
                vec of_i = *(const loose *)(i[half + r] + k);
                HOLD(of_i);
                UNROLL for (int c = 0; c < PANEL; c++) sums[r][c] += of_i * of_j[c];
            }
        }
        UNROLL for (int r = 0; r < FORM_ROWS; r++)
            UNROLL for (int c = 0; c < PANEL; c++)
            {
                found[half + r][c] = sum_of(sums[r][c]);
                for (int64_t k = whole; k < width; k++) found[half + r][c] += i[half + r][k] * j[c][k];
            }
    }
}

/* Products of all pairs of tokens of each sample, [samples, tokens, tokens], of factors [samples, tokens, width]. */
void qkov_gram(const real *values, int64_t of_sample, int64_t of_token, int64_t samples, int64_t tokens, int64_t width,
               real *grams)
{
    for (int64_t n = 0; n < samples; n++, values += of_sample, grams += tokens * tokens)
        for (int64_t i = 0; i < tokens; i += PANEL)
            for (int64_t j = 0; j <= i; j += PANEL) {
                const real *rows[PANEL], *others[PANEL];
                real found[PANEL][PANEL];
                for (int k = 0; k < PANEL; k++) { /* past the last token: the last one again */
                    rows[k] = values + (i + k < tokens ? i + k : tokens - 1) * of_token;
                    others[k] = values + (j + k < tokens ? j + k : tokens - 1) * of_token;
                }
                gram_part(rows, others, width, found);
                for (int r = 0; r < PANEL && i + r < tokens; r++)
                    for (int c = 0; c < PANEL && j + c < tokens; c++)
                        grams[(i + r) * tokens + j + c] = grams[(j + c) * tokens + i + r] = found[r][c];
            }
}

INLINE vec mapped(enum map map, vec v)
{
    if (map == SQUARE) return v * v;
    if (map == MAGNITUDE) return (vec)((mask)v & ~((mask){0} + ((bits)1 << (8 * sizeof(real) - 1))));
    return v;
}

/* The products of a panel of d with one of x, over some tokens: PANEL x PANEL vectors, put to `to` or added there. */
INLINE void form(const vec *restrict d, const vec *restrict x, int64_t tokens, vec *restrict to, int64_t of_row,
                 int64_t of_col, int more)
{
    for (int half = 0; half < PANEL; half += FORM_ROWS) {
        const vec *from_d = d + half, *from_x = x;
        vec sums[FORM_ROWS][PANEL];
        UNROLL for (int r = 0; r < FORM_ROWS; r++)
            UNROLL for (int c = 0; c < PANEL; c++) sums[r][c] = (vec){0};
        for (int64_t token = 0; token < tokens; token++, from_d += PANEL, from_x += PANEL) {
            vec of_x[PANEL];
            UNROLL for (int c = 0; c < PANEL; c++)
            {
                of_x[c] = from_x[c];
                HOLD(of_x[c]);
            }
            UNROLL for (int r = 0; r < FORM_ROWS; r++)
            {
                vec of_d = from_d[r];
                HOLD(of_d);
                UNROLL for (int c = 0; c < PANEL; c++) sums[r][c] += of_d * of_x[c];
            }
        }
        UNROLL for (int r = 0; r < FORM_ROWS; r++)
            UNROLL for (int c = 0; c < PANEL; c++)
            {
                vec *at = to + (half + r) * of_row + c * of_col;
                *at = more ? *at + sums[r][c] : sums[r][c];
            }
    }
}

/* The place in the tile of an element of a chunk; -1 where it is beside the tile. */
INLINE int64_t place(const tile *t, const chunk *c, int64_t i, int64_t j)
{
    int64_t row = c->row + i - t->row, col = c->col + j - t->col;
    return row >= 0 && row < t->rows && col >= 0 && col < t->cols ? row * t->cols + col : -1;
}

static void form_gradients(const tile *t, chunk *c)
{
    const int64_t blocks = t->blocks;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t tokens = t->tokens[block];
        const vec *x = (const vec *)(t->x + t->x_at[block]) + c->col * tokens;
        for (int64_t row = 0; row < c->down; row += PANEL) {
            const vec *d = (const vec *)(t->d + t->d_at[block]) + (c->row + row) * tokens;
            vec *to = c->gradients + row * c->across * blocks + block;
            for (int64_t at = 0; at < tokens; at += TOKENS)
                for (int64_t col = 0; col < c->across; col += PANEL)
                    form(d + at * PANEL, x + col * tokens + at * PANEL, tokens - at < TOKENS ? tokens - at : TOKENS,
                         to + col * blocks, c->across * blocks, blocks, at > 0);
        }
    }
    if (place(t, c, 0, 0) < 0 || place(t, c, c->down - 1, c->across - 1) < 0)
        for (int64_t i = 0; i < c->down; i++)
            for (int64_t j = 0; j < c->across; j++)
                if (place(t, c, i, j) < 0)
                    memset(c->gradients + (i * c->across + j) * blocks, 0, sizeof(vec) * blocks);
}

/* Sums of samples' squares, each times its weight. */
static void put_squares(const chunk *c, int64_t blocks, const vec *weights, real *sums)
{
    for (int64_t p = 0; p < c->num; p++) {
        vec sum = {0};
        for (int64_t block = 0; block < blocks; block++) {
            vec v = c->gradients[p * blocks + block];
            sum += weights[block] * (v * v);
        }
        sums[p] = sum_of(sum);
    }
}

/* The Fisher by task, what is known of it, and factor = 1 / R. */
static void regularise(const tile *t, chunk *c)
{
    const int64_t blocks = t->blocks;
    memset(c->fisher, 0, sizeof(real) * c->num);
    for (int64_t task = 0; task < t->tasks; task++) {
        real *of_task = c->vectors + task * CHUNK;
        double total = 0; /* elements beside the tile are 0 */
        put_squares(c, blocks, (const vec *)(t->weights + task * blocks * LANES), of_task);
        for (int64_t p = 0; p < c->num; p++) {
            c->fisher[p] += of_task[p];
            total += of_task[p];
        }
        t->fisher[2 + task] += total;
    }
    for (int64_t i = 0; i < c->down; i++)
        for (int64_t j = 0; j < c->across; j++)
            if (place(t, c, i, j) >= 0) {
                double of_element = c->fisher[i * c->across + j];
                t->fisher[0] = of_element < t->fisher[0] ? of_element : t->fisher[0];
                t->fisher[1] += of_element < (real)t->least;
            }
    const real epsilon = (real)t->epsilon, ridge = (real)t->ridge;
    for (int64_t p = 0; p < c->num; p++)
        c->factor[p] = 1 / ((c->fisher[p] > epsilon ? c->fisher[p] : epsilon) + ridge);
}

/* Mean gradients by task, steps along them, every sample's products with both, and those of vectors. */
static void add_effects(const tile *t, chunk *c)
{
    const int64_t blocks = t->blocks, tasks = t->tasks, num = c->num;
    real *squares = c->vectors + tasks * CHUNK, *root = squares + 2 * tasks * CHUNK, *one = root + CHUNK;
    for (int64_t p = 0; p < num; p++) {
        root[p] = SQRT(c->factor[p]);
        one[p] = 1;
    }
    for (int64_t task = 0; task < tasks; task++) {
        const vec *weights = (const vec *)(t->mean_weights + task * blocks * LANES);
        real *means = one + (1 + task) * CHUNK, *steps = means + tasks * CHUNK;
        real *of_mean = squares + task * CHUNK, *of_step = of_mean + tasks * CHUNK;
        if (t->own_squares) put_squares(c, blocks, weights, c->vectors + task * CHUNK);
        for (int64_t p = 0; p < num; p++) {
            vec sum = {0};
            for (int64_t block = 0; block < blocks; block++) sum += weights[block] * c->gradients[p * blocks + block];
            means[p] = sum_of(sum);
        }
        for (int64_t p = 0; p < num; p++) {
            steps[p] = means[p] * root[p];
            of_mean[p] = means[p] * means[p];
            of_step[p] = steps[p] * steps[p];
        }
        vec *with_means = (vec *)(t->influences + task * blocks * LANES), *with_steps = with_means + tasks * blocks;
        for (int64_t block = 0; block < blocks; block++) {
            vec sums[4] = {{0}};
            for (int64_t p = 0; p < num; p += 2) { /* a chunk has an even number */
                vec this = c->gradients[p * blocks + block], next = c->gradients[(p + 1) * blocks + block];
                sums[0] += means[p] * this;
                sums[1] += steps[p] * this;
                sums[2] += means[p + 1] * next;
                sums[3] += steps[p + 1] * next;
            }
            with_means[block] += sums[0] + sums[2];
            with_steps[block] += sums[1] + sums[3];
        }
    }
    for (int64_t row = 0; row < 2 * tasks; row++)
        for (int64_t col = 0; col < 2 * tasks + 2; col++) {
            const real *left = c->vectors + row * CHUNK, *right = squares + col * CHUNK;
            real parts[16] = {0}; /* an element's place among 16: a chunk has a multiple of that many */
            for (int64_t p = 0; p < num; p += 16)
                for (int k = 0; k < 16; k++) parts[k] += left[p + k] * right[p + k];
            double sum = 0;
            for (int k = 0; k < 16; k++) sum += parts[k];
            t->products[row * (2 * tasks + 2) + col] += sum;
        }
}

/* What samples do through the Fisher at one element, whose gradients are `of` [blocks]: own_shares.py has the formulas,
   here with power 1. Below, `given` is R, and `without` the left map over R without the sample's own share. */
static void add_own_shares_of(const tile *t, chunk *c, const vec *of, real fisher)
{
    const int64_t blocks = t->blocks, tasks = t->tasks;
    const enum map left_map = (enum map)t->left_map, right_map = (enum map)t->right_map;
    const vec *weights = (const vec *)t->own_weights, *rest = (const vec *)t->rest, *masks = (const vec *)t->of_tasks;
    const vec epsilon = all((real)t->epsilon), ridge = all((real)t->ridge);
    const real given = (fisher > (real)t->epsilon ? fisher : (real)t->epsilon) + (real)t->ridge;
    real *of_left = c->vectors, *of_right = of_left + tasks, *of_without = of_right + tasks;
    real *among = of_without + tasks;
    vec *without = c->maps, *lost = without + blocks; /* maps are not there yet */
    for (int64_t block = 0; block < blocks; block++) {
        const vec g = of[block];
        vec others = (all(fisher) - weights[block] * (g * g)) * rest[block];
        const mask large = others > epsilon;
        others = (vec)(((mask)others & large) | ((mask)epsilon & ~large)) + ridge;
        without[block] = mapped(left_map, g) / others;
        lost[block] = all(given) / others - all(1);
    }
    for (int64_t task = 0; task < tasks; task++) {
        vec sums[4] = {{0}};
        for (int64_t block = 0; block < blocks; block++) {
            const vec in = masks[task * blocks + block], right = in * mapped(right_map, of[block]);
            sums[0] += in * mapped(left_map, of[block]);
            sums[1] += right;
            sums[2] += in * without[block];
            sums[3] += right * without[block];
        }
        of_left[task] = sum_of(sums[0]);
        of_right[task] = sum_of(sums[1]);
        of_without[task] = sum_of(sums[2]);
        among[task] = of_without[task] * of_right[task] - sum_of(sums[3]);
    }
    for (int64_t block = 0; block < blocks; block++) {
        const vec left = mapped(left_map, of[block]) / all(given), right = mapped(right_map, of[block]);
        const vec both = without[block] * right, plain = left * right;
        vec own_without = {0}, own_right = {0};
        for (int64_t task = 0; task < tasks; task++) {
            own_without += masks[task * blocks + block] * all(of_without[task]);
            own_right += masks[task * blocks + block] * all(of_right[task]);
        }
        const vec own = both + both - without[block] * own_right - right * own_without;
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t step = tasks * blocks;
            const vec in = masks[task * blocks + block], out = all(1) - in, share = lost[block];
            const vec rights = all(of_right[task]), withouts = all(of_without[task]), pairs = all(among[task]);
            vec *to = (vec *)t->own_shares + task * blocks + block;
            const vec of_task = in * share * (pairs + own);
            to[0] += without[block] * rights - in * both;
            to[step] += right * withouts - in * both;
            to[2 * step] += left * rights - in * plain;
            to[3 * step] += right * all(of_left[task] / given) - in * plain;
            to[4 * step] += of_task + out * share * rights * (own_without - without[block]);
            to[5 * step] += of_task + out * share * withouts * (own_right - right);
            to[6 * step] += of_task + out * share * pairs;
        }
    }
}

static void add_own_shares(const tile *t, chunk *c)
{
    for (int64_t i = 0; i < c->down; i++)
        for (int64_t j = 0; j < c->across; j++) {
            const int64_t at = place(t, c, i, j), p = i * c->across + j;
            if (at >= 0 && t->chosen[at]) add_own_shares_of(t, c, c->gradients + p * t->blocks, c->fisher[p]);
        }
}

/* The left map into maps; the right one takes the place of gradients, if it is another. */
INLINE void map_as(const tile *t, chunk *c, const enum map left, const enum map right, const int alike)
{
    for (int64_t p = 0; p < c->num; p++) {
        const vec factor = all(alike ? SQRT(c->factor[p]) : c->factor[p]);
        for (int64_t n = p * t->blocks; n < (p + 1) * t->blocks; n++) {
            vec v = c->gradients[n];
            c->maps[n] = mapped(left, v) * factor;
            if (!alike) c->gradients[n] = mapped(right, v);
        }
    }
}

static void map_gradients(const tile *t, chunk *c)
{
    if (t->left_map == SQUARE && t->right_map == MAGNITUDE && !t->alike)
        map_as(t, c, SQUARE, MAGNITUDE, 0);
    else
        map_as(t, c, (enum map)t->left_map, (enum map)t->right_map, (int)t->alike);
}

/* PAIR_ROWS samples i times `cols` blocks of samples j, over a chunk's elements. */
INLINE void pair(const real *restrict of_i, const vec *restrict of_j, int64_t blocks, int64_t num, real *restrict to,
                 const int cols)
{
    const int64_t lanes = blocks * LANES;
    vec sums[PAIR_ROWS][PAIR_COLS];
    UNROLL for (int i = 0; i < PAIR_ROWS; i++)
        UNROLL for (int j = 0; j < cols; j++) sums[i][j] = (vec){0};
    for (int64_t p = 0; p < num; p++, of_i += lanes, of_j += blocks) {
        vec right[PAIR_COLS];
        UNROLL for (int j = 0; j < cols; j++) right[j] = of_j[j];
        UNROLL for (int i = 0; i < PAIR_ROWS; i++)
        {
            const vec left = all(of_i[i]);
            UNROLL for (int j = 0; j < cols; j++) sums[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < PAIR_ROWS; i++)
        UNROLL for (int j = 0; j < cols; j++) ((vec *)(to + i * lanes))[j] += sums[i][j];
}

/* Into sums [left + PAIR_ROWS, lanes]. */
static void add_pairs(const tile *t, const chunk *c, real *sums)
{
    const int64_t blocks = t->blocks, lanes = blocks * LANES;
    const int64_t first = t->right / LANES, last = (t->right_end + LANES - 1) / LANES;
    const vec *right = t->alike ? c->maps : c->gradients;
    for (int64_t j = first; j < last; j += PAIR_COLS)
        for (int64_t i = t->left; i < t->left_end; i += PAIR_ROWS) {
            if (t->half && (j + PAIR_COLS) * LANES <= i) break; /* all of it is below the diagonal */
            const real *of_i = (const real *)c->maps + i;
            real *to = sums + (i - t->left) * lanes + j * LANES;
            switch (last - j < PAIR_COLS ? last - j : PAIR_COLS) {
            case 1: pair(of_i, right + j, blocks, c->num, to, 1); break;
#if PAIR_COLS > 2
            case 2: pair(of_i, right + j, blocks, c->num, to, 2); break;
            case 3: pair(of_i, right + j, blocks, c->num, to, 3); break;
#endif
            default: pair(of_i, right + j, blocks, c->num, to, PAIR_COLS);
            }
        }
}

static void add_chunk(const tile *t, chunk *c, real *sums)
{
    form_gradients(t, c);
    regularise(t, c);
    if (t->products) add_effects(t, c);
    if (t->chosen) add_own_shares(t, c);
    map_gradients(t, c);
    add_pairs(t, c, sums);
}

/* Adds a tile's scores, and what else is asked for. Chunks follow one another along the tile's shorter side: its
   factors come again and again from a cache that holds them all, those of the longer one once. */
void qkov_tile(const tile *t)
{
    const int64_t blocks = t->blocks, lanes = blocks * LANES, left = t->left_end - t->left;
    const int64_t shorter = COL_PANELS * PANEL;
    int64_t longer = CHUNK_BYTES / (int64_t)(2 * sizeof(real) * shorter * lanes) / PANEL * PANEL;
    longer = longer < PANEL ? PANEL : longer > ROW_PANELS * PANEL ? ROW_PANELS * PANEL : longer;
    const int by_rows = t->rows > t->cols;
    const int64_t down = by_rows ? shorter : longer, across = by_rows ? longer : shorter;
    chunk c;
    c.gradients = (vec *)t->scratch;
    c.maps = c.gradients + CHUNK * blocks;
    real *sums = (real *)(c.maps + CHUNK * blocks);
    c.vectors = sums + (left + PAIR_ROWS) * lanes;
    c.fisher = c.vectors + (5 * t->tasks + 2) * CHUNK;
    c.factor = c.fisher + CHUNK;
    memset(sums, 0, sizeof(real) * (left + PAIR_ROWS) * lanes);
    const int64_t row_first = t->row / PANEL * PANEL, row_end = t->row + t->rows;
    const int64_t col_first = t->col / PANEL * PANEL, col_end = t->col + t->cols;
    const int64_t num_down = (row_end - row_first + down - 1) / down;
    const int64_t num_across = (col_end - col_first + across - 1) / across;
    for (int64_t n = 0; n < num_down * num_across; n++) {
        c.row = row_first + (by_rows ? n / num_across : n % num_down) * down;
        c.col = col_first + (by_rows ? n % num_across : n / num_down) * across;
        const int64_t rows = (row_end - c.row + PANEL - 1) / PANEL * PANEL;
        const int64_t cols = (col_end - c.col + PANEL - 1) / PANEL * PANEL;
        c.down = rows < down ? rows : down;
        c.across = cols < across ? cols : across;
        c.num = c.down * c.across;
        add_chunk(t, &c, sums);
    }
    const int64_t right = t->right_end - t->right;
    for (int64_t i = 0; i < left; i++)
        for (int64_t j = 0; j < right; j++) t->scores[i * right + j] += sums[i * lanes + t->right + j];
}
