"""What the CUDA driver is told of a launch that Python prepares: with a driver of our own, on a machine without one."""

import ctypes
import struct
import threading

import pytest

from tests.plugins.cuda_driver import compile_driver, state_of
from tnllm_export.kernels import cuda_driver
from tnllm_export.kernels.cuda_driver import PreparedLaunch, TensorMap, capture_of, load_function, use_context
from tnllm_export.kernels.lightning_attention.hopper_launch import map_of

MAP = TensorMap(sizes=(128, 32, 1000, 2), strides=(256, 8192, 8192000), block=(64, 1, 64, 1))


@pytest.fixture
def state(tmp_path, monkeypatch):
    driver = ctypes.PyDLL(str(compile_driver(tmp_path)))
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    return state_of(driver)


def test_a_map_is_encoded_as_it_is_described(state):
    encoded = MAP.encode(4096)
    assert encoded.place % 64 == 0
    assert tuple(state.map_sizes) == MAP.sizes
    assert tuple(state.map_strides) == MAP.strides
    assert tuple(state.map_block) == MAP.block
    assert ctypes.c_uint64.from_address(encoded.place).value == 4096


def test_a_launch_gets_maps_addresses_and_numbers_in_their_places(state):
    launch = PreparedLaunch(
        load_function(b"code", "kernel", 1 << 16), (5, 3, 1), 384, 1 << 16, [None, 7, "", -1, None, ""]
    )
    state.argument_count = 6
    maps = [MAP.encode(4096), MAP.encode(8192)]
    parameters = launch.parameters(maps)
    for addresses, stream in ((16, 1 << 40), 111), ((48, 80), 222):
        launch(parameters, addresses, stream)
        assert list(state.arguments[:6]) == [4096, 7, addresses[0], (1 << 64) - 1, 8192, addresses[1]]
        assert state.stream == stream
    assert tuple(state.grid) == (5, 3, 1)
    assert (state.threads, state.shared_bytes) == (384, 1 << 16)
    assert (state.count("module"), state.count("launch")) == (1, 2)
    with pytest.raises(ValueError, match="shorter"):
        launch.parameters(maps[:1])
    with pytest.raises(struct.error, match="expected 2 items"):
        launch(parameters, (16,), 0)


def test_what_the_driver_refuses_is_named(state):
    launch = PreparedLaunch(load_function(b"code", "kernel", 1), (1, 1, 1), 32, 0, [])
    for call, attempt, words in (
        ("map", lambda: MAP.encode(16), "a tensor map of"),
        ("module", lambda: load_function(b"", "sweep", 0), "loading sweep"),
        ("function", lambda: load_function(b"", "sweep", 0), "finding sweep"),
        ("launch", lambda: launch(launch.parameters([]), [], 0), "launching a kernel"),
    ):
        state.fail(call)
        with pytest.raises(RuntimeError, match=f"{words}.*: the CUDA driver answered CUDA_ERROR"):
            attempt()


def test_a_thread_without_a_context_gets_that_of_the_device(state):
    state.context = 0
    for device in (3, 4):
        thread = threading.Thread(target=use_context, args=(device,))
        thread.start()
        thread.join()
        assert state.context == 103  # the second thread found one


def test_a_capture_is_told_from_none(state):
    assert capture_of(5) == 0
    state.capture = 77
    assert capture_of(6) == 77
    assert state.stream == 6


def test_a_dimension_of_one_place_has_a_valid_stride_whatever_the_tensor_says():
    found = map_of((1, 300, 1, 128), (0, 5120, 3, 1))
    assert found == TensorMap((128, 1, 300, 1), (256, 10240, 256), (64, 1, 64, 1))
