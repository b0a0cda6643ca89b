// `merge.cu` as a function of a library.

#include <warp.cuh>

#include "merge.cu"

extern "C" void run(int blocks, int threads, int shared_bytes, void **arguments) {
    emulation::launch(merge, blocks, threads, shared_bytes, arguments);
}
