// The CUDA driver API, opened at first use: the library loads on a machine without a driver.
#pragma once

#include <cstddef>
#include <cstdint>

// The driver's own types, as its header names them.
struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;

namespace tnllm {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = CUctx_st*;
using CUmodule = CUmod_st*;
using CUfunction = CUfunc_st*;
using CUstream = CUstream_st*;

struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};

inline constexpr int kMultiprocessors = 16;          // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
inline constexpr int kCapabilityMajor = 75;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
inline constexpr int kCapabilityMinor = 76;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
inline constexpr int kMaxDynamicSharedBytes = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
inline constexpr int kBfloat16 = 9;                  // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
inline constexpr int kSwizzle128Bytes = 3;           // CU_TENSOR_MAP_SWIZZLE_128B
inline constexpr int kMayOverlap = 6;                // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
inline constexpr int kDefaultSharedBytes = 48 << 10;  // what a kernel may use without asking for more

// CUlaunchConfig and CUlaunchAttribute.
struct LaunchAttribute {
    int id;
    alignas(8) int value;
    uint64_t unused[7];
};

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned sharedBytes;
    CUstream stream;
    LaunchAttribute* attributes;
    unsigned attributeCount;
};

struct Driver {
    CUresult (*cuGetErrorName)(CUresult, char const**);
    CUresult (*cuCtxGetCurrent)(CUcontext*);
    CUresult (*cuCtxGetDevice)(CUdevice*);
    CUresult (*cuDeviceGetAttribute)(int*, int, CUdevice);
    CUresult (*cuModuleLoadData)(CUmodule*, void const*);
    CUresult (*cuModuleUnload)(CUmodule);
    CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, char const*);
    CUresult (*cuFuncSetAttribute)(CUfunction, int, int);
    CUresult (*cuMemsetD32Async)(CUdeviceptr, unsigned, size_t, CUstream);
    CUresult (*cuMemcpyDtoDAsync)(CUdeviceptr, CUdeviceptr, size_t, CUstream);
    CUresult (*cuLaunchKernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
        CUstream, void**, void**);
    // nullptr in a driver before CUDA 11.8.
    CUresult (*cuLaunchKernelEx)(LaunchConfig const*, CUfunction, void**, void**);
    // nullptr in a driver before CUDA 12.
    CUresult (*cuTensorMapEncodeTiled)(CUtensorMap*, int, unsigned, void*, uint64_t const*, uint64_t const*,
        uint32_t const*, uint32_t const*, int, int, int, int);
};

// The driver, or nullptr where there is none.
Driver const* driver() noexcept;

// The error's name, e.g. "CUDA_ERROR_NO_BINARY_FOR_GPU".
char const* errorName(CUresult result) noexcept;

// What is known of the device whose context is current.
struct Device {
    CUcontext context;
    int32_t capability;
    int32_t processors;
};

// Fill in `device`; on failure return false with a reason.
bool currentDevice(Device& device, char const*& reason) noexcept;

}  // namespace tnllm
