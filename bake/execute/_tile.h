/* Sums of one kind of processor: included by _products.c once for each, with

TILE    the name of the function
TARGET  its attribute: what the processor can do
BYTES   of a vector
WIDE    vectors side by side in a tile, so that all of a tile's fit into the registers */

#define LANES (BYTES / (Py_ssize_t)sizeof(float))
#define COLUMNS (WIDE * LANES)
#define NAMED(part) JOINED(TILE, part)

enum { WIDTH_OF(TILE) = COLUMNS };

typedef float NAMED(_vector) __attribute__((vector_size(BYTES), aligned(4)));

/* Add the products of `ranks` columns of some left rows and rows of the panel to a tile, or begin it with them. */
INLINE void NAMED(_multiply)(const float *const left[HEIGHT], const float *panel, Py_ssize_t ranks, int is_first,
                             float *restrict tile) {
    NAMED(_vector) sums[HEIGHT][WIDE] = {{{0}}};
    for (Py_ssize_t k = 0; k < ranks; k++)
#pragma GCC unroll 8
        for (int row = 0; row < HEIGHT; row++)
#pragma GCC unroll 8
            for (int i = 0; i < WIDE; i++)
                sums[row][i] += left[row][k] * *(const NAMED(_vector) *)(panel + k * COLUMNS + i * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < HEIGHT; row++)
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; i++) {
            NAMED(_vector) *out = (NAMED(_vector) *)(tile + row * COLUMNS + i * LANES);
            *out = is_first ? sums[row][i] : *out + sums[row][i];
        }
}

/* `fuse` for one source and target. */
INLINE Py_ssize_t NAMED(_fuse)(const struct fusion *it, enum dtype source, enum dtype target) {
    const Py_ssize_t size = source == F32 ? 4 : 2;
    Py_ssize_t found = 0;
    uint32_t bad = 0;
    uint8_t open[HEIGHT][COLUMNS] = {{0}};
    float tile[HEIGHT * COLUMNS];
    for (Py_ssize_t column = 0; column < it->columns; column += COLUMNS) {
        Py_ssize_t count = it->columns - column < COLUMNS ? it->columns - column : COLUMNS;
        const float *panel = it->right + column * it->rank;
        for (Py_ssize_t first = 0; first < it->rows; first += HEIGHT) {
            Py_ssize_t rows = it->rows - first < HEIGHT ? it->rows - first : HEIGHT;
            const float *left[HEIGHT];
            for (Py_ssize_t row = 0; row < HEIGHT; row++) {
                Py_ssize_t place = first + (row < rows ? row : 0);
                left[row] = it->left + place * it->rank;
                /* Needed when the products are there, and too far apart for the processor to foresee. */
                __builtin_prefetch((const char *)it->stored + (place * it->columns + column) * size);
                __builtin_prefetch((const char *)it->stored + (place * it->columns + column + count - 1) * size);
                __builtin_prefetch(it->out + place * it->columns + column, 1);
                __builtin_prefetch(it->out + place * it->columns + column + count - 1, 1);
            }
            for (Py_ssize_t k = 0; k < it->rank; k += DEPTH) {
                const float *from[HEIGHT];
                for (int row = 0; row < HEIGHT; row++)
                    from[row] = left[row] + k;
                NAMED(_multiply)(from, panel + k * COLUMNS, it->rank - k < DEPTH ? it->rank - k : DEPTH, k == 0, tile);
            }
            for (Py_ssize_t row = 0; row < rows; row++) {
                Py_ssize_t place = (first + row) * it->columns + column;
                const float *update = tile + row * COLUMNS;
                bad |= settle_some((const char *)it->stored + place * size, source, update, it->tall[first + row],
                                   it->wide + column, target, it->out + place, open[row], count);
                if (first + row >= it->sample && (first + row - it->sample) % it->step == 0)
                    memcpy(it->samples + (first + row - it->sample) / it->step * it->columns + column, update,
                           (size_t)count * sizeof(float));
            }
            for (Py_ssize_t row = 0; row < rows; row++)
                found = add_open(open[row], (first + row) * it->columns + column, count, it->places, found);
        }
    }
    return bad ? -1 : found;
}

TARGET
static Py_ssize_t TILE(const struct fusion *it, enum dtype source, enum dtype target) {
    if (target == F16)
        switch (source) {
        case F16:
            return NAMED(_fuse)(it, F16, F16);
        case BF16:
            return NAMED(_fuse)(it, BF16, F16);
        default:
            return NAMED(_fuse)(it, F32, F16);
        }
    switch (source) {
    case F16:
        return NAMED(_fuse)(it, F16, BF16);
    case BF16:
        return NAMED(_fuse)(it, BF16, BF16);
    default:
        return NAMED(_fuse)(it, F32, BF16);
    }
}

#undef TILE
#undef TARGET
#undef BYTES
#undef WIDE
#undef LANES
#undef COLUMNS
#undef NAMED
