// Drives a plugin library through TensorRT's plugin interface alone, without TensorRT, for callers in Python: load the
// library, get creators, create, serialise and recreate, clone, attach, configure, change shapes, enqueue.

#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// What Python describes a tensor by.
struct Tensor {
    int32_t type;
    int32_t rank;
    int64_t shape[5];
};

struct Log : ILogger {
    std::string text;
    void log(Severity, char const* message) noexcept override { text = message; }
};

struct Finder : ILoggerFinder {
    Log logger;
    ILogger* findLogger() override { return &logger; }
};

Finder gFinder;

IPluginV3OneCore* core(IPluginV3* plugin)
{
    return static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuildV2* build(IPluginV3* plugin)
{
    return static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin)
{
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::vector<PluginTensorDesc> fixed(Tensor const* tensors, int32_t count)
{
    std::vector<PluginTensorDesc> all(count);
    for (int32_t i = 0; i < count; ++i) {
        all[i].type = DataType(tensors[i].type);
        all[i].format = TensorFormat::kLINEAR;
        all[i].dims.nbDims = tensors[i].rank;
        std::copy_n(tensors[i].shape, tensors[i].rank, all[i].dims.d);
    }
    return all;
}

// A profile whose largest and optimal shapes are these; batch and tokens are not fixed.
std::vector<DynamicPluginTensorDesc> dynamic(Tensor const* tensors, int32_t count)
{
    auto const known = fixed(tensors, count);
    std::vector<DynamicPluginTensorDesc> all(count);
    for (int32_t i = 0; i < count; ++i) {
        all[i].desc = known[i];
        all[i].min = all[i].max = all[i].opt = known[i].dims;
        if (known[i].dims.nbDims > 1 || (count == 8 && i == 5)) {
            all[i].desc.dims.d[0] = -1;
            all[i].min.d[0] = 1;
        }
    }
    return all;
}

}  // namespace

extern "C" {

// The library's creators and their number; nullptr with the reason in `error`.
void const* open_library(char const* path, int32_t* count, char const** error)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        *error = dlerror();
        return nullptr;
    }
    auto const set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    if (set == nullptr || get == nullptr) {
        *error = "it exports no getCreators and setLoggerFinder";
        return nullptr;
    }
    set(&gFinder);
    return get(*count);
}

char const* creator_name(void const* creators, int32_t place)
{
    auto* const creator = static_cast<IPluginCreatorInterface* const*>(creators)[place];
    return static_cast<IPluginCreatorV3One*>(creator)->getPluginName();
}

// A plugin from its fields of one int32 each; nullptr where it is refused.
IPluginV3* create(
    void const* creators, int32_t place, char const* const* names, int32_t const* values, int32_t count, int32_t phase)
{
    auto* const creator = static_cast<IPluginCreatorInterface* const*>(creators)[place];
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i) {
        fields.emplace_back(names[i], &values[i], PluginFieldType::kINT32, 1);
    }
    PluginFieldCollection const collection{count, fields.data()};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("x", &collection, TensorRTPhase(phase));
}

// A plugin from what another one serialises, copied as an engine does it; nullptr where it is refused.
IPluginV3* recreate(void const* creators, int32_t place, IPluginV3* plugin)
{
    auto* const creator = static_cast<IPluginCreatorInterface* const*>(creators)[place];
    PluginFieldCollection const* const stored = runtime(plugin)->getFieldsToSerialize();
    std::vector<std::string> names(stored->nbFields);
    std::vector<std::vector<char>> contents(stored->nbFields);
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < stored->nbFields; ++i) {
        PluginField const& field = stored->fields[i];
        auto const* const bytes = static_cast<char const*>(field.data);
        names[i] = field.name;
        contents[i].assign(bytes, bytes + sizeof(int32_t) * field.length);
        fields.emplace_back(names[i].c_str(), contents[i].data(), field.type, field.length);
    }
    PluginFieldCollection const copied{stored->nbFields, fields.data()};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("x", &copied, TensorRTPhase::kRUNTIME);
}

IPluginV3* clone(IPluginV3* plugin) { return plugin->clone(); }

IPluginV3* attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }

void destroy(IPluginV3* plugin) { delete plugin; }

char const* plugin_name(IPluginV3* plugin) { return core(plugin)->getPluginName(); }

int32_t aliased_input(IPluginV3* plugin, int32_t output) { return build(plugin)->getAliasedInput(output); }

int32_t configure(IPluginV3* plugin, Tensor const* tensors, int32_t inputs, int32_t outputs)
{
    auto const all = dynamic(tensors, inputs + outputs);
    return build(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
}

uint64_t workspace_bytes(IPluginV3* plugin, Tensor const* tensors, int32_t inputs, int32_t outputs)
{
    auto const all = dynamic(tensors, inputs + outputs);
    return build(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
}

int32_t change_shapes(IPluginV3* plugin, Tensor const* tensors, int32_t inputs, int32_t outputs)
{
    auto const all = fixed(tensors, inputs + outputs);
    return runtime(plugin)->onShapeChange(all.data(), inputs, all.data() + inputs, outputs);
}

// Addresses are those of the inputs, then those of the outputs.
int32_t enqueue(IPluginV3* plugin, Tensor const* tensors, int32_t inputs, int32_t outputs, void* const* addresses,
    void* workspace, void* stream)
{
    auto const all = fixed(tensors, inputs + outputs);
    return runtime(plugin)->enqueue(all.data(), all.data() + inputs, addresses, addresses + inputs, workspace,
        static_cast<cudaStream_t>(stream));
}

// The last message that was logged, which is then forgotten.
char const* last_message()
{
    static std::string said;
    said.swap(gFinder.logger.text);
    gFinder.logger.text.clear();
    return said.c_str();
}

}  // extern "C"
