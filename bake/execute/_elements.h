/* Stored numbers, and how they are rounded: what the loops in C have in common.

Halves and bfloat16 are converted by integer arithmetic on their bits, so that every compiler can turn the loops into
vector instructions. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _MSC_VER
#include <intrin.h>
#endif

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: so that halves are added as halves; there are none here */
#error "floating-point operations are not rounded one by one here"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors are stored with the lowest byte first"
#endif
#if SIZE_MAX != UINT64_MAX
#error "NumPy's places have less than 64 bits here"
#endif

#ifdef _MSC_VER
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

enum dtype { F16, BF16, F32 };

#define HALF_FACTOR 0x1p112f /* the bits of a half, moved into those of a float, mean its value but for this factor */
#define AT_ONCE 256 /* elements whose open places are looked for together */

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The value of a stored number; of a half only if it is finite. */
INLINE float value_of(const void *stored, Py_ssize_t place, enum dtype dtype) {
    if (dtype == F32)
        return ((const float *)stored)[place];
    uint32_t bits = ((const uint16_t *)stored)[place];
    if (dtype == BF16)
        return float_of(bits << 16);
    return float_of((bits & 0x7FFF) << 13 | (bits & 0x8000) << 16) * HALF_FACTOR;
}

/* 1 for a half that is infinite or no number, for which value_of has no answer. */
INLINE uint32_t has_no_value(const void *stored, Py_ssize_t place, enum dtype dtype) {
    return dtype == F16 && (((const uint16_t *)stored)[place] & 0x7FFF) >= 0x7C00;
}

/* The bits of a double rounded once, to nearest, ties to even, without the sign; infinity's or more if too large. */
INLINE uint32_t rounded(double value, enum dtype target) {
    const int mantissa = target == F16 ? 10 : 7;
    const double smallest = target == F16 ? 0x1p-14 : 0x1p-126;
    double power = double_of(bits_of_double(value) & 0x7FF0000000000000);
    /* The sum has no bit below the last that stays. */
    double large = (power > smallest ? power : smallest) * (1.5 * (double)((uint64_t)1 << (52 - mantissa)));
    float kept = (float)((fabs(value) + large) - large);
    return target == F16 ? bits_of(kept * (1 / HALF_FACTOR)) >> 13 : bits_of(kept) >> 16;
}

INLINE uint16_t signed_bits(uint32_t magnitude, double value) {
    return (uint16_t)(magnitude | (bits_of_double(value) >> 48 & 0x8000));
}

INLINE uint32_t infinity(enum dtype target) {
    return target == F16 ? 0x7C00 : 0x7F80;
}

/* Round `count` sums into `out`, and say which are open; 1 if one of them may be too large.

factor * wide is the bound. See `settle` in bake/execute/plain/rounding.py for what is done to the bits. */
INLINE uint32_t settle_some(const void *restrict stored, enum dtype source, const float *restrict update, float factor,
                            const float *restrict wide, enum dtype target, uint16_t *restrict out,
                            uint8_t *restrict open, Py_ssize_t count) {
    const int drop = target == F16 ? 13 : 16;
    const uint32_t half = (uint32_t)1 << (drop - 1);
    const float small = target == F16 ? 1 / HALF_FACTOR : 1.0f;
    const float below = target == F16 ? 0x1p15f : 0x1p100f;
    const uint32_t beyond = bits_of(below * small);
    uint32_t bad = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        float near = value_of(stored, i, source) + update[i];
        float bound = factor * wide[i], magnitude = fabsf(near);
        uint32_t high = bits_of((magnitude + bound) * small) + half + 2;
        uint32_t low = bits_of((magnitude - bound) * small) + half - 2;
        bad |= has_no_value(stored, i, source) | !(magnitude < below);
        open[i] = ((high ^ low) >> drop != 0) | (high >= beyond);
        out[i] = (uint16_t)(high >> drop | (bits_of(near) >> 16 & 0x8000));
    }
    return bad;
}

/* The place of the lowest bit that is set. */
INLINE int lowest(uint64_t bits) {
#ifdef _MSC_VER
    unsigned long place;
    _BitScanForward64(&place, bits);
    return (int)place;
#else
    return __builtin_ctzll(bits);
#endif
}

/* Append the places of a run of `count` elements that are open (1 of 0 and 1, a byte each, whole words of them) to
`found` others; how many there are then. */
INLINE Py_ssize_t add_open(const uint8_t *open, Py_ssize_t first, Py_ssize_t count, int64_t *places, Py_ssize_t found) {
    for (Py_ssize_t begin = 0; begin < count; begin += 64) {
        Py_ssize_t many = count - begin < 64 ? count - begin : 64;
        uint64_t bits = 0;
        for (Py_ssize_t i = 0; i < many; i += 8) {
            uint64_t eight;
            memcpy(&eight, open + begin + i, 8);
            bits |= (eight * 0x0102040810204080) >> 56 << i;
        }
        if (many < 64)
            bits &= ((uint64_t)1 << many) - 1;
        for (; bits; bits &= bits - 1)
            places[found++] = first + begin + lowest(bits);
    }
    return found;
}

/* Python's side */

static int dtype_of(const char *tag, enum dtype *dtype) {
    static const char *const tags[] = {[F16] = "F16", [BF16] = "BF16", [F32] = "F32"};
    for (int i = F16; i <= F32; i++)
        if (strcmp(tag, tags[i]) == 0) {
            *dtype = (enum dtype)i;
            return 1;
        }
    PyErr_Format(PyExc_ValueError, "no loop for the dtype %s", tag);
    return 0;
}

/* likewise, of 16 bits */
static int target_of(const char *tag, enum dtype *dtype) {
    if (!dtype_of(tag, dtype))
        return 0;
    if (*dtype != F32)
        return 1;
    PyErr_Format(PyExc_ValueError, "no loop that rounds to %s", tag);
    return 0;
}

static Py_ssize_t size_of(enum dtype dtype) {
    return dtype == F32 ? 4 : 2;
}

static int fits(int is_right) {
    if (!is_right)
        PyErr_SetString(PyExc_ValueError, "the sizes of the arrays do not fit each other");
    return is_right;
}
