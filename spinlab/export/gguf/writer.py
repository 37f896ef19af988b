"""A GGUF file written tensor by tensor, with a mark that tells it from any other's."""

import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

MARK = "spinlab.export"  # the second key of a file: what it is and the run that it comes from
_MAGIC = b"GGUF"
_START = 256  # bytes in which the mark's name lies


@dataclass(frozen=True)
class FileTensor:
    """Describe a tensor of a file; its numbers are made when they are written.

    shape: of the array, whose bytes hold blocks where `kind` is a type of blocks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    kind: gguf.GGMLQuantizationType
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Writer(gguf.GGUFWriter):
    """Write metadata and tensors in one pass; also lists of nothing, which gguf's own refuses.

    A tokenizer of bytes has no merges, and llama.cpp wants the list.
    """

    def __init__(self, architecture: str) -> None:
        logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells its plan, line by line
        super().__init__(None, architecture)

    def add_strings(self, key: str, words: Sequence[str]) -> None:
        """Add a list of strings."""
        self.add_key_value(key, list(words), GGUFValueType.ARRAY, GGUFValueType.STRING)

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype == GGUFValueType.ARRAY and not len(val) and sub_type is not None:
            return struct.pack("<IIQ", vtype, sub_type, 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)

    def write(self, file: Path, tensors: Sequence[FileTensor]) -> None:
        """Write everything; a tensor is in memory while it is written."""
        for tensor in tensors:
            dtype = np.dtype(tensor.dtype)
            self.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.bytes, tensor.kind)
        try:
            self.write_header_to_file(file)
            self.write_kv_data_to_file()
            self.write_ti_data_to_file()
            for tensor in tensors:
                self.write_tensor_data(np.ascontiguousarray(tensor.make()))
        finally:
            self.close()


def is_export(file: Path) -> bool:
    """Tell whether a file is a GGUF that spinlab wrote."""
    with file.open("rb") as stream:
        start = stream.read(_START)
    return start.startswith(_MAGIC) and MARK.encode() in start
