"""For who has TensorRT or TensorRT-RTX and a GPU that it runs on: build, run, compare with the eager model.

In processes of their own: a process takes one plugin library, and other tests take one that is no code.
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tnllm_export.targets import TARGETS

pytestmark = pytest.mark.tensorrt

ENGINES = {target.name: target.engine for target in TARGETS if target.name.startswith("tensorrt")}

BUILD = """
import sys
from pathlib import Path
import torch
from tnllm_export import api
path, target, lowering, weights = sys.argv[1:]
library = None
if lowering == "plugin":
    major, minor = torch.cuda.get_device_capability()
    library = api.build_plugin((f"{major}.{minor}",), bundle=path)
options = api.EngineOptions(max_batch=8, max_prompt=512, weights=weights, plugin_library=library)
result = api.build(path, target, options)
assert not result.cached
assert api.build(path, target, options).cached
"""

VERIFY = (
    BUILD
    + """
report = api.verify(path, target, seed=0, save=False)
print(report.checks)
report.require_pass()
ours, theirs = (api.generate(path, "It was a fine morning", runtime=name).text for name in (target, "torch"))
print(repr(ours), repr(theirs))
assert ours
"""
)

EMBED = (
    BUILD
    + """
from dataclasses import replace
embedded = api.build(path, target, replace(options, embed_plugin=True))
assert embedded.engines.plugin_library is None
api.verify(path, target, seed=0, save=False).require_pass()
"""
)

REFUSE = (
    BUILD
    + """
from tnllm_export.errors import ProfileError
runtime = api.load_runtime(path, target)
state = runtime.initial_state(9)
ids = torch.zeros(9, 1, dtype=torch.int64)
try:
    runtime.prefill(ids, torch.ones(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int64), state)
except ProfileError as error:
    assert "batch is 9; the engines take at most 8" in str(error)
else:
    sys.exit("a batch over the profile was taken")
# It still runs what fits, and decodes past the two steps after which graphs are replayed.
state = runtime.initial_state(2)
zeros = torch.zeros(2, dtype=torch.int64)
logits, state = runtime.prefill(ids[:2], torch.ones(2, dtype=torch.int32), zeros, state)
for position in range(1, 9):
    logits, state = runtime.decode(logits.argmax(-1, keepdim=True), zeros + position, state)
    assert logits.isfinite().all()
"""
)


@pytest.fixture(params=ENGINES)
def target(request) -> str:
    """A target whose package is here, with a GPU that its engines run on."""
    engine = ENGINES[request.param]
    if find_spec(engine.module) is None:
        pytest.skip(f"needs the package {engine.module}: pip install 'tnllm-export[{engine.extra}]'")
    if not torch.cuda.is_available():
        pytest.skip(f"needs a GPU that {engine.module} runs on, and there is no CUDA device")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if not engine.needs_gpu and not engine.runs_on(capability):
        pytest.skip(f"{engine.module} runs on {engine.compute_capabilities}; this GPU has {capability}")
    return request.param


def succeed(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("lowering", ["matmul", "plugin"])
def test_the_demo_checkpoint_is_built_and_run_as_the_eager_model_runs_it(target, bundle_of, lowering, dtype):
    succeed(VERIFY, bundle_of("demo", dtype, lowering).path, target, lowering, "embedded")


@pytest.mark.parametrize("lowering", ["matmul", "plugin"])
@pytest.mark.parametrize("weights", ["external", "stripped"])
def test_weights_outside_the_engines_give_the_same(target, bundle_of, lowering, weights):
    succeed(VERIFY, bundle_of("demo", "float16", lowering).path, target, lowering, weights)


def test_engines_that_carry_the_plugins_need_no_library_beside_them(target, bundle_of):
    succeed(EMBED, bundle_of("demo", "float16", "plugin").path, target, "plugin", "embedded")


def test_a_request_over_the_profile_is_refused_and_the_next_one_runs(target, bundle_of):
    succeed(REFUSE, bundle_of("demo", "float16", "matmul").path, target, "matmul", "embedded")
