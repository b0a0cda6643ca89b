// `attend.cu` as a function of a library.

#include <warp.cuh>

#include "attend.cu"

extern "C" void run(int blocks, int threads, int shared_bytes, void **arguments) {
    emulation::table_end[0] = KEY_BYTES, emulation::table_end[1] = KEY_BYTES + VALUE_BYTES;
    for (int stream = 0; stream < 2; stream++) emulation::lookups[stream] = emulation::wavefronts[stream] = 0;
    emulation::launch(attend, blocks, threads, shared_bytes, arguments);
}

// Of keys (0) or of values (1).
extern "C" long long lookups(int stream) { return emulation::lookups[stream]; }
extern "C" long long wavefronts(int stream) { return emulation::wavefronts[stream]; }
