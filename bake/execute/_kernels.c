/* The loops over all elements of a tensor that NumPy would need many passes for.

Each does what a function of bake/execute/plain/rounding.py or sums.py says and does with NumPy where this module was
not built; both write the same bytes, which the tests hold them to. Every floating-point operation is meant as it
stands: no fusing, no reordering.

Arrays come as buffers that lie side by side in memory. They have to have the sizes that are said; their contents
may be anything. */

#include "_elements.h"

/* Compiled several times; the program takes what its processor knows when it is started. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Set floats or doubles to stored numbers; 1 if some half has no value. */
INLINE int widen_as(const void *restrict stored, enum dtype dtype, void *restrict out, int is_double, Py_ssize_t count) {
    uint32_t bad = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        bad |= has_no_value(stored, i, dtype);
        if (is_double)
            ((double *)out)[i] = value_of(stored, i, dtype);
        else
            ((float *)out)[i] = value_of(stored, i, dtype);
    }
    return bad != 0;
}

FOR_EACH_PROCESSOR
static int widen_all(const void *stored, enum dtype dtype, void *out, int is_double, Py_ssize_t count) {
    switch (dtype) {
    case F16:
        return is_double ? widen_as(stored, F16, out, 1, count) : widen_as(stored, F16, out, 0, count);
    case BF16:
        return is_double ? widen_as(stored, BF16, out, 1, count) : widen_as(stored, BF16, out, 0, count);
    default:
        return is_double ? widen_as(stored, F32, out, 1, count) : widen_as(stored, F32, out, 0, count);
    }
}

/* Round floats or doubles; 1 if something is not finite then. */
INLINE int narrow_to(const void *restrict values, int is_double, enum dtype target, uint16_t *restrict out,
                     Py_ssize_t count) {
    uint32_t bad = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        double value = is_double ? ((const double *)values)[i] : ((const float *)values)[i];
        uint32_t bits = rounded(value, target);
        bad |= bits >= infinity(target);
        out[i] = signed_bits(bits, value);
    }
    return bad != 0;
}

FOR_EACH_PROCESSOR
static int narrow_all(const void *values, int is_double, enum dtype target, uint16_t *out, Py_ssize_t count) {
    if (target == F16)
        return is_double ? narrow_to(values, 1, F16, out, count) : narrow_to(values, 0, F16, out, count);
    return is_double ? narrow_to(values, 1, BF16, out, count) : narrow_to(values, 0, BF16, out, count);
}

/* settle */

struct sum {
    const void *stored;  /* rows * columns */
    const float *update; /* likewise */
    const float *tall;   /* rows; or NULL: then every element has its own bound */
    const float *wide;   /* columns; or rows * columns */
    Py_ssize_t rows, columns;
};

/* How many places are open, which go to `places`; -1 if something may be too large. */
INLINE Py_ssize_t settle_all(const struct sum *sum, enum dtype source, enum dtype target, uint16_t *out,
                             int64_t *places) {
    const Py_ssize_t size = source == F32 ? 4 : 2;
    Py_ssize_t found = 0;
    uint32_t bad = 0;
    uint8_t open[AT_ONCE] = {0};
    for (Py_ssize_t row = 0; row < sum->rows; row++) {
        for (Py_ssize_t column = 0; column < sum->columns; column += AT_ONCE) {
            Py_ssize_t first = row * sum->columns + column, left = sum->columns - column;
            Py_ssize_t count = left < AT_ONCE ? left : AT_ONCE;
            bad |= settle_some((const char *)sum->stored + first * size, source, sum->update + first,
                               sum->tall ? sum->tall[row] : 1.0f, sum->wide + (sum->tall ? column : first), target,
                               out + first, open, count);
            found = add_open(open, first, count, places, found);
        }
    }
    return bad ? -1 : found;
}

FOR_EACH_PROCESSOR
static Py_ssize_t settle_any(const struct sum *sum, enum dtype source, enum dtype target, uint16_t *out,
                             int64_t *places) {
    if (target == F16)
        switch (source) {
        case F16:
            return settle_all(sum, F16, F16, out, places);
        case BF16:
            return settle_all(sum, BF16, F16, out, places);
        default:
            return settle_all(sum, F32, F16, out, places);
        }
    switch (source) {
    case F16:
        return settle_all(sum, F16, BF16, out, places);
    case BF16:
        return settle_all(sum, BF16, BF16, out, places);
    default:
        return settle_all(sum, F32, BF16, out, places);
    }
}

/* The elements that are left open, one by one */

struct region {
    const double *left; /* height * rank: the scaled left factor */
    const float *right; /* width * rank: the right factor, the ranks of a column side by side */
    const float *tall;  /* height: the norms of the rows */
    const float *wide;  /* width: the norms of the columns */
    Py_ssize_t height, width, rank;
    Py_ssize_t row, column; /* the region's first ones, in what `places` count */
};

/* The sum of all products in the order that docs/numerics.md has; `products` has room for them. */
INLINE double dot_as_defined(const double *left, const float *right, Py_ssize_t rank, double *restrict products) {
    for (Py_ssize_t k = 0; k < rank; k++)
        products[k] = left[k] * right[k];
    Py_ssize_t half = 1;
    while (half < rank)
        half *= 2;
    for (Py_ssize_t length = rank; length > 1; length = half) {
        half /= 2;
        for (Py_ssize_t k = 0; k < length - half; k++)
            products[k] += products[half + k];
    }
    return products[0];
}

#define LANES 16

/* The same in whatever order is fast. */
INLINE double dot(const double *left, const float *right, Py_ssize_t rank) {
    double sums[LANES] = {0}, total = 0;
    Py_ssize_t k = 0;
    for (; k + LANES <= rank; k += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += left[k + lane] * right[k + lane];
    for (; k < rank; k++)
        total += left[k] * right[k];
    for (int lane = 0; lane < LANES; lane++)
        total += sums[lane];
    return total;
}

/* Add the sum of all products to each total. With `norms`: in any order, and what bounds the products to those. */
FOR_EACH_PROCESSOR
static void add_all(const struct region *region, const int64_t *places, Py_ssize_t count, Py_ssize_t columns,
                    double *restrict totals, double *restrict norms, double *restrict products) {
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t row = (Py_ssize_t)(places[i] / columns) - region->row;
        Py_ssize_t column = (Py_ssize_t)(places[i] % columns) - region->column;
        if (row < 0 || row >= region->height || column < 0 || column >= region->width)
            continue;
        const double *left = region->left + row * region->rank;
        const float *right = region->right + column * region->rank;
        if (norms) {
            totals[i] += dot(left, right, region->rank);
            norms[i] += (double)region->tall[row] * region->wide[column];
        } else
            totals[i] += dot_as_defined(left, right, region->rank, products);
    }
}

/* Write W plus its total, rounded once, to every place; -1 if that is not finite for one of them.

With `norms` the sum may be share * norm and some roundings away: how many places that leaves open, which are moved to
the front. */
INLINE Py_ssize_t finish_all(const void *stored, enum dtype source, int64_t *places, const double *totals,
                             const double *norms, double share, enum dtype target, uint16_t *out, Py_ssize_t count) {
    Py_ssize_t open = 0;
    uint32_t bad = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t place = (Py_ssize_t)places[i];
        double value = totals[i] + value_of(stored, place, source);
        double bound = norms ? norms[i] * share + fabs(value) * 0x1p-51 : 0;
        uint32_t bits = rounded(value - bound, target);
        bad |= bits >= infinity(target);
        out[place] = signed_bits(bits, value - bound);
        places[open] = place; /* overwritten if it is not */
        open += norms && out[place] != signed_bits(rounded(value + bound, target), value + bound);
    }
    return bad ? -1 : open;
}

/* Python's side */

static PyObject *widen(PyObject *module, PyObject *args) {
    Py_buffer stored, out;
    const char *tag;
    enum dtype dtype;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*sw*:widen", &stored, &tag, &out))
        return NULL;
    if (dtype_of(tag, &dtype)) {
        Py_ssize_t count = stored.len / size_of(dtype);
        int is_double = out.len == count * 8, bad;
        if (fits(is_double || out.len == count * 4)) {
            Py_BEGIN_ALLOW_THREADS
            bad = widen_all(stored.buf, dtype, out.buf, is_double, count);
            Py_END_ALLOW_THREADS
            result = PyBool_FromLong(!bad);
        }
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *narrow(PyObject *module, PyObject *args) {
    Py_buffer values, out;
    const char *tag;
    enum dtype dtype;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*sw*:narrow", &values, &tag, &out))
        return NULL;
    if (target_of(tag, &dtype)) {
        Py_ssize_t count = out.len / 2;
        int is_double = values.len == count * 8, bad;
        if (fits(is_double || values.len == count * 4)) {
            Py_BEGIN_ALLOW_THREADS
            bad = narrow_all(values.buf, is_double, dtype, out.buf, count);
            Py_END_ALLOW_THREADS
            result = PyBool_FromLong(!bad);
        }
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *settle(PyObject *module, PyObject *args) {
    Py_buffer stored, update, tall, wide, out, places;
    const char *source_tag, *target_tag;
    enum dtype source, target;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*sy*z*y*sw*w*:settle", &stored, &source_tag, &update, &tall, &wide, &target_tag, &out,
                          &places))
        return NULL;
    if (dtype_of(source_tag, &source) && target_of(target_tag, &target)) {
        struct sum sum = {stored.buf, update.buf, tall.buf, wide.buf, tall.buf ? tall.len / 4 : 1, wide.len / 4};
        Py_ssize_t count = sum.rows * sum.columns, found;
        if (fits(stored.len == count * size_of(source) && update.len == count * 4 && out.len == count * 2 &&
                 places.len >= count * 8)) {
            Py_BEGIN_ALLOW_THREADS
            found = settle_any(&sum, source, target, out.buf, places.buf);
            Py_END_ALLOW_THREADS
            result = PyLong_FromSsize_t(found);
        }
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&update);
    PyBuffer_Release(&tall);
    PyBuffer_Release(&wide);
    PyBuffer_Release(&out);
    PyBuffer_Release(&places);
    return result;
}

static PyObject *add_products(PyObject *module, PyObject *args) {
    Py_buffer places, left, right, tall, wide, totals, norms;
    struct region region;
    Py_ssize_t columns;
    double *products = NULL;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*ny*y*y*y*n(nn)w*z*:add_products", &places, &columns, &left, &right, &tall, &wide,
                          &region.rank, &region.row, &region.column, &totals, &norms))
        return NULL;
    if (norms.buf && norms.readonly) {
        PyErr_SetString(PyExc_ValueError, "norms is read-only");
        goto done;
    }
    region.left = left.buf;
    region.right = right.buf;
    region.tall = tall.buf;
    region.wide = wide.buf;
    region.height = tall.len / 4;
    region.width = wide.len / 4;
    if (!fits(columns > 0 && region.rank > 0 && places.len == totals.len && left.len == region.height * region.rank * 8 &&
              right.len == region.width * region.rank * 4 && (!norms.buf || norms.len == totals.len)))
        goto done;
    products = PyMem_Malloc((size_t)region.rank * sizeof(double));
    if (products == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    add_all(&region, places.buf, places.len / 8, columns, totals.buf, norms.buf, products);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(products);
    PyBuffer_Release(&places);
    PyBuffer_Release(&left);
    PyBuffer_Release(&right);
    PyBuffer_Release(&tall);
    PyBuffer_Release(&wide);
    PyBuffer_Release(&totals);
    PyBuffer_Release(&norms);
    return result;
}

static PyObject *finish(PyObject *module, PyObject *args) {
    Py_buffer stored, places, totals, norms, out;
    const char *source_tag, *target_tag;
    enum dtype source, target;
    double share;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*sw*y*z*dsw*:finish", &stored, &source_tag, &places, &totals, &norms, &share,
                          &target_tag, &out))
        return NULL;
    if (dtype_of(source_tag, &source) && target_of(target_tag, &target)) {
        Py_ssize_t count = out.len / 2;
        int64_t *each = places.buf;
        int is_right = stored.len == count * size_of(source) && places.len == totals.len &&
                       (!norms.buf || norms.len == totals.len);
        for (Py_ssize_t i = 0; is_right && i < places.len / 8; i++)
            is_right = each[i] >= 0 && each[i] < count;
        if (fits(is_right)) {
            Py_ssize_t open;
            Py_BEGIN_ALLOW_THREADS
            open = finish_all(stored.buf, source, each, totals.buf, norms.buf, share, target, out.buf, places.len / 8);
            Py_END_ALLOW_THREADS
            result = PyLong_FromSsize_t(open);
        }
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&places);
    PyBuffer_Release(&totals);
    PyBuffer_Release(&norms);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef functions[] = {
    {"widen", widen, METH_VARARGS,
     "widen(stored, tag, out)\n--\n\nSet float32 or float64 `out` to stored numbers; False if some half is not finite."},
    {"narrow", narrow, METH_VARARGS,
     "narrow(values, tag, out)\n--\n\nRound float32 or float64 `values` once; False if some result is not finite."},
    {"settle", settle, METH_VARARGS,
     "settle(stored, source, update, tall, wide, target, out, places)\n--\n\n"
     "Round stored + update; how many `places` are open, or -1 if a number may be too large.\n\n"
     "The bound of an element is its row's `tall` times its column's `wide`, or, without `tall`, its own in `wide`."},
    {"add_products", add_products, METH_VARARGS,
     "add_products(places, columns, left, right, tall, wide, rank, first, totals, norms)\n--\n\n"
     "Add the sums of products of factors that begin at `first` (row, column) to the totals of flat places."},
    {"finish", finish, METH_VARARGS,
     "finish(stored, source, places, totals, norms, share, target, out)\n--\n\n"
     "Write stored + total, rounded once, at each place; how many are open, or -1 if some result is not finite."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bake.execute._kernels",
    .m_doc = "Loops over the elements of tensors, compiled.",
    .m_size = 0,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    return PyModuleDef_Init(&definition);
}
