// Loading kernels, once per context, and launching them.
#pragma once

#include "driver.h"
#include "plan.h"

namespace tnllm {

// Addresses of one call, by Argument below kPointers; carry, progress and scratch are filled in from the workspace.
struct Addresses {
    void const* of[kPointers];
};

// Load what `plan` needs into the device's context. On failure return false with a reason.
bool load(Plan const& plan, Device const& device, char const*& reason) noexcept;

// Launch. Allocates nothing, loads nothing that `load` has loaded. On failure return false with a reason.
bool launch(Call const& call, Plan const& plan, Device const& device, Addresses addresses, void* workspace,
    CUstream stream, char const*& reason) noexcept;

// Copy the state of a call without tokens. On failure return false with a reason.
bool copyState(Call const& call, void const* past, void* present, CUstream stream, char const*& reason) noexcept;

}  // namespace tnllm
