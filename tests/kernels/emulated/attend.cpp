// `attend.cu` as a function of a library.

#include <warp.cuh>

#include "attend.cu"

extern "C" void run(int blocks, int threads, int shared_bytes, void **arguments) {
    emulation::looked_up_below = 2 * TABLE_BYTES;
    emulation::lookups = emulation::wavefronts = 0;
    emulation::launch(attend, blocks, threads, shared_bytes, arguments);
}

extern "C" long long lookups() { return emulation::lookups; }
extern "C" long long wavefronts() { return emulation::wavefronts; }
