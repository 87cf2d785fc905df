/* W plus one product of thin matrices, rounded, in one go: a tile is finished while its products are in a core's cache.

The products are made in float32, in whatever order and however fused is fast, with a bound on what that loses (see
Sum._bound in bake/execute/plain/sums.py). It holds for sums of at most DEPTH products at a time. */

#include "_elements.h"

#ifndef __GNUC__
#error "written for the vectors of GCC and Clang"
#endif

#define HEIGHT 6 /* rows of a tile */
#define DEPTH 32 /* products that are added up before they are added to the others */

struct fusion {
    const float *left;        /* rows * rank */
    const float *right;       /* rank * columns; tile by tile, of which each has all ranks, and zeros at the end */
    const void *stored;       /* rows * columns */
    const float *tall, *wide; /* what the bound is the product of: rows, columns */
    uint16_t *out;
    int64_t *places;
    float *samples; /* of the update: row `sample` and every `step`-th after it */
    Py_ssize_t rows, rank, columns, sample, step;
};

#define JOINED_NOW(one, two) one##two
#define JOINED(one, two) JOINED_NOW(one, two)
#define WIDTH_OF(tile) JOINED(tile, _width)

#ifdef __x86_64__
#define TILE with_avx512
#ifdef __clang__ /* which does as it is told anyway, and ignores all of it if it does not know a word */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif
#define BYTES 64
#define WIDE 4
#include "_tile.h"
#define TILE with_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#define WIDE 2
#include "_tile.h"
#endif

#define TILE with_any
#define TARGET
#define BYTES 16
#ifdef __aarch64__
#define WIDE 4 /* 32 registers */
#else
#define WIDE 2
#endif
#include "_tile.h"

/* Of the processor at hand. */
static Py_ssize_t (*fuse_tiles)(const struct fusion *, enum dtype, enum dtype) = with_any;
static Py_ssize_t width = WIDTH_OF(with_any);

static void know_processor(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        fuse_tiles = with_avx512;
        width = WIDTH_OF(with_avx512);
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        fuse_tiles = with_avx2;
        width = WIDTH_OF(with_avx2);
    }
#endif
}

static PyObject *fuse(PyObject *module, PyObject *args) {
    Py_buffer left, right, stored, tall, wide, out, places, samples;
    const char *source_tag, *target_tag;
    enum dtype source, target;
    struct fusion it = {0};
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*sy*y*sw*w*w*nn:fuse", &left, &right, &stored, &source_tag, &tall, &wide,
                          &target_tag, &out, &places, &samples, &it.sample, &it.step))
        return NULL;
    it.left = left.buf;
    it.right = right.buf;
    it.stored = stored.buf;
    it.tall = tall.buf;
    it.wide = wide.buf;
    it.out = out.buf;
    it.places = places.buf;
    it.samples = samples.buf;
    it.rows = tall.len / 4;
    it.columns = wide.len / 4;
    it.rank = it.rows ? left.len / 4 / it.rows : 0;
    if (!dtype_of(source_tag, &source) || !target_of(target_tag, &target))
        goto done;
    Py_ssize_t count = it.rows * it.columns;
    if (!fits(it.rank > 0 && it.sample >= 0 && it.step > 0 && left.len == it.rows * it.rank * 4 &&
              right.len == (it.columns + width - 1) / width * width * it.rank * 4 &&
              stored.len == count * size_of(source) && out.len == count * 2 && places.len >= count * 8 &&
              samples.len == (it.rows > it.sample ? (it.rows - it.sample - 1) / it.step + 1 : 0) * it.columns * 4))
        goto done;
    Py_ssize_t found;
    Py_BEGIN_ALLOW_THREADS
    found = fuse_tiles(&it, source, target);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSsize_t(found);
done:
    PyBuffer_Release(&left);
    PyBuffer_Release(&right);
    PyBuffer_Release(&stored);
    PyBuffer_Release(&tall);
    PyBuffer_Release(&wide);
    PyBuffer_Release(&out);
    PyBuffer_Release(&places);
    PyBuffer_Release(&samples);
    return result;
}

static PyMethodDef functions[] = {
    {"fuse", fuse, METH_VARARGS,
     "fuse(left, right, stored, source, tall, wide, target, out, places, samples, sample, step)\n--\n\n"
     "Round stored + left @ right, which comes in tiles of WIDTH columns.\n\n"
     "How many `places` are open, or -1 if a number may be too large."},
    {NULL, NULL, 0, NULL},
};

static int begin(PyObject *module) {
    know_processor();
    if (PyModule_AddIntConstant(module, "WIDTH", (long)width) < 0)
        return -1;
    return PyModule_AddIntMacro(module, DEPTH);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, begin}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bake.execute._products",
    .m_doc = "Products of thin matrices, added and rounded, compiled.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__products(void) {
    return PyModuleDef_Init(&definition);
}
