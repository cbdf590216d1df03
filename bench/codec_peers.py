"""The peers of bench_codec.py: coders of symbols, compressors of bytes, and qcomm's own symbol stage.

The C++ parts in bench/peers are built on first use, in build/bench-peers. zstd does not export its entropy coders
(Huff0, FSE), so its sources are needed: pip downloads them with the package ``zstd`` of a fixed version, whose content
is checked. lz4 and constriction are taken where they are installed. What is missing is reported with the reason.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench-peers"
ZSTD = "1.5.7.2"  # the package's version: zstd 1.5.7
ZSTD_SHA256 = "6d8684c69009be49e1b18ec251a5eb0d7e24f93624990a8a124a1da66a92fc8a"
SAMPLE = 1_000_000  # symbols for coders that are slow, or driven from Python


class Unavailable(Exception):
    """A peer that this machine does not have; the text says why."""


@dataclass
class Coder:
    """A coder bound to its symbols and buffers. ``encode`` returns the bytes it wrote, a decoder whether it could."""

    name: str
    count: int
    encode: Callable[[], int]
    decoders: dict[str, Callable[[], bool]]
    restored: Callable[[], bool]  # whether the last decoder's output is the input
    nbytes: int = field(default=0, init=False)

    def verify(self) -> None:
        """One round trip with each decoder; raises ValueError."""
        self.nbytes = self.encode()
        if self.nbytes <= 0:
            raise ValueError(f"{self.name} cannot encode")
        for name, decode in self.decoders.items():
            if not decode() or not self.restored():
                raise ValueError(f"{self.name}: {name} decoded something else")


def run(*command: str | Path) -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    try:
        subprocess.run(
            [str(part) for part in command],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1]}") from error


def zstd_sources() -> Path:
    """The folder ``lib`` of zstd's sources."""
    folder = BUILD / f"zstd-{ZSTD}" / "zstd" / "lib"
    if folder.is_dir():
        return folder
    archive = BUILD / f"zstd-{ZSTD}.tar.gz"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
    run(*pip, "--no-build-isolation", "--dest", BUILD, f"zstd=={ZSTD}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != ZSTD_SHA256:
        raise Unavailable(f"{archive.name} is not the file that this bench knows")
    with tarfile.open(archive) as tar:
        tar.extractall(BUILD, filter="data")
    return folder


def build(target: str, *definitions: str) -> ctypes.CDLL:
    """Builds a library of bench/peers and loads it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    options = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DQCOMM_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "-S", ROOT / "bench" / "peers", "-B", BUILD / "cmake", *options, *definitions)
    run("cmake", "--build", BUILD / "cmake", "--target", target)
    try:
        return ctypes.CDLL(str(BUILD / "cmake" / f"lib{target}.so"))
    except OSError as error:
        raise Unavailable(str(error)) from error


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class SymbolStage:
    """qcomm's symbols to bytes and back: encode_packet and decode_packet with a copy in the place of the grid."""

    def __init__(self) -> None:
        self._library = build("symbol_stage")
        self._library.symbols_use.restype = ctypes.c_bool
        self._library.symbols_encode.restype = ctypes.c_int64
        self._library.symbols_decode.restype = ctypes.c_bool

    def coder(
        self, values: torch.Tensor, data: torch.Tensor, num_bits: int, version: str, checksums: bool, steps: int
    ) -> Coder:
        """``data``: the symbols, uint8 or above 8 bits int16, of ``values``, which are not looked at."""
        library, count, decoded = self._library, data.numel(), torch.empty_like(data)
        packet = torch.empty(5 * values.nbytes // 4 + 65536, dtype=torch.uint8)
        if not library.symbols_use(version.encode()):
            raise Unavailable(f"this build has no inner loops for {version}")

        def encode() -> int:
            library.symbols_use(version.encode())
            source = pointer(values), pointer(data), ctypes.c_int64(count)
            space = ctypes.c_int64(packet.numel())
            return library.symbols_encode(*source, num_bits, steps, checksums, pointer(packet), space)

        nbytes = encode()

        def decode() -> bool:
            library.symbols_use(version.encode())
            return library.symbols_decode(pointer(packet), ctypes.c_int64(nbytes), pointer(values), pointer(decoded))

        name = f"symbol stage {version}{'' if checksums else ', no checksums'}"
        return Coder(name, count, encode, {"decode": decode}, lambda: decoded.equal(data))


class ZstdCoders:
    """Huff0, FSE and zstd -1."""

    def __init__(self) -> None:
        self._library = build("zstd_coders", f"-DZSTD_LIB={zstd_sources()}")
        for name in ("coder_bound", "huff0_encode", "fse_encode", "zstd_encode"):
            getattr(self._library, name).restype = ctypes.c_int64
        for name in ("huff0_decode", "fse_decode", "zstd_decode"):
            getattr(self._library, name).restype = ctypes.c_bool
        self._library.coders_version.restype = ctypes.c_char_p

    @property
    def version(self) -> str:
        """Of zstd."""
        return self._library.coders_version().decode()

    def coders(self, data: torch.Tensor) -> Iterator[Coder]:
        """``data``: uint8 symbols; of int16 ones zstd sees the bytes, and the coders of bytes do not exist."""
        library, out = self._library, torch.empty_like(data)
        n, nbytes = ctypes.c_int64(data.numel()), ctypes.c_int64(data.nbytes)
        space = ctypes.c_int64(library.coder_bound(nbytes))

        def coder(
            name: str,
            encode: Callable[[torch.Tensor], int],
            decoders: dict[str, Callable[[torch.Tensor, ctypes.c_int64], bool]],
        ) -> Coder:
            packed = torch.empty(space.value, dtype=torch.uint8)
            size = ctypes.c_int64(encode(packed))
            bound = {key: lambda decode=decode: decode(packed, size) for key, decode in decoders.items()}
            return Coder(name, data.numel(), lambda: encode(packed), bound, lambda: out.equal(data))

        if data.dtype == torch.uint8:
            for shared in (True, False):
                for streams in (4, 1):
                    yield coder(
                        f"Huff0, {streams} stream{'s' * (streams > 1)}, {'one table' if shared else 'table a block'}",
                        lambda packed, streams=streams, shared=shared: library.huff0_encode(
                            pointer(data), n, streams, shared, pointer(packed), space
                        ),
                        {
                            f"decode X{at_once}": lambda packed, _, streams=streams, at_once=at_once: (
                                library.huff0_decode(pointer(packed), n, streams, at_once, pointer(out))
                            )
                            for at_once in (1, 2)
                        },
                    )
            yield coder(
                "FSE",
                lambda packed: library.fse_encode(pointer(data), n, pointer(packed), space),
                {"decode": lambda packed, _: library.fse_decode(pointer(packed), n, pointer(out))},
            )
        yield coder(
            "zstd -1",
            lambda packed: library.zstd_encode(pointer(data), nbytes, 1, pointer(packed), space),
            {"decode": lambda packed, size: library.zstd_decode(pointer(packed), size, pointer(out), nbytes)},
        )


def bytes_coder(name: str, data: bytes, count: int, compress: Callable, decompress: Callable) -> Coder:
    packed, out = compress(data), [b""]

    def decode() -> bool:
        out[0] = decompress(packed)
        return True

    return Coder(name, count, lambda: len(compress(data)), {"decode": decode}, lambda: out[0] == data)


def missing_packages() -> dict[str, str]:
    """Those of the packages below that are not installed, with what to do."""
    packages = "lz4", "constriction"
    return {name: f"pip install {name}" for name in packages if importlib.util.find_spec(name) is None}


def slow_coders(data: torch.Tensor, symbols: torch.Tensor) -> Iterator[Coder]:
    """zlib, and lz4 and constriction where they are installed: driven from Python, which allocates their results."""
    content = data.numpy().tobytes()
    yield bytes_coder("zlib -1", content, data.numel(), lambda x: zlib.compress(x, 1), zlib.decompress)
    if importlib.util.find_spec("lz4"):
        import lz4.block  # optional

        yield bytes_coder("lz4", content, data.numel(), lz4.block.compress, lz4.block.decompress)
    if importlib.util.find_spec("constriction"):
        yield constriction_coder(symbols[:SAMPLE].numpy().astype(np.int32))


def constriction_coder(symbols: np.ndarray) -> Coder:
    """Its vectorised ANS; the distribution is counted in the time, and does not travel."""
    import constriction  # optional

    out = [np.empty(0, np.int32)]

    def model() -> object:
        p = np.bincount(symbols).astype(np.float64) + 1e-9
        return constriction.stream.model.Categorical(p / p.sum(), perfect=False)

    def compress() -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model())
        return coder.get_compressed()

    packed, known = compress(), model()

    def decode() -> bool:
        out[0] = constriction.stream.stack.AnsCoder(packed).decode(known, symbols.size)
        return True

    restored = lambda: bool((out[0] == symbols).all())  # noqa: E731
    return Coder("constriction ANS", symbols.size, lambda: compress().nbytes, {"decode": decode}, restored)
