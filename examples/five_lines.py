"""The whole way in five calls, as the README shows it. Makes the folder `bundle` where it is run."""

from tnllm_export import api
from tnllm_export.demo import checkpoint_folder

model = api.load(checkpoint_folder())  # the eager PyTorch model
bundle = api.export(checkpoint_folder(), "bundle")  # two ONNX graphs, the weights once
api.verify(bundle).require_pass()  # raises ParityError where the graphs differ from the model
runtime = api.load_runtime(bundle)  # ONNX Runtime on the CPU
print(api.generate(bundle, "It was a fine morning", runtime=runtime, temperature=0.7, top_p=0.9).text)
