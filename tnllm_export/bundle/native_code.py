"""What the native code in a package needs, read from the package: nothing of it is loaded."""

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

_ELF = b"\x7fELF\x02\x01"
"""How libraries of 64-bit little-endian machines begin."""

_LOADED, _DYNAMIC = 1, 2
_NEEDED, _STRINGS = 1, 5
_STANDARD_LIBRARIES = ("libstdc++.so", "libc++.so")


def libraries_with_own_standard_library(package: Path) -> list[str]:
    """Name the shared libraries in a package, a zip file, that need no shared C++ standard library.

    Such a one holds a copy of it. Its symbols get mixed with those of the library that PyTorch has loaded, and the
    process that loads the package crashes. What is not for a 64-bit little-endian ELF machine is not looked at.
    """
    with zipfile.ZipFile(package) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        return [name for name in libraries if _has_own_standard_library(archive.read(name))]


def needed_libraries(library: bytes) -> list[str]:
    """Return the names of the libraries that a 64-bit little-endian ELF library needs: its NEEDED entries."""
    segments = list(_segments(library))
    needed, strings = [], 0
    for kind, offset, _, size in segments:
        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", library[offset : offset + size]):
                if tag == _NEEDED:
                    needed.append(value)
                elif tag == _STRINGS:
                    strings = _file_offset(segments, value)
    return [_text(library, strings + name) for name in needed]


def _has_own_standard_library(library: bytes) -> bool:
    if not library.startswith(_ELF):
        return False
    return not any(name.startswith(_STANDARD_LIBRARIES) for name in needed_libraries(library))


def _segments(library: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Kind, offset in the file, address and size in the file of each segment."""
    (table,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    for start in range(table, table + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", library, start)
        yield kind, offset, address, length


def _file_offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    for kind, offset, start, size in segments:
        if kind == _LOADED and start <= address < start + size:
            return offset + address - start
    raise ValueError(f"no segment holds address {address:#x}")


def _text(library: bytes, start: int) -> str:
    return library[start : library.index(b"\0", start)].decode()
