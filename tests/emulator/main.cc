// g++ -std=c++17 -shared -fPIC -DKERNEL=scan_forward -DSOURCE='"scan_forward.cu"' -DPATHS=0,2 ... -I ops/csrc main.cc
#include "emulator.h"
#include <functional>
#include <utility>


#include SOURCE

namespace emulator {
static std::function<void()> call;

template <class... A, std::size_t... I>
static int run(void (*kernel)(A...), int blocks, int threads, void **arguments, std::index_sequence<I...>) {
    call = [=] { kernel(*static_cast<A *>(arguments[I])...); };
    body = [] { call(); };
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        if (run_block(threads)) return 1;
    return 0;
}
template <class... A>
static int run(void (*kernel)(A...), int blocks, int threads, void **arguments) {
    return run(kernel, blocks, threads, arguments, std::index_sequence_for<A...>{});
}
}  // namespace emulator

extern "C" int emulate(int blocks, int threads, void **arguments) { return emulator::run(KERNEL, blocks, threads, arguments); }
