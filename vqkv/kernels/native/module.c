/* What makes the library a module that Python builds and finds. It is called through ctypes, which
 * lets go of the interpreter lock; Python threads share the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "levels.h"

/* The best level of this CPU. */
int vqkv_best_level(void)
{
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        const int bf16 = __builtin_cpu_supports("avx512bf16") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        return bf16 ? AVX512_BF16 : AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return SCALAR;
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Called through ctypes; see the package.", -1, NULL,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModule_Create(&module);
}
