// From the shapes of a call to a kernel, its grid and its workspace. The rules are those of
// kernels/lightning_attention/sweep_plan.py and step_plan.py; nothing here touches a device.
#pragma once

#include "kernels.h"

namespace tnllm {

// The shapes of one call; T is 1 for the step.
struct Call {
    Op op;
    Dtype dtype;
    int64_t B, T, H, K, V;
    bool inPlace;  // present_state may overwrite past_state
};

struct Plan {
    Kernel const* kernel;
    int64_t columns;   // programs along the grid's first axis
    int64_t segments;  // and along its second
    size_t carryOffset, scratchOffset, workspaceBytes;  // of the workspace; `progress` stands at its start
};

// Whether the table has a kernel for these types and sizes, for any device.
bool isCompiled(Op op, Dtype dtype, int64_t K, int64_t V) noexcept;

// Choose for a device; false where the table has nothing for it.
bool choose(Call const& call, int32_t capability, int32_t processors, Plan& plan) noexcept;

// Enough workspace for every call up to these shapes on any device.
size_t largestWorkspace(Call const& call) noexcept;

}  // namespace tnllm
