// Stands between the plugin library and the CUDA driver, under another name: counts calls, and passes them on where
// `forward` was called. Else it is a device of its own: one that records what it is told and fails when it shall.

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

enum Call { kModule, kFunction, kMemset, kCopy, kLaunch, kMap, kCalls };

struct State {
    int64_t counts[kCalls];
    int32_t failing;  // which call fails, -1 without one
    int32_t capability, processors, context;
    uint32_t grid[3], threads, sharedBytes;
    uint64_t arguments[128];
    int64_t argumentCount;  // to be set by the caller: the driver knows it from the kernel
    uint64_t memset[2], copy[3];
    uint64_t mapSizes[4], mapStrides[3];
    uint32_t mapBlock[4];
    uint64_t stream, capture;
    int32_t overlaps;
};

State gState{{}, -1, 86, 20, 1, {}, 0, 0, {}, 0, {}, {}, {}, {}, {}, 0, 0, 0};
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

int cuCtxSetCurrent(void* context)
{
    gState.context = int32_t(reinterpret_cast<uintptr_t>(context));
    return 0;
}

int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return 0;
}

// The number of a device's context is 100 more than its own.
int cuDevicePrimaryCtxRetain(void** context, int device)
{
    *context = reinterpret_cast<void*>(uintptr_t(100 + device));
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

int cuModuleUnload(void* module)
{
    --gState.counts[kModule];
    return gReal != nullptr ? real<int (*)(void*)>("cuModuleUnload")(module) : 0;
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

struct LaunchAttribute {
    int id;
    alignas(8) int value;
    char unused[56];
};

struct LaunchConfig {
    unsigned grid[3], block[3], sharedBytes;
    void* stream;
    LaunchAttribute const* attributes;
    unsigned attributeCount;
};

int cuLaunchKernelEx(LaunchConfig const* config, void* function, void** arguments, void** extra)
{
    gState.stream = reinterpret_cast<uint64_t>(config->stream);
    gState.overlaps = 0;
    for (unsigned i = 0; i < config->attributeCount; ++i) {
        gState.overlaps += config->attributes[i].id == 6 && config->attributes[i].value == 1;
    }
    if (gReal != nullptr) {
        if (counts(kLaunch)) {
            return 2;
        }
        return real<int (*)(LaunchConfig const*, void*, void**, void**)>("cuLaunchKernelEx")(
            config, function, arguments, extra);
    }
    return cuLaunchKernel(function, config->grid[0], config->grid[1], config->grid[2], config->block[0],
        config->block[1], config->block[2], config->sharedBytes, config->stream, arguments, extra);
}

// Without a real driver, a map begins with its address.
int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, uint64_t const* sizes,
    uint64_t const* strides, uint32_t const* block, uint32_t const* steps, int interleave, int swizzle, int promotion,
    int fill)
{
    if (counts(kMap)) {
        return 1;
    }
    if (gReal != nullptr) {
        return real<int (*)(uint64_t*, int, unsigned, void*, uint64_t const*, uint64_t const*, uint32_t const*,
            uint32_t const*, int, int, int, int)>("cuTensorMapEncodeTiled")(
            map, type, rank, address, sizes, strides, block, steps, interleave, swizzle, promotion, fill);
    }
    bool const expected = reinterpret_cast<uintptr_t>(map) % 64 == 0 && type == 9 && rank == 4 && swizzle == 3;
    if (!expected) {
        return 1;
    }
    map[0] = reinterpret_cast<uint64_t>(address);
    std::memcpy(gState.mapSizes, sizes, sizeof(gState.mapSizes));
    std::memcpy(gState.mapStrides, strides, sizeof(gState.mapStrides));
    std::memcpy(gState.mapBlock, block, sizeof(gState.mapBlock));
    return 0;
}

int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void*, void*, void*)
{
    gState.stream = reinterpret_cast<uint64_t>(stream);
    *status = gState.capture != 0;
    *id = gState.capture;
    return 0;
}

}  // extern "C"
