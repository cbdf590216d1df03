"""The command ``qcomm inspect``: the header of a packet in a file."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

import qcomm
from qcomm.cli.options import fail

__all__ = ["INSPECT_HELP", "inspect"]

INSPECT_HELP = (
    "Print what a packet holds: shape, dtype, grid, bits, entropy and sizes; for several segments one line each."
)


def inspect(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A packet, as bytes.")],
) -> None:
    """Prints every field of the packet in ``file``."""
    content = bytearray(file.read_bytes())
    packet = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    try:
        info = qcomm.inspect(packet)
    except qcomm.PacketError as error:
        fail(f"{file} is not a packet: {error}")
    for field in dataclasses.fields(info):
        if field.name != "segments":
            typer.echo(f"{field.name:<18} {getattr(info, field.name)}")
    if len(info.segments) > 1:
        for index, segment in enumerate(info.segments):
            typer.echo(f"{f'segment {index}':<18} {segment}")
