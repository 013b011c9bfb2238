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

// The newest capability of which a device runs a kernel, 0 without any.
int32_t newestCapability(Call const& call, int32_t capability) noexcept
{
    int32_t best = 0;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        if (fits(kKernels[i], call) && runsOn(kKernels[i], capability)) {
            best = std::max(best, kKernels[i].capability);
        }
    }
    return best;
}

// Chunks of the last segment of a recomputing call. `left` is 1 - walk to the power of segments.
double lastSegment(int64_t chunks, double walk, double left) noexcept
{
    return double(chunks) * walk * left / ((1.0 - left) * (1.0 - walk));
}

// As `_plans` in sweep_plan.py: about how long a call takes if it is cut so, in the same order of arithmetic.
double costOf(
    Kernel const& kernel, int64_t chunks, int64_t columns, int64_t slots, int64_t segments, double left) noexcept
{
    double const cost = kernel.answerCost * double(chunks);
    if (kernel.handover == Handover::none) {
        return cost * double(ceilDiv(columns, slots));
    }
    if (kernel.handover == Handover::recompute) {
        return cost * kernel.walkCost / (1.0 - left);
    }
    double const shared = cost * (1.0 + kernel.walkCost) / double(segments);
    return shared + kernel.answerCost * kernel.handoverCost * double(4 + segments) / 8.0;
}

template <typename Usable>
bool chooseChunk(Call const& call, Usable const& usable, int32_t processors, Plan& plan) noexcept
{
    double least = 0;
    plan.kernel = nullptr;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (!usable(kernel)) {
            continue;
        }
        int64_t const chunks = std::max<int64_t>(ceilDiv(call.T, kernel.C), 1);
        int64_t const columns = std::max<int64_t>(columnsOf(kernel, call), 1);
        int64_t const slots = int64_t(processors) * kernel.programsPerProcessor;
        bool const cut = kernel.handover != Handover::none;
        // Where every segment starts from past_state, the last one may not overwrite it before the others have read it.
        if (kernel.handover == Handover::recompute && (call.inPlace || chunks > kRecomputeChunks)) {
            continue;
        }
        int64_t const most = cut ? std::min(slots / columns, chunks) : 1;
        double left = 1.0 - kernel.walkCost;
        for (int64_t segments = cut ? 2 : 1; segments <= most; ++segments) {
            left *= 1.0 - kernel.walkCost;
            if (kernel.handover == Handover::recompute && lastSegment(chunks, kernel.walkCost, left) < 0.5) {
                break;
            }
            double const cost = costOf(kernel, chunks, columns, slots, segments, left);
            if (plan.kernel == nullptr || cost < least) {
                least = cost;
                bool const isLong = kernel.handover == Handover::lookback
                    && chunks >= 2 * int64_t(kernel.longSegment) * segments;
                plan.kernel = &kernel;
                plan.columns = columnsOf(kernel, call);
                plan.segments = isLong ? 2 * segments : segments;
            }
        }
    }
    return plan.kernel != nullptr;
}

template <typename Usable>
bool chooseStep(Call const& call, Usable const& usable, int32_t processors, Plan& plan) noexcept
{
    Kernel const* widest = nullptr;
    Kernel const* narrowest = nullptr;
    for (int32_t i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (!usable(kernel)) {
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
    int32_t const newest = newestCapability(call, capability);
    auto const usable = [&](Kernel const& kernel) {
        return fits(kernel, call) && kernel.capability == newest && runsOn(kernel, capability);
    };
    bool const found = call.op == Op::LightningAttention ? chooseChunk(call, usable, processors, plan)
                                                         : chooseStep(call, usable, processors, plan);
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
