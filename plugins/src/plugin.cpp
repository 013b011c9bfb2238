// The two ops as TensorRT plugins:
//
//     LightningAttention      query [B, T, H, K], key [B, T, H, K], value [B, T, H, V], slope_rate [H] f32,
//                             past_state [B, H, K, V] f32, lengths [B] i32 -> output [B, T, H, V], present_state f32
//     LightningAttentionStep  query [B, H, K], key [B, H, K], value [B, H, V], slope_rate [H] f32,
//                             past_state [B, H, K, V] f32 -> output [B, H, V], present_state f32
//
// A plugin remembers nothing of a call: enqueue reads all from its descriptors, so clones, contexts and streams can't
// get into each other's way. Nothing here throws, and what goes wrong is logged and returned as an error code.

#include <NvInferRuntime.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "launch.h"

namespace tnllm {
namespace {

using namespace nvinfer1;

constexpr char const* kNamespace = "tnllm";
constexpr char const* kVersion = "1";
constexpr int32_t kContract = 1;  // of the fields that are stored in an engine
constexpr int32_t kOutputs = 2;
constexpr int32_t kPastState = 4;  // place among the inputs
constexpr int32_t kFailed = 1;
constexpr char const* kInputNames[] = {"query", "key", "value", "slope_rate", "past_state", "lengths"};
constexpr char const* kOutputNames[] = {"output", "present_state"};
constexpr Argument kInputs[] = {Argument::query, Argument::key, Argument::value, Argument::slope_rate,
    Argument::past_state, Argument::lengths};

std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};

char const* nameOf(Op op) noexcept
{
    return op == Op::LightningAttention ? "LightningAttention" : "LightningAttentionStep";
}

int32_t inputCount(Op op) noexcept { return op == Op::LightningAttention ? 6 : 5; }

char const* nameOf(DataType type) noexcept
{
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
    }
}

// Log an error, `tnllm::<op>: <message>`, and return an error code.
int32_t fail(Op op, char const* format, ...) noexcept
{
    char text[512];
    int const used = std::snprintf(text, sizeof(text), "%s::%s: ", kNamespace, nameOf(op));
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text + used, sizeof(text) - used, format, arguments);
    va_end(arguments);
    ILoggerFinder* const finder = gLoggerFinder.load();
    ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
    return kFailed;
}

bool toDtype(DataType type, Dtype& dtype) noexcept
{
    switch (type) {
    case DataType::kFLOAT: dtype = Dtype::float32; return true;
    case DataType::kHALF: dtype = Dtype::float16; return true;
    case DataType::kBF16: dtype = Dtype::bfloat16; return true;
    default: return false;
    }
}

// The type that input `place` has to have where query has the type `query`.
DataType expectedInput(int32_t place, DataType query) noexcept
{
    switch (place) {
    case 0:
    case 1:
    case 2: return query;
    case 5: return DataType::kINT32;
    default: return DataType::kFLOAT;
    }
}

int32_t expectedRank(Op op, int32_t place) noexcept
{
    if (place < 3) {
        return op == Op::LightningAttention ? 4 : 3;
    }
    return place == kPastState ? 4 : 1;
}

int32_t checkTypes(Op op, DataType const* types, int32_t count) noexcept
{
    if (count != inputCount(op)) {
        return fail(op, "has %d inputs; expected %d", count, inputCount(op));
    }
    Dtype dtype{};
    if (!toDtype(types[0], dtype)) {
        return fail(op, "query is %s; expected float32, float16 or bfloat16", nameOf(types[0]));
    }
    for (int32_t i = 1; i < count; ++i) {
        DataType const expected = expectedInput(i, types[0]);
        if (types[i] != expected) {
            return fail(op, "%s is %s; expected %s%s", kInputNames[i], nameOf(types[i]), nameOf(expected),
                i < 3 ? " like query" : "");
        }
    }
    return 0;
}

// Compare a size, where both are known, with another tensor's.
int32_t checkSize(Op op, char const* tensor, int32_t axis, int64_t found, int64_t expected, char const* other) noexcept
{
    if (found >= 0 && expected >= 0 && found != expected) {
        return fail(op, "axis %d of %s is %lld; expected %lld as in %s", axis, tensor, static_cast<long long>(found),
            static_cast<long long>(expected), other);
    }
    return 0;
}

// Check ranks and sizes; -1 is a size not known yet.
int32_t checkShapes(Op op, Dims const* const* shapes) noexcept
{
    for (int32_t i = 0; i < inputCount(op); ++i) {
        if (shapes[i]->nbDims != expectedRank(op, i)) {
            return fail(op, "%s has %d dimensions; expected %d", kInputNames[i], shapes[i]->nbDims,
                expectedRank(op, i));
        }
    }
    Dims const& query = *shapes[0];
    Dims const& value = *shapes[2];
    Dims const& state = *shapes[kPastState];
    int32_t const last = query.nbDims - 1;
    int32_t bad = 0;
    for (int32_t axis = 0; axis <= last && bad == 0; ++axis) {
        bad = checkSize(op, "key", axis, shapes[1]->d[axis], query.d[axis], "query");
        if (bad == 0 && axis < last) {
            bad = checkSize(op, "value", axis, value.d[axis], query.d[axis], "query");
        }
    }
    bad = bad != 0 ? bad : checkSize(op, "slope_rate", 0, shapes[3]->d[0], query.d[last - 1], "query");
    bad = bad != 0 ? bad : checkSize(op, "past_state", 0, state.d[0], query.d[0], "query");
    bad = bad != 0 ? bad : checkSize(op, "past_state", 1, state.d[1], query.d[last - 1], "query");
    bad = bad != 0 ? bad : checkSize(op, "past_state", 2, state.d[2], query.d[last], "query");
    bad = bad != 0 ? bad : checkSize(op, "past_state", 3, state.d[3], value.d[last], "value");
    if (bad == 0 && op == Op::LightningAttention) {
        bad = checkSize(op, "lengths", 0, shapes[5]->d[0], query.d[0], "query");
    }
    return bad;
}

// Kernels read and write 16 bytes at once.
int32_t checkAddress(Op op, char const* tensor, void const* address) noexcept
{
    if (address == nullptr) {
        return fail(op, "%s has no address", tensor);
    }
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        return fail(op, "%s is at %p; expected a multiple of 16", tensor, address);
    }
    return 0;
}

Call makeCall(Op op, DataType type, Dims const& query, Dims const& value) noexcept
{
    Call call{};
    call.op = op;
    toDtype(type, call.dtype);
    bool const step = op == Op::LightningAttentionStep;
    call.B = query.d[0];
    call.T = step ? 1 : query.d[1];
    call.H = query.d[query.nbDims - 2];
    call.K = query.d[query.nbDims - 1];
    call.V = value.d[value.nbDims - 1];
    return call;
}

int32_t checkCompiled(Op op, DataType type, int64_t K, int64_t V) noexcept
{
    Dtype dtype{};
    toDtype(type, dtype);
    if (K < 0 || V < 0) {
        return fail(op, "the size of key or value is not fixed; expected it to be known when the engine is built");
    }
    if (!isCompiled(op, dtype, K, V)) {
        return fail(op, "this library has no kernel for %s with K %lld and V %lld; make one with tnllm build-plugin "
                        "--bundle BUNDLE",
            nameOf(type), static_cast<long long>(K), static_cast<long long>(V));
    }
    return 0;
}

class Attention final : public IPluginV3,
                        public IPluginV3OneCore,
                        public IPluginV3OneBuildV2,
                        public IPluginV3OneRuntime {
public:
    Attention(Op op, bool inPlace) noexcept
        : mOp(op)
        , mInPlace(inPlace ? 1 : 0)
        , mFields{{"contract", &mContract, PluginFieldType::kINT32, 1},
              {"in_place", &mInPlace, PluginFieldType::kINT32, 1}}
        , mCollection{2, mFields}
    {
    }

    Attention(Attention const&) = delete;
    Attention& operator=(Attention const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new (std::nothrow) Attention(mOp, mInPlace != 0); }

    AsciiChar const* getPluginName() const noexcept override { return nameOf(mOp); }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        if (nbOutputs != kOutputs) {
            return fail(mOp, "has %d outputs; expected %d", nbOutputs, kOutputs);
        }
        if (int32_t const bad = checkTypes(mOp, inputTypes, nbInputs)) {
            return bad;
        }
        outputTypes[0] = inputTypes[0];
        outputTypes[1] = DataType::kFLOAT;
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, IExprBuilder&) noexcept override
    {
        if (nbInputs != inputCount(mOp) || nbOutputs != kOutputs) {
            return fail(mOp, "has %d inputs and %d outputs; expected %d and %d", nbInputs, nbOutputs, inputCount(mOp),
                kOutputs);
        }
        Dims shapes[6];
        Dims const* places[6];
        for (int32_t i = 0; i < nbInputs; ++i) {
            shapes[i].nbDims = inputs[i].nbDims;
            for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
                IDimensionExpr const* const size = inputs[i].d[axis];
                shapes[i].d[axis] = size->isConstant() ? size->getConstantValue() : -1;
            }
            places[i] = &shapes[i];
        }
        if (int32_t const bad = checkShapes(mOp, places)) {
            return bad;
        }
        outputs[0] = inputs[2];
        outputs[1] = inputs[kPastState];
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (nbInputs != inputCount(mOp) || nbOutputs != kOutputs || inOut[pos].desc.format != TensorFormat::kLINEAR) {
            return false;
        }
        DataType const type = inOut[pos].desc.type;
        Dtype dtype{};
        if (pos == 0) {
            return toDtype(type, dtype);
        }
        if (pos < nbInputs) {
            return type == expectedInput(pos, inOut[0].desc.type);
        }
        return type == (pos == nbInputs ? inOut[0].desc.type : DataType::kFLOAT);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t) noexcept override
    {
        DataType types[6];
        Dims const* shapes[6];
        if (nbInputs != inputCount(mOp)) {
            return fail(mOp, "has %d inputs; expected %d", nbInputs, inputCount(mOp));
        }
        for (int32_t i = 0; i < nbInputs; ++i) {
            types[i] = in[i].desc.type;
            shapes[i] = &in[i].desc.dims;
        }
        int32_t bad = checkTypes(mOp, types, nbInputs);
        bad = bad != 0 ? bad : checkShapes(mOp, shapes);
        Dims const& query = *shapes[0];
        Dims const& value = *shapes[2];
        return bad != 0 ? bad : checkCompiled(mOp, types[0], query.d[query.nbDims - 1], value.d[value.nbDims - 1]);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override
    {
        return largestWorkspace(makeCall(mOp, inputs[0].desc.type, inputs[0].max, inputs[2].max));
    }

    int32_t getAliasedInput(int32_t outputIndex) noexcept override
    {
        return mInPlace != 0 && outputIndex == 1 ? kPastState : -1;
    }

    // Kernels are loaded here, so that enqueue never has to: loading is not allowed while a CUDA graph is captured.
    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t) noexcept override
    {
        if (nbInputs != inputCount(mOp)) {
            return fail(mOp, "has %d inputs; expected %d", nbInputs, inputCount(mOp));
        }
        Call call{};
        Device device{};
        Plan plan{};
        int32_t bad = read(in, call);
        bad = bad != 0 ? bad : prepare(call, device, plan);
        if (bad != 0) {
            return bad;
        }
        char const* reason = nullptr;
        return load(plan, device, reason) ? 0 : fail(mOp, "kernel %s could not be loaded: %s", plan.kernel->entry, reason);
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        Call call{};
        if (int32_t const bad = read(inputDesc, call)) {
            return bad;
        }
        if (call.B == 0 || call.H == 0) {
            return 0;
        }
        Device device{};
        Plan plan{};
        int32_t bad = prepare(call, device, plan);
        if (bad == 0 && (inputs == nullptr || outputs == nullptr)) {
            bad = fail(mOp, "was given no addresses");
        }
        Addresses addresses{};
        for (int32_t i = 0; i < inputCount(mOp) && bad == 0; ++i) {
            bad = call.T == 0 && i != kPastState ? 0 : checkAddress(mOp, kInputNames[i], inputs[i]);
            addresses.of[int(kInputs[i])] = inputs[i];
        }
        for (int32_t i = 0; i < kOutputs && bad == 0; ++i) {
            bad = call.T == 0 && i == 0 ? 0 : checkAddress(mOp, kOutputNames[i], outputs[i]);
        }
        if (bad == 0 && mInPlace == 0 && mOp == Op::LightningAttention && inputs[kPastState] == outputs[1]) {
            bad = fail(mOp, "present_state is at the address of past_state; expected another one, or in_place 1");
        }
        if (bad != 0) {
            return bad;
        }
        char const* reason = nullptr;
        if (call.T == 0) {
            bool const copied = copyState(call, inputs[kPastState], outputs[1], stream, reason);
            return copied ? 0 : fail(mOp, "past_state could not be copied: %s", reason);
        }
        addresses.of[int(Argument::output)] = outputs[0];
        addresses.of[int(Argument::present_state)] = outputs[1];
        bool const launched = launch(call, plan, device, addresses, workspace, stream, reason);
        return launched ? 0 : fail(mOp, "kernel %s could not be launched: %s", plan.kernel->entry, reason);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mCollection; }

private:
    // Check the tensors of a call and take its shapes from them.
    int32_t read(PluginTensorDesc const* in, Call& call) const noexcept
    {
        if (in == nullptr) {
            return fail(mOp, "was given no descriptors of its inputs");
        }
        DataType types[6];
        Dims const* shapes[6];
        for (int32_t i = 0; i < inputCount(mOp); ++i) {
            types[i] = in[i].type;
            shapes[i] = &in[i].dims;
        }
        int32_t bad = checkTypes(mOp, types, inputCount(mOp));
        bad = bad != 0 ? bad : checkShapes(mOp, shapes);
        if (bad == 0) {
            call = makeCall(mOp, types[0], *shapes[0], *shapes[2]);
            call.inPlace = mInPlace != 0;
        }
        return bad;
    }

    int32_t prepare(Call const& call, Device& device, Plan& plan) const noexcept
    {
        char const* reason = nullptr;
        if (!currentDevice(device, reason)) {
            return fail(mOp, "the device can't be told: %s", reason);
        }
        if (!choose(call, device.capability, device.processors, plan)) {
            return fail(mOp, "this library has no kernel for compute capability %d.%d with K %lld and V %lld; make one "
                             "with tnllm build-plugin --bundle BUNDLE, which names all that there are",
                device.capability / 10, device.capability % 10, static_cast<long long>(call.K),
                static_cast<long long>(call.V));
        }
        return 0;
    }

    Op mOp;
    int32_t mContract = kContract;
    int32_t mInPlace;
    PluginField mFields[2];
    PluginFieldCollection mCollection;
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(Op op) noexcept
        : mOp(op)
    {
    }

    AsciiChar const* getPluginName() const noexcept override { return nameOf(mOp); }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }

    // Fields: `contract`, which engines store, and `in_place`: whether present_state may overwrite past_state.
    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override
    {
        int32_t contract = 0;
        int32_t inPlace = 0;
        bool seen[2] = {false, false};
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            PluginField const& field = fields->fields[i];
            bool const isContract = std::strcmp(field.name, "contract") == 0;
            if (!isContract && std::strcmp(field.name, "in_place") != 0) {
                fail(mOp, "unknown field %s; expected contract or in_place", field.name);
                return nullptr;
            }
            if (field.type != PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
                fail(mOp, "field %s has type %d and %d values; expected one int32", field.name, int(field.type),
                    field.length);
                return nullptr;
            }
            std::memcpy(isContract ? &contract : &inPlace, field.data, sizeof(int32_t));
            seen[isContract ? 0 : 1] = true;
        }
        if (phase == TensorRTPhase::kRUNTIME && !(seen[0] && seen[1])) {
            fail(mOp, "the engine lacks the field %s; build it again", seen[0] ? "in_place" : "contract");
            return nullptr;
        }
        if (seen[0] && contract != kContract) {
            fail(mOp, "the engine has version %d of the plugin's fields; expected %d: build it again with this library",
                contract, kContract);
            return nullptr;
        }
        if (inPlace != 0 && inPlace != 1) {
            fail(mOp, "field in_place is %d; expected 0 or 1", inPlace);
            return nullptr;
        }
        return new (std::nothrow) Attention(mOp, inPlace == 1);
    }

private:
    Op mOp;
    PluginField mFields[2] = {{"contract", nullptr, PluginFieldType::kINT32, 1},
        {"in_place", nullptr, PluginFieldType::kINT32, 1}};
    PluginFieldCollection mCollection{2, mFields};
};

}  // namespace
}  // namespace tnllm

// What IPluginRegistry::loadLibrary looks for.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static tnllm::Creator chunk(tnllm::Op::LightningAttention);
    static tnllm::Creator step(tnllm::Op::LightningAttentionStep);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&chunk, &step};
    nbCreators = 2;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    tnllm::gLoggerFinder.store(finder);
}
