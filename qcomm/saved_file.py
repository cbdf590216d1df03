"""Files that ``torch.save`` wrote, with two kinds of errors for whatever is wrong with their bytes.

``torch.load`` does not compare the checksums of the archive, and raises errors of many kinds where bytes are damaged.
Ranks that read files of their own wait for each other, so an error that nobody expects would keep the others waiting.
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_saved"]

# Of the archive's directory, of the unpickler, and of torch where it rebuilds tensors.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)

# Of MS-DOS. For an entry that is marked so, torch takes values out of memory that nothing was written to.
DIRECTORY = 0x10


def read_saved(path: Path) -> Any:
    """Returns the content of a file that ``torch.save`` wrote, with its tensors on the CPU. No code in it is run.

    Raises:
        OSError: the file cannot be read, or its directory points outside of it.
        ValueError: it is damaged, or no file of tensors and plain containers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "steps.pt"
        >>> torch.save({"steps": 7}, path)
        >>> read_saved(path)
        {'steps': 7}
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save does not do")
                if entry.external_attr & DIRECTORY:
                    raise zipfile.BadZipFile(f"{entry.filename} is marked as a directory")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ValueError(f"{path.name} is damaged, or of another kind: {type(error).__name__}: {error}") from error
