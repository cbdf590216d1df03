"""Key files: the secret that the ranks of a run share, named by its path and read only when it is needed.

The bytes of a secret never leave :meth:`KeyFile.read` and its caller, which derives keys from them. Options, states,
pickles, representations and errors hold the path. No error is raised where a variable holds the bytes, since some
handlers show the variables of a traceback.
"""

import importlib.util
import os
import stat
import string
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KeyFile"]

LEAST_BYTES = 32  # of randomness, what AES-256 is worth
MOST_BYTES = 4096  # a larger file is something else
LEAST_DISTINCT = 8  # 32 random bytes have more, and so have 64 random hexadecimal digits
HOW_TO_MAKE = "make one with `(umask 077 && openssl rand -hex 32 > key)` and copy it to every host"
HEX_DIGITS = frozenset(string.hexdigits.encode())


@dataclass(frozen=True)
class KeyFile:
    """A file with the secret of a run.

    It has at least 32 characters, all of them random: 64 hexadecimal digits, 44 of base64, or 32 bytes as they are.
    Nobody but its owner may read it. A line's end behind a text does not count.

    Args:
        path: of the file.

    Example:
        >>> KeyFile(Path("/nowhere/key"))
        KeyFile(path=PosixPath('/nowhere/key'))
    """

    path: Path

    @classmethod
    def of(cls, secret: object) -> "KeyFile | None":
        """Returns the key file that option ``secret`` names, after checking that it can be read; None for None.

        Raises:
            TypeError: ``secret`` is no path.
            ValueError, OSError: the file cannot be read, others can read it, or it holds no secret.
            RuntimeError: the package ``cryptography`` is missing.

        Example:
            >>> KeyFile.of(b"0123456789abcdef0123456789abcdef")
            Traceback (most recent call last):
                ...
            TypeError: secret must be the path of a key file or None, got bytes
        """
        if secret is None:
            return None
        path = secret.path if isinstance(secret, KeyFile) else secret
        if not isinstance(path, (str, Path)):
            raise TypeError(f"secret must be the path of a key file or None, got {type(secret).__name__}")
        if importlib.util.find_spec("cryptography") is None:
            raise RuntimeError("secret needs the package cryptography: pip install 'qcomm[secure]'")
        found = cls(Path(path).expanduser().resolve())  # two paths of one file are one secret
        found.read()
        return found

    def read(self) -> bytes:
        """Returns the secret.

        Raises:
            ValueError, OSError: see :meth:`of`.
        """
        with self.path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"secret must be a regular file, {self.path} is none")
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ValueError(
                    f"secret must be a file that its owner alone can read, the mode of {self.path} is "
                    f"{stat.S_IMODE(mode):04o}: run chmod 600 on it"
                )
            content = file.read(MOST_BYTES + 1)
        key = content.rstrip(b"\r\n") if content.isascii() else content
        randomness = len(key) // 2 if HEX_DIGITS.issuperset(key) else len(key)
        if len(content) <= MOST_BYTES and randomness >= LEAST_BYTES and len(set(key)) >= LEAST_DISTINCT:
            return key
        del content, key
        raise ValueError(
            f"secret must be a file of at least {LEAST_BYTES} random bytes (64 hexadecimal digits) and at most "
            f"{MOST_BYTES}, {self.path} is none: {HOW_TO_MAKE}"
        )
