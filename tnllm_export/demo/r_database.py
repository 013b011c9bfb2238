"""Character vectors out of an R package's lazy-load database (`Rdata.rdx` and `Rdata.rdb`)."""

import bz2
import lzma
import warnings
import zlib
from pathlib import Path
from typing import Any

from tnllm_export.errors import CorpusError


def read_character_vectors(folder: Path) -> dict[str, list[str]]:
    """Read every object of `folder`/Rdata.rdb, each of which must be a character vector.

    The index (`.rdx`, a compressed RDS list) gives offset and length in bytes of each object's record in the `.rdb`.

    Returns:
        The lines of each object, by name.

    Raises:
        CorpusError: The reader `rdata` is not installed, or the database is broken.
    """
    try:
        import rdata  # noqa: PLC0415  an optional dependency
    except ImportError as error:
        raise CorpusError(
            "reading an R package needs the Python package rdata; run: pip install 'tnllm-export[train]'"
        ) from error
    try:
        records = (folder / "Rdata.rdb").read_bytes()
        with warnings.catch_warnings():
            # rdata says that it had to guess that bare serialised data is RDS.
            warnings.simplefilter("ignore")
            index = rdata.read_rds(folder / "Rdata.rdx")["variables"]
            return {
                str(name): _lines(rdata.conversion.convert(rdata.parser.parse_data(_unpack(records, *position))))
                for name, position in index.items()
            }
    except (OSError, KeyError, ValueError, TypeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(
            f"{folder}: can't read the R database ({error}); install the package r-cran-janeaustenr again"
        ) from error


def _unpack(records: bytes, offset: int, length: int) -> bytes:
    """Decompress one record: four bytes big-endian size, then zlib data, or a type letter and its data."""
    size = int.from_bytes(records[offset : offset + 4], "big")
    body = records[offset + 4 : offset + length]
    if body[:1] == b"2":
        data = bz2.decompress(body[1:])
    elif body[:1] == b"Z":
        data = lzma.decompress(body[1:])
    else:
        data = zlib.decompress(body[1:] if body[:1] == b"1" else body)
    if len(data) != size:
        raise ValueError(f"a record holds {len(data)} bytes; expected {size}")
    return data


def _lines(vector: Any) -> list[str]:
    return [str(line) for line in vector]
