// The table of compiled kernels. Its content is generated: see plugins/library.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tnllm {

enum class Op : uint8_t { LightningAttention, LightningAttentionStep };
enum class Dtype : uint8_t { float32, float16, bfloat16 };
enum class Handover : uint8_t { none, recompute, lookback };

// Names as in kernels/compiled.py.
enum class Argument : uint8_t {
    query, key, value, slope_rate, past_state, lengths, output, present_state, carry, progress, scratch,
    profile_scratch,
    query_map, key_map, value_map, output_map,
    unused,
    T, H,
    query_stride_b, query_stride_t, query_stride_h,
    key_stride_b, key_stride_t, key_stride_h,
    value_stride_b, value_stride_t, value_stride_h,
    output_stride_b, output_stride_t, output_stride_h,
    past_stride_b, past_stride_h, past_stride_k, past_stride_v,
    present_stride_b, present_stride_h, present_stride_k, present_stride_v,
};

inline constexpr int32_t kPointers = 12;  // the first ones are addresses
inline constexpr int32_t kMaps = 4;       // then come tensor maps
inline constexpr int32_t kMaxArguments = 64;

struct Kernel {
    Op op;
    int32_t capability;
    Dtype dtype;
    int32_t K, V, BK, BV, C;
    Handover handover;
    int32_t programsPerProcessor;
    double answerCost, walkCost, handoverCost;
    int32_t longSegment;
    char const* entry;
    size_t cubinOffset;
    int32_t threads;
    bool overlaps;
    int32_t sharedBytes;
    int32_t scratchBytes;
    int32_t scratchAlignment;
    Argument const* arguments;
    int32_t argumentCount;
};

extern Kernel const kKernels[];
extern int32_t const kKernelCount;
extern unsigned char const* const kCubins;
extern int32_t const kRecomputeChunks;
extern int64_t const kStepPrograms;

}  // namespace tnllm
