/* What makes the library a module that Python builds and finds. It is called through ctypes, which
 * lets go of the interpreter lock; Python threads share the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Called through ctypes; see the package.", -1, NULL,
    NULL, NULL, NULL, NULL,
};

/* The hash of the sources that this was built from. */
const char *vqkv_sources(void)
{
    return VQKV_SOURCES;
}

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModule_Create(&module);
}
