// Stands between the plugin library and the CUDA driver, under another name: counts calls, and passes them on where
// `forward` was called. Else it is a device of its own: one that records what it is told and fails when it shall.

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

enum Call { kModule, kFunction, kMemset, kCopy, kLaunch, kCalls };

struct State {
    int64_t counts[kCalls];
    int32_t failing;  // which call fails, -1 without one
    int32_t capability, processors, context;
    uint32_t grid[3], threads, sharedBytes;
    uint64_t arguments[40];
    int64_t argumentCount;  // to be set by the caller: the driver knows it from the kernel
    uint64_t memset[2], copy[3];
};

State gState{{}, -1, 86, 20, 1, {}, 0, 0, {}, 0, {}, {}};
void* gReal = nullptr;

template <typename Function>
Function real(char const* name)
{
    return reinterpret_cast<Function>(dlsym(gReal, name));
}

// Count; return whether it shall fail.
bool counts(Call call)
{
    ++gState.counts[call];
    return gState.failing == call;
}

}  // namespace

extern "C" {

State* state() { return &gState; }

// Pass calls on to the machine's driver; return whether there is one.
int forward()
{
    gReal = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return gReal != nullptr;
}

int cuGetErrorName(int error, char const** name)
{
    if (gReal != nullptr) {
        return real<int (*)(int, char const**)>("cuGetErrorName")(error, name);
    }
    *name = error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_OUT_OF_MEMORY";
    return 0;
}

int cuCtxGetCurrent(void** context)
{
    if (gReal != nullptr) {
        return real<int (*)(void**)>("cuCtxGetCurrent")(context);
    }
    *context = reinterpret_cast<void*>(uintptr_t(gState.context));
    return 0;
}

int cuCtxGetDevice(int* device)
{
    if (gReal != nullptr) {
        return real<int (*)(int*)>("cuCtxGetDevice")(device);
    }
    *device = 0;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    if (gReal != nullptr) {
        return real<int (*)(int*, int, int)>("cuDeviceGetAttribute")(value, attribute, device);
    }
    *value = attribute == 75 ? gState.capability / 10 : attribute == 76 ? gState.capability % 10 : gState.processors;
    return 0;
}

int cuModuleLoadData(void** module, void const* image)
{
    if (counts(kModule)) {
        return 209;
    }
    if (gReal != nullptr) {
        return real<int (*)(void**, void const*)>("cuModuleLoadData")(module, image);
    }
    *module = const_cast<void*>(image);
    return 0;
}

int cuModuleGetFunction(void** function, void* module, char const* name)
{
    if (counts(kFunction)) {
        return 209;
    }
    if (gReal != nullptr) {
        return real<int (*)(void**, void*, char const*)>("cuModuleGetFunction")(function, module, name);
    }
    *function = module;
    return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value)
{
    return gReal != nullptr ? real<int (*)(void*, int, int)>("cuFuncSetAttribute")(function, attribute, value) : 0;
}

int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void* stream)
{
    if (counts(kMemset)) {
        return 2;
    }
    gState.memset[0] = address;
    gState.memset[1] = count;
    return gReal != nullptr
        ? real<int (*)(uint64_t, unsigned, size_t, void*)>("cuMemsetD32Async")(address, value, count, stream)
        : 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void* stream)
{
    if (counts(kCopy)) {
        return 2;
    }
    gState.copy[0] = target;
    gState.copy[1] = source;
    gState.copy[2] = bytes;
    return gReal != nullptr
        ? real<int (*)(uint64_t, uint64_t, size_t, void*)>("cuMemcpyDtoDAsync_v2")(target, source, bytes, stream)
        : 0;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
    unsigned sharedBytes, void* stream, void** arguments, void** extra)
{
    if (counts(kLaunch)) {
        return 2;
    }
    if (gReal != nullptr) {
        return real<int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
            void**)>("cuLaunchKernel")(function, x, y, z, bx, by, bz, sharedBytes, stream, arguments, extra);
    }
    gState.grid[0] = x;
    gState.grid[1] = y;
    gState.grid[2] = z;
    gState.threads = bx * by * bz;
    gState.sharedBytes = sharedBytes;
    for (int64_t i = 0; i < gState.argumentCount; ++i) {
        std::memcpy(&gState.arguments[i], arguments[i], sizeof(uint64_t));
    }
    return 0;
}

}  // extern "C"
