"""Batches of more than 2^31 elements: strides between sequences have 64 bits, up to the machine code."""

import struct
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from tnllm_export.kernels.compile import compile_table

KERNEL_PARAMETER = 0x17
"""Of a cubin's attributes (EIATTR_KPARAM_INFO): place, offset and size of a parameter."""


def parameter_sizes(cubin: bytes) -> list[int]:
    """Bytes of each parameter of the one kernel in an ELF file."""
    sizes = {}
    for name, content in sections(cubin):
        at = 0
        while name.startswith(".nv.info.") and at < len(content):
            form, attribute, length = struct.unpack_from("<BBH", content, at)
            if (form, attribute) == (4, KERNEL_PARAMETER):
                _, place, _, flags = struct.unpack_from("<IHHI", content, at + 4)
                sizes[place] = flags >> 18
            at += 4 + (length if form == 4 else 0)
    return [sizes[place] for place in range(len(sizes))]


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents."""
    table = struct.unpack_from("<Q", elf, 40)[0]
    count, names = struct.unpack_from("<HH", elf, 60)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * place) for place in range(count)]
    for name, _, _, _, start, size in headers:
        begin = headers[names][4] + name
        yield elf[begin : elf.index(b"\0", begin)].decode(), elf[start : start + size]


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_takes_strides_of_batches_in_64_bits(capability):
    table = compile_table((capability,), ((16, 16),), ("float16",))
    seen = set()
    for kernel in table.kernels:
        sizes = dict(zip(kernel.arguments, parameter_sizes(kernel.cubin), strict=True))
        strides = {name: size for name, size in sizes.items() if name.endswith("_stride_b")}
        assert set(strides.values()) == {8}
        assert sizes["H"] == 4
        seen |= strides.keys()
    assert seen >= {f"{name}_stride_b" for name in ("query", "key", "value", "output")}
