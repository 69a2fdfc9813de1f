// A stand-in for NVIDIA's driver library: memory is malloc's, handles are constants above 32 bits, and any handle or flag that
// arrives cut or in the wrong place is answered with an error. It tests how cuda.py calls the driver, not the driver.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
#define CONTEXT ((void *)0x7fffdeadbeefULL)
#define STREAM ((void *)0x123456789abcULL)
#define GRAPH ((void *)0x111122223333ULL)
#define EXECUTABLE ((void *)0x444455556666ULL)
#define MODULE ((void *)0x777788889999ULL)
#define KERNEL ((void *)0xaaaabbbbccccULL)
#define CHECK(condition) ((condition) ? 0 : 1)

static int contexts = 0, current = 0;
int stub_contexts(void) { return contexts; }

int cuInit(unsigned flags) { return getenv("STUB_INIT") ? atoi(getenv("STUB_INIT")) : CHECK(flags == 0); }
int cuDeviceGet(int *device, int ordinal) { *device = 3; return ordinal == 0 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Stub GPU", size); return CHECK(device == 3); }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 7 : which == 18 ? 1 : -1;
    return CHECK(device == 3);
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 64ULL << 30; return CHECK(device == 3); }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; contexts++; return CHECK(device == 3); }
int cuCtxSetCurrent(void *context) { current = 1; return CHECK(context == CONTEXT); }
int cuMemAlloc_v2(Address *address, size_t size) {
    if (!current) return 201;
    if (size > 1ULL << 40) return 2;
    *address = (Address)malloc(size);
    return 0;
}
int cuMemFree_v2(Address address) { free((void *)address); return 0; }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { *address = malloc(size); return CHECK(flags == 0); }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuMemcpyHtoDAsync_v2(Address device, const void *host, size_t size, void *stream) {
    memcpy((void *)device, host, size);
    return CHECK(stream == STREAM);
}
int cuMemcpyDtoHAsync_v2(void *host, Address device, size_t size, void *stream) {
    memcpy(host, (void *)device, size);
    return CHECK(stream == STREAM);
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = STREAM; return current ? CHECK(flags == 1) : 201; }
int cuStreamSynchronize(void *stream) { return CHECK(stream == STREAM); }
int cuStreamDestroy_v2(void *stream) { return CHECK(stream == STREAM); }
int cuStreamBeginCapture_v2(void *stream, int mode) { return CHECK(stream == STREAM && mode == 1); }
int cuStreamEndCapture(void *stream, void **graph) { *graph = GRAPH; return CHECK(stream == STREAM); }
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    *executable = EXECUTABLE;
    return CHECK(graph == GRAPH && flags == 0);
}
int cuGraphLaunch(void *executable, void *stream) { return CHECK(executable == EXECUTABLE && stream == STREAM); }
int cuGraphExecDestroy(void *executable) { return CHECK(executable == EXECUTABLE); }
int cuGraphDestroy(void *graph) { return CHECK(graph == GRAPH); }
#ifndef OLD // a driver that lacks something
int cuModuleLoadData(void **module, const void *image) { *module = MODULE; return strcmp(image, "ptx") ? 218 : current ? 0 : 201; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = KERNEL;
    return strcmp(name, "maxsim") ? 500 : CHECK(module == MODULE);
}
int cuModuleUnload(void *module) { return CHECK(module == MODULE); }
int cuFuncSetAttribute(void *function, int which, int value) { return CHECK(function == KERNEL && which == 8 && value == 65536); }
// The kernel that runs: it writes its second argument to where its first one points.
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    if (function != KERNEL || stream != STREAM || extra || x != 3 || y != 65535 || z != 1 || threads != 256 || ty != 1 ||
        tz != 1 || shared != 65536)
        return 1;
    *(unsigned long long *)*(Address *)arguments[0] = *(unsigned long long *)arguments[1];
    return 0;
}
#endif
int cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : "other"; return 0; }
