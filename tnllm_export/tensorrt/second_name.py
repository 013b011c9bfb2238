"""A second name for a shared library that is open already, without a file of that name anywhere."""

import ctypes
import os
import struct
import sys
from pathlib import Path

# The loader's words (elf.h).
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME, _END = 1, 4, 5, 6, 10, 11, 14, 0
_SHARED, _VERSION = 3, 1
_HEADER_BYTES, _SEGMENT_BYTES, _ENTRY_BYTES, _SYMBOL_BYTES = 64, 56, 16, 24
_LARGEST_PAGE = 1 << 16


def open_under(name: str, library: Path) -> None:
    """Let the process open `name`, which has no slash, and find the symbols of `library` there.

    What is opened is a library without code that is called `name` and needs `library`. The loader knows libraries by
    the names inside them, so from now on it asks no folder for `name`. `library` is found by its own name, if it is
    open, wherever it was opened from.

    Raises:
        OSError: The loader does not take it, or there is no 64-bit Linux.
    """
    if sys.platform != "linux":
        raise OSError("only Linux opens files in memory")
    file = os.memfd_create(name)
    os.write(file, _library_without_code(name, library))
    # The file stays open: its path must not become another one's, since the loader knows libraries by path as well.
    ctypes.CDLL(f"/proc/self/fd/{file}")


def _library_without_code(name: str, needed: Path) -> bytes:
    """Return a 64-bit ELF file for the machine that the library `needed` is for, and that needs it."""
    with needed.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    identity, machine = start[:16], struct.unpack_from("<H", start, 18)[0]
    text = b"\0" + name.encode() + b"\0" + needed.name.encode() + b"\0"
    # One table of three segments, then the dynamic section, one empty symbol, its hash table, and the names.
    entries_at = _HEADER_BYTES + 3 * _SEGMENT_BYTES
    symbols_at = entries_at + 8 * _ENTRY_BYTES
    hash_at = symbols_at + _SYMBOL_BYTES
    text_at = hash_at + 16
    end = text_at + len(text)

    header = (_SHARED, machine, _VERSION, 0, _HEADER_BYTES, 0, 0, _HEADER_BYTES, _SEGMENT_BYTES, 3, 0, 0, 0)
    segments = (
        (_LOAD, _READ_WRITE, 0, 0, 0, end, end, _LARGEST_PAGE),
        (_DYNAMIC, _READ_WRITE, *(entries_at,) * 3, *(symbols_at - entries_at,) * 2, 8),
        (_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),  # without it the loader would make stacks executable
    )
    entries = (
        *((_SONAME, 1), (_NEEDED, len(name) + 2), (_HASH, hash_at), (_STRTAB, text_at)),
        *((_SYMTAB, symbols_at), (_STRSZ, len(text)), (_SYMENT, _SYMBOL_BYTES), (_END, 0)),
    )
    return b"".join(
        (
            identity,
            struct.pack("<HHIQQQIHHHHHH", *header),
            *(struct.pack("<IIQQQQQQ", *segment) for segment in segments),
            *(struct.pack("<QQ", *entry) for entry in entries),
            bytes(_SYMBOL_BYTES),
            struct.pack("<IIII", 1, 1, 0, 0),
            text,
        )
    )
