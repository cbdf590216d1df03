"""A web page of the filter's map: points with their images on hover, and DBSCAN again with every move of a slider.

The page is one file that loads nothing: images lie in it as one PNG, and the script has the filter's rule in plain
JavaScript (``scatter_page.html``).
"""

import base64
import io
import json
import math
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from qcomm.codec import CPU
from qcomm.paper import write_atomically
from qcomm.studies.data_filter import PLANTED, FilterSettings, Map, image_map
from qcomm.studies.study import one_thread


def sheet(images: Tensor) -> tuple[bytes, int]:
    """Arranges images in rows of one picture.

    Args:
        images: uint8 ``[n, channels, height, width]``, one channel or three.

    Returns:
        The picture as a PNG, and the number of images in a row.

    Example:
        >>> png, columns = sheet(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> png[1:4], columns
        (b'PNG', 3)
    """
    from PIL import Image  # comes with matplotlib

    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8, device=CPU)
    whole[:count] = images
    grid = whole.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * height, columns * width, channels)
    target = io.BytesIO()
    Image.fromarray((pixels[..., 0] if channels == 1 else pixels).contiguous().numpy()).save(target, "PNG")
    return target.getvalue(), columns


def page(found: Map, settings: FilterSettings, title: str) -> str:
    """Returns the page of a map, with the sliders at the settings' values."""
    png, columns = sheet(found.images)
    data = {
        "title": title,
        "columns": columns,
        "size": found.images.shape[-1],
        "x": found.places[:, 0].tolist(),
        "y": found.places[:, 1].tolist(),
        "label": found.labels.tolist(),
        "truth": found.truth.tolist(),
        "factor": settings.eps_factor,
        "minSamples": settings.min_samples,
    }
    template = (resources.files("qcomm.studies") / "scatter_page.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("</", "<\\/")
    return template.replace("@DATA@", text).replace("@SHEET@", base64.b64encode(png).decode())


def write_page(settings: FilterSettings, path: Path) -> None:
    """Writes the page of the first seed's map with planted labels. An existing file is replaced.

    Args:
        settings: of the study. The map is made again unless this process has just made it; it is the same.
        path: of the file.
    """
    with one_thread():
        found = image_map(settings, PLANTED, settings.seed)
    title = f"{settings.dataset}, {len(found.labels)} training images, {settings.noise:.0%} of labels replaced"
    write_atomically(path, page(found, settings, title).encode())
