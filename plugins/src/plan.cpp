#include "plan.h"

#include <algorithm>

namespace tnllm {
namespace {

constexpr int32_t kLeastShared = 99 * 1024;  // bytes that a program may have on 8.6 and 8.9; more on 8.0
constexpr int64_t kMostProcessors = 256;  // no GPU has more multiprocessors; used where the GPU is not known yet

int64_t ceilDiv(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }

size_t aligned(size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }

bool fits(Kernel const& kernel, Call const& call) noexcept
{
    return kernel.op == call.op && kernel.dtype == call.dtype && kernel.K == call.K && kernel.V == call.V;
}

// Code for 8.0 runs on 8.6 and 8.9. From 9.0 on, kernels use features of exactly their architecture.
bool runsOn(Kernel const& kernel, int32_t capability) noexcept
{
    if (kernel.capability == capability) {
        return true;
    }
    return capability < 90 && kernel.capability / 10 == capability / 10 && kernel.capability < capability
        && kernel.sharedBytes <= kLeastShared;
}

int64_t columnsOf(Kernel const& kernel, Call const& call) noexcept
{
    return call.B * call.H * ceilDiv(call.V, kernel.BV);
}

void layOut(Plan& plan) noexcept
{
    Kernel const& kernel = *plan.kernel;
    size_t const states = kernel.handover == Handover::lookback ? plan.columns * plan.segments : 0;
    size_t const progress = states > 0 ? aligned(sizeof(int32_t) * (1 + states)) : 0;
    size_t const carry = aligned(sizeof(float) * states * kernel.BK * kernel.BV);
    plan.carryOffset = progress;
    plan.scratchOffset = progress + carry;
    plan.workspaceBytes = plan.scratchOffset + aligned(size_t(kernel.scratchBytes) * plan.columns * plan.segments);
}

Kernel const* withHandover(Call const& call, int32_t capability, Handover handover) noexcept
{
    for (int32_t i = 0; i < kKernelCount; ++i) {
        if (fits(kKernels[i], call) && kKernels[i].capability == capability && kKernels[i].handover == handover) {
            return &kKernels[i];
        }
    }
    return nullptr;
}

// The capability whose kernels a device runs, 0 without any.
int32_t bestCapability(Call const& call, int32_t capability) noexcept
{
    int32_t best = 0;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        if (fits(kKernels[i], call) && runsOn(kKernels[i], capability)) {
            best = std::max(best, kKernels[i].capability);
        }
    }
    return best;
}

bool chooseChunk(Call const& call, int32_t capability, int32_t processors, Plan& plan) noexcept
{
    plan.kernel = withHandover(call, capability, Handover::none);
    if (plan.kernel == nullptr) {
        return false;
    }
    Kernel const& tile = *plan.kernel;
    int64_t const chunks = std::max<int64_t>(ceilDiv(call.T, tile.C), 1);
    plan.columns = columnsOf(tile, call);
    plan.segments = 1;
    int64_t const wanted = int64_t(processors) * tile.programsPerProcessor / std::max<int64_t>(plan.columns, 1);
    if (wanted < 2 || chunks < 2) {
        return true;
    }
    bool const few = chunks <= kShortCall;
    // Where every segment starts from past_state, the last one may not overwrite it before the others have read it.
    bool const recompute = few && !call.inPlace;
    Kernel const* cut = withHandover(call, capability, recompute ? Handover::recompute : Handover::lookback);
    if (cut == nullptr) {
        return true;
    }
    plan.kernel = cut;
    if (few) {
        int64_t const spread = std::max<int64_t>(processors / std::max<int64_t>(plan.columns, 1), 2);
        plan.segments = std::min<int64_t>({spread, kRecomputeSegments, chunks});
    } else {
        plan.segments = std::min(chunks >= 2 * tile.longSegment * wanted ? 2 * wanted : wanted, chunks);
    }
    return true;
}

bool chooseStep(Call const& call, int32_t capability, int32_t processors, Plan& plan) noexcept
{
    Kernel const* widest = nullptr;
    Kernel const* narrowest = nullptr;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (!fits(kernel, call) || kernel.capability != capability) {
            continue;
        }
        if (narrowest == nullptr || kernel.BV < narrowest->BV) {
            narrowest = &kernel;
        }
        bool const fills = columnsOf(kernel, call) >= kStepPrograms * processors;
        if (fills && (widest == nullptr || kernel.BV > widest->BV)) {
            widest = &kernel;
        }
    }
    plan.kernel = widest != nullptr ? widest : narrowest;
    if (plan.kernel == nullptr) {
        return false;
    }
    plan.columns = columnsOf(*plan.kernel, call);
    plan.segments = 1;
    return true;
}

}  // namespace

bool isCompiled(Op op, Dtype dtype, int64_t K, int64_t V) noexcept
{
    Call const call{op, dtype, 1, 1, 1, K, V, false};
    return std::any_of(kKernels, kKernels + kKernelCount, [&](Kernel const& kernel) { return fits(kernel, call); });
}

bool choose(Call const& call, int32_t capability, int32_t processors, Plan& plan) noexcept
{
    int32_t const best = bestCapability(call, capability);
    bool const found = best != 0
        && (call.op == Op::LightningAttention ? chooseChunk(call, best, processors, plan)
                                              : chooseStep(call, best, processors, plan));
    if (found) {
        layOut(plan);
    }
    return found;
}

size_t largestWorkspace(Call const& call) noexcept
{
    size_t largest = 0;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (!fits(kernel, call)) {
            continue;
        }
        // However few the columns, a call is cut into no more programs than a full device wants, or twice as many.
        int64_t const columns = columnsOf(kernel, call);
        int64_t const chunks = std::max<int64_t>(ceilDiv(call.T, kernel.C), 1);
        int64_t const cut = std::min(columns * chunks, 2 * kMostProcessors * kernel.programsPerProcessor);
        int64_t const programs = std::max(columns, cut);
        bool const step = call.op == Op::LightningAttentionStep;
        Plan plan{&kernel, 1, cut, 0, 0, 0};
        layOut(plan);
        size_t const scratch = aligned(size_t(kernel.scratchBytes) * (step ? columns : programs));
        largest = std::max(largest, plan.scratchOffset + scratch);
    }
    return largest;
}

}  // namespace tnllm
