#include "launch.h"

#include <map>
#include <mutex>
#include <utility>

namespace tnllm {
namespace {

// Functions by context and kernel. Modules live as long as their context: the library is never unloaded before it.
std::mutex gMutex;
std::map<std::pair<CUcontext, Kernel const*>, CUfunction> gFunctions;

CUfunction function(Plan const& plan, Device const& device, char const*& reason) noexcept
try {
    std::lock_guard<std::mutex> const lock(gMutex);
    auto const key = std::make_pair(device.context, plan.kernel);
    if (auto const found = gFunctions.find(key); found != gFunctions.end()) {
        return found->second;
    }
    Driver const& cuda = *driver();
    CUmodule module{};
    CUfunction loaded{};
    CUresult result = cuda.cuModuleLoadData(&module, kCubins + plan.kernel->cubinOffset);
    result = result != 0 ? result : cuda.cuModuleGetFunction(&loaded, module, plan.kernel->entry);
    if (result == 0 && plan.kernel->sharedBytes > kDefaultSharedBytes) {
        result = cuda.cuFuncSetAttribute(loaded, kMaxDynamicSharedBytes, plan.kernel->sharedBytes);
    }
    if (result != 0) {
        reason = errorName(result);
        if (module != nullptr) {
            cuda.cuModuleUnload(module);
        }
        return nullptr;
    }
    gFunctions.emplace(key, loaded);
    return loaded;
} catch (...) {
    reason = "out of host memory";
    return nullptr;
}

int64_t integer(Argument argument, Call const& call) noexcept
{
    int64_t const keyRow = call.H * call.K;
    int64_t const valueRow = call.H * call.V;
    switch (argument) {
    case Argument::T: return call.T;
    case Argument::H: return call.H;
    case Argument::query_stride_b:
    case Argument::key_stride_b: return call.T * keyRow;
    case Argument::query_stride_t:
    case Argument::key_stride_t: return keyRow;
    case Argument::query_stride_h:
    case Argument::key_stride_h: return call.K;
    case Argument::value_stride_b:
    case Argument::output_stride_b: return call.T * valueRow;
    case Argument::value_stride_t:
    case Argument::output_stride_t: return valueRow;
    case Argument::value_stride_h:
    case Argument::output_stride_h: return call.V;
    case Argument::past_stride_b:
    case Argument::present_stride_b: return call.H * call.K * call.V;
    case Argument::past_stride_h:
    case Argument::present_stride_h: return call.K * call.V;
    case Argument::past_stride_k:
    case Argument::present_stride_k: return call.V;
    case Argument::unused: return 0;
    default: return 1;  // past_stride_v, present_stride_v
    }
}

// Whose map it is.
Argument mapped(Argument argument) noexcept
{
    switch (argument) {
    case Argument::query_map: return Argument::query;
    case Argument::key_map: return Argument::key;
    case Argument::value_map: return Argument::value;
    default: return Argument::output;
    }
}

// The map of dense activations [B, T, H, columns]: see MAPS in kernels/compiled.py.
bool encode(CUtensorMap& map, Call const& call, int64_t columns, void const* address, char const*& reason) noexcept
{
    auto const encodeTiled = driver()->cuTensorMapEncodeTiled;
    if (encodeTiled == nullptr) {
        reason = "the CUDA driver is older than 12.0, which makes no tensor maps";
        return false;
    }
    uint64_t const row = uint64_t(columns) * 2;
    uint64_t const sizes[] = {uint64_t(columns), uint64_t(call.H), uint64_t(call.T), uint64_t(call.B)};
    uint64_t const strides[] = {row, row * sizes[1], row * sizes[1] * sizes[2]};
    uint32_t const block[] = {64, 1, 64, 1};
    uint32_t const steps[] = {1, 1, 1, 1};
    CUresult const result = encodeTiled(
        &map, kBfloat16, 4, const_cast<void*>(address), sizes, strides, block, steps, 0, kSwizzle128Bytes, 0, 0);
    if (result != 0) {
        reason = errorName(result);
    }
    return result == 0;
}

CUresult start(CUfunction kernel, Plan const& plan, CUstream stream, void** arguments) noexcept
{
    Driver const& cuda = *driver();
    unsigned const columns = unsigned(plan.columns);
    unsigned const segments = unsigned(plan.segments);
    unsigned const threads = unsigned(plan.kernel->threads);
    unsigned const sharedBytes = unsigned(plan.kernel->sharedBytes);
    if (plan.kernel->overlaps && cuda.cuLaunchKernelEx != nullptr) {
        LaunchAttribute mayOverlap{kMayOverlap, 1, {}};
        LaunchConfig const config{{columns, segments, 1}, {threads, 1, 1}, sharedBytes, stream, &mayOverlap, 1};
        return cuda.cuLaunchKernelEx(&config, kernel, arguments, nullptr);
    }
    return cuda.cuLaunchKernel(kernel, columns, segments, 1, threads, 1, 1, sharedBytes, stream, arguments, nullptr);
}

}  // namespace

bool load(Plan const& plan, Device const& device, char const*& reason) noexcept
{
    return function(plan, device, reason) != nullptr;
}

bool launch(Call const& call, Plan const& plan, Device const& device, Addresses addresses, void* workspace,
    CUstream stream, char const*& reason) noexcept
{
    CUfunction const kernel = function(plan, device, reason);
    if (kernel == nullptr) {
        return false;
    }
    if (plan.workspaceBytes > 0 && workspace == nullptr) {
        reason = "no workspace was given";
        return false;
    }
    if (plan.workspaceBytes > 0 && reinterpret_cast<uintptr_t>(workspace) % plan.kernel->scratchAlignment != 0) {
        reason = "the workspace is not aligned";
        return false;
    }
    Driver const& cuda = *driver();
    auto* const base = static_cast<unsigned char*>(workspace);
    if (plan.kernel->handover == Handover::lookback) {
        CUresult const result = cuda.cuMemsetD32Async(
            reinterpret_cast<CUdeviceptr>(base), 0, 1 + plan.columns * plan.segments, stream);
        if (result != 0) {
            reason = errorName(result);
            return false;
        }
        addresses.of[int(Argument::progress)] = base;
        addresses.of[int(Argument::carry)] = base + plan.carryOffset;
    }
    addresses.of[int(Argument::scratch)] = plan.kernel->scratchBytes > 0 ? base + plan.scratchOffset : nullptr;

    // The driver reads as many bytes as the kernel's parameter has, 4 or 8: the low ones come first.
    int64_t integers[kMaxArguments];
    CUtensorMap maps[kMaps];
    void* arguments[kMaxArguments];
    for (int32_t i = 0; i < plan.kernel->argumentCount; ++i) {
        Argument const argument = plan.kernel->arguments[i];
        if (int(argument) < kPointers) {
            arguments[i] = &addresses.of[int(argument)];
        } else if (int(argument) < kPointers + kMaps) {
            CUtensorMap& map = maps[int(argument) - kPointers];
            bool const isKey = argument == Argument::query_map || argument == Argument::key_map;
            if (!encode(map, call, isKey ? call.K : call.V, addresses.of[int(mapped(argument))], reason)) {
                return false;
            }
            arguments[i] = &map;
        } else {
            integers[i] = integer(argument, call);
            arguments[i] = &integers[i];
        }
    }
    CUresult const result = start(kernel, plan, stream, arguments);
    if (result != 0) {
        reason = errorName(result);
    }
    return result == 0;
}

bool copyState(Call const& call, void const* past, void* present, CUstream stream, char const*& reason) noexcept
{
    if (past == present) {
        return true;
    }
    size_t const bytes = sizeof(float) * call.B * call.H * call.K * call.V;
    CUresult const result = driver()->cuMemcpyDtoDAsync(
        reinterpret_cast<CUdeviceptr>(present), reinterpret_cast<CUdeviceptr>(past), bytes, stream);
    if (result != 0) {
        reason = errorName(result);
    }
    return result == 0;
}

}  // namespace tnllm
