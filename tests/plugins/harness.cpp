// Drives the library through TensorRT's plugin interface alone, as far as that goes without a GPU. Prints one line per
// claim that fails and returns their number.

#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

using namespace nvinfer1;

static int gFailures = 0;

static void check(bool holds, std::string const& claim)
{
    if (!holds) {
        std::printf("FAILED: %s\n", claim.c_str());
        ++gFailures;
    }
}

struct Log : ILogger {
    std::string last;
    void log(Severity, char const* text) noexcept override { last = text; }
};

struct Finder : ILoggerFinder {
    Log logger;
    ILogger* findLogger() override { return &logger; }
};

static Finder gFinder;

static DynamicPluginTensorDesc tensor(DataType type, std::vector<int64_t> const& shape)
{
    DynamicPluginTensorDesc found{};
    found.desc.dims.nbDims = int32_t(shape.size());
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        found.desc.dims.d[axis] = shape[axis];
    }
    found.min = found.max = found.opt = found.desc.dims;
    found.desc.type = type;
    found.desc.format = TensorFormat::kLINEAR;
    return found;
}

static std::vector<DynamicPluginTensorDesc> ports(bool step, DataType type, int64_t B, int64_t T, int64_t K, int64_t V)
{
    auto const rows = [&](int64_t D) {
        return step ? tensor(type, {B, 5, D}) : tensor(type, {B, T, 5, D});
    };
    auto const state = tensor(DataType::kFLOAT, {B, 5, K, V});
    std::vector<DynamicPluginTensorDesc> all{rows(K), rows(K), rows(V), tensor(DataType::kFLOAT, {5}), state};
    if (!step) {
        all.push_back(tensor(DataType::kINT32, {B}));
    }
    all.push_back(rows(V));
    all.push_back(state);
    return all;
}

static void drive(IPluginCreatorV3One& creator)
{
    std::string const op = creator.getPluginName();
    bool const step = op == "LightningAttentionStep";
    int32_t const inputs = step ? 5 : 6;
    IPluginV3* const made = creator.createPlugin("x", nullptr, TensorRTPhase::kBUILD);
    check(made != nullptr, op + ": is made without fields");
    auto* build = static_cast<IPluginV3OneBuildV2*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    check(build->getNbOutputs() == 2, op + ": has two outputs");
    check(build->getAliasedInput(1) == -1, op + ": aliases nothing unless asked");

    std::map<DataType, bool> const kinds{{DataType::kFLOAT, true}, {DataType::kHALF, true}, {DataType::kBF16, true},
        {DataType::kINT8, false}, {DataType::kINT32, false}, {DataType::kINT64, false}};
    for (auto const& [type, runs] : kinds) {
        auto all = ports(step, type, 2, 257, 96, 48);
        check(build->supportsFormatCombination(0, all.data(), inputs, 2) == runs, op + ": takes the three types only");
        if (!runs) {
            continue;
        }
        for (int32_t pos = 1; pos < inputs + 2; ++pos) {
            check(build->supportsFormatCombination(pos, all.data(), inputs, 2), op + ": takes its own types");
            auto const right = all[pos].desc;
            all[pos].desc.type = DataType::kINT8;
            check(!build->supportsFormatCombination(pos, all.data(), inputs, 2), op + ": takes no other types");
            all[pos].desc = right;
            all[pos].desc.format = TensorFormat::kHWC8;
            check(!build->supportsFormatCombination(pos, all.data(), inputs, 2), op + ": takes rows as they are only");
            all[pos].desc = right;
        }
        std::vector<DataType> types;
        for (int32_t i = 0; i < inputs; ++i) {
            types.push_back(all[i].desc.type);
        }
        DataType out[2] = {DataType::kINT8, DataType::kINT8};
        check(build->getOutputDataTypes(out, 2, types.data(), inputs) == 0 && out[0] == type
                && out[1] == DataType::kFLOAT,
            op + ": output has query's type, the state float32");
        types[1] = type == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
        check(build->getOutputDataTypes(out, 2, types.data(), inputs) != 0
                && gFinder.logger.last.find("key is ") != std::string::npos
                && gFinder.logger.last.find(" like query") != std::string::npos,
            op + ": names the tensor, what was found and what was expected");
        check(build->configurePlugin(all.data(), inputs, all.data() + inputs, 2) == 0, op + ": takes fitting shapes");
        check(build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, 2) < (size_t(1) << 30),
            op + ": asks for a sane workspace");
        auto other = ports(step, type, 2, 257, 96, 48);
        other[4].desc.dims.d[2] = 97;
        check(build->configurePlugin(other.data(), inputs, other.data() + inputs, 2) != 0
                && gFinder.logger.last.find("axis 2 of past_state is 97; expected 96 as in query") != std::string::npos,
            op + ": names a size that does not fit");
        auto unknown = ports(step, type, 2, 257, 128, 128);
        check(build->configurePlugin(unknown.data(), inputs, unknown.data() + inputs, 2) != 0
                && gFinder.logger.last.find("no kernel for") != std::string::npos,
            op + ": names head sizes it has no kernel for");
        other = ports(step, type, 2, 257, 96, 48);
        other[0].desc.dims.nbDims = 2;
        check(build->configurePlugin(other.data(), inputs, other.data() + inputs, 2) != 0, op + ": refuses other ranks");
    }

    // Serialise, recreate, clone, attach: all mean the same plugin.
    int32_t const one = 1;
    PluginField const asked[] = {{"in_place", &one, PluginFieldType::kINT32, 1}};
    PluginFieldCollection const askedFields{1, asked};
    IPluginV3* const inPlace = creator.createPlugin("x", &askedFields, TensorRTPhase::kBUILD);
    auto* runtime = static_cast<IPluginV3OneRuntime*>(inPlace->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* const stored = runtime->getFieldsToSerialize();
    IPluginV3* const again = creator.createPlugin("x", stored, TensorRTPhase::kRUNTIME);
    check(again != nullptr, op + ": is made again from what it stored");
    IPluginV3* const clone = again->clone();
    auto* rerun = static_cast<IPluginV3OneRuntime*>(clone->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const attached = rerun->attachToContext(nullptr);
    for (IPluginV3* plugin : {inPlace, again, clone, attached}) {
        auto* b = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        auto* c = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
        check(b->getAliasedInput(1) == 4 && b->getAliasedInput(0) == -1, op + ": the state alone is updated in place");
        check(c->getPluginName() == op && std::string(c->getPluginNamespace()) == "tnllm", op + ": keeps its name");
    }

    // No driver here: an error code and a message, no exception and no abort.
    auto* live = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto const all = ports(step, DataType::kBF16, 2, 63, 96, 48);
    std::vector<PluginTensorDesc> fixed;
    for (auto const& port : all) {
        fixed.push_back(port.desc);
    }
    void const* nothing[6] = {};
    void* nowhere[2] = {};
    gFinder.logger.last.clear();
    int32_t const shaped = live->onShapeChange(fixed.data(), inputs, fixed.data() + inputs, 2);
    int32_t const queued = live->enqueue(fixed.data(), fixed.data() + inputs, nothing, nowhere, nullptr, nullptr);
    bool const said = gFinder.logger.last.find("the device can't be told: ") != std::string::npos;
    check(shaped != 0 && queued != 0 && said, op + ": says that there is no device");
    check(live->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0
            && live->onShapeChange(nullptr, inputs, nullptr, 2) != 0,
        op + ": bears to be given nothing");
    auto other = fixed;
    other[1].dims.d[0] = 3;
    check(live->enqueue(other.data(), other.data() + inputs, nothing, nowhere, nullptr, nullptr) != 0
            && gFinder.logger.last.find("axis 0 of key is 3; expected 2") != std::string::npos,
        op + ": shapes of a call that do not fit are named");
    std::vector<PluginTensorDesc> empty;
    for (auto const& port : ports(step, DataType::kBF16, 0, 63, 96, 48)) {
        empty.push_back(port.desc);
    }
    check(live->enqueue(empty.data(), empty.data() + inputs, nothing, nowhere, nullptr, nullptr) == 0,
        op + ": nothing to do needs no device");
    for (IPluginV3* plugin : {made, inPlace, again, clone, attached}) {
        delete plugin;
    }
}

int main(int, char** arguments)
{
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::printf("FAILED: %s\n", dlerror());
        return 1;
    }
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&gFinder);
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    int32_t count = 0;
    auto const* creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    check(count == 2, "there are two creators");
    for (int32_t i = 0; i < count; ++i) {
        drive(*static_cast<IPluginCreatorV3One*>(creators[i]));
    }
    return gFailures;
}
