"""What making views costs on one thread: ours, in blocks, beside torchvision's transforms, image by image.

`measure_views` runs ``python -m lwfed.tools.bench.views``, a process of its own since torchvision's memory is none of
the bench's: numbers of images and turns as arguments, a configuration on its stdin, one JSON object on its stdout.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from lwfed.config import RunConfig
from lwfed.errors import WorkerFailed

IMAGES = 512
TURNS = 5  # that count, each of both in turn, so that what else the machine does slows both


def measure_views(config: RunConfig, images: int = IMAGES, turns: int = TURNS) -> dict[str, float]:
    """Microseconds a view: `published_us` and `ours_us`; `ratio` of the two. Raises WorkerFailed."""
    done = subprocess.run([sys.executable, "-m", __name__, str(images), str(turns)], input=config.to_bytes(), capture_output=True)
    if done.returncode != 0:
        problem = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise WorkerFailed(f"views could not be made to time them ({problem}): `edge-agent doctor` checks torch")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def time_views(config: RunConfig, images: int, turns: int) -> dict[str, float]:
    """See `measure_views`; in this process."""
    from PIL import Image

    from lwfed.models.end_to_end import transform
    from lwfed.models.step import VIEWS_AT_ONCE
    from lwfed.models.views import augment, draw

    size, channels = config.model.image_size, config.model.channels
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (images, channels, size, size), dtype=torch.uint8, generator=generator)
    pictures = [Image.fromarray((one.permute(1, 2, 0) if channels == 3 else one[0]).numpy()) for one in noise]
    transforms = [transform(config.views, view, size) for view in (0, 1)]

    def published() -> None:
        for make in transforms:
            torch.stack([make(picture) for picture in pictures])

    def ours() -> None:
        for view in (0, 1):
            params = draw(config.views, view, images, size, generator)
            for first in range(0, images, VIEWS_AT_ONCE):
                rows = slice(first, first + VIEWS_AT_ONCE)
                augment(noise[rows], params[rows], size)

    taken = [(_seconds(published), _seconds(ours)) for _ in range(1 + turns)][1:]  # the first warms up
    theirs_us, ours_us = (statistics.median(one) / (2 * images) * 1e6 for one in zip(*taken, strict=True))
    return {"published_us": round(theirs_us, 1), "ours_us": round(ours_us, 1), "ratio": round(theirs_us / ours_us, 2)}


def _seconds(make: Callable[[], None]) -> float:
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(time_views(RunConfig.from_bytes(sys.stdin.buffer.read()), *map(int, sys.argv[1:]))))
