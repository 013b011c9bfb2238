#include "driver.h"

#include <dlfcn.h>

#include <type_traits>

namespace tnllm {
namespace {

struct Opened {
    Driver driver{};
    bool whole = false;

    Opened() noexcept
    {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            return;
        }
        whole = true;
        auto findNewer = [&](auto& function, char const* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        };
        auto find = [&](auto& function, char const* name) {
            findNewer(function, name);
            whole = whole && function != nullptr;
        };
        find(driver.cuGetErrorName, "cuGetErrorName");
        find(driver.cuCtxGetCurrent, "cuCtxGetCurrent");
        find(driver.cuCtxGetDevice, "cuCtxGetDevice");
        find(driver.cuDeviceGetAttribute, "cuDeviceGetAttribute");
        find(driver.cuModuleLoadData, "cuModuleLoadData");
        find(driver.cuModuleUnload, "cuModuleUnload");
        find(driver.cuModuleGetFunction, "cuModuleGetFunction");
        find(driver.cuFuncSetAttribute, "cuFuncSetAttribute");
        find(driver.cuMemsetD32Async, "cuMemsetD32Async");
        find(driver.cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2");
        find(driver.cuLaunchKernel, "cuLaunchKernel");
        findNewer(driver.cuLaunchKernelEx, "cuLaunchKernelEx");
        findNewer(driver.cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
    }
};

}  // namespace

Driver const* driver() noexcept
{
    static Opened const opened;
    return opened.whole ? &opened.driver : nullptr;
}

char const* errorName(CUresult result) noexcept
{
    char const* name = nullptr;
    if (driver() == nullptr || driver()->cuGetErrorName(result, &name) != 0 || name == nullptr) {
        return "an unknown error";
    }
    return name;
}

bool currentDevice(Device& device, char const*& reason) noexcept
{
    Driver const* cuda = driver();
    if (cuda == nullptr) {
        reason = "no CUDA driver (libcuda.so.1 can't be opened, or is too old)";
        return false;
    }
    CUdevice handle{};
    int major = 0;
    int minor = 0;
    CUresult result = cuda->cuCtxGetCurrent(&device.context);
    if (result == 0 && device.context == nullptr) {
        reason = "no CUDA context is current";
        return false;
    }
    result = result != 0 ? result : cuda->cuCtxGetDevice(&handle);
    result = result != 0 ? result : cuda->cuDeviceGetAttribute(&major, kCapabilityMajor, handle);
    result = result != 0 ? result : cuda->cuDeviceGetAttribute(&minor, kCapabilityMinor, handle);
    result = result != 0 ? result : cuda->cuDeviceGetAttribute(&device.processors, kMultiprocessors, handle);
    device.capability = 10 * major + minor;
    reason = result != 0 ? errorName(result) : nullptr;
    return result == 0;
}

}  // namespace tnllm
