"""The training process: ``python -m lwfed.edge_agent.worker``, driven by JSON lines (`lwfed.child`).

In:   {"do": "train", "config", "stage", "round", "participant", "lr_scale", "data", "shared", "kept", "out",
       "after": the last earlier round of the stage whose update the server took, or null,
       "parts": {part: file, or {"base": file, "patches": [file], "id": digest of what they make of it}},
       "graphs": {engine: file}, without weights, for ONNX Runtime,
       "execution": {"prefix", "micro_batch"} as in an earlier round of the stage, with {"features_in": "file"} where memory
       has run out; or null: to be chosen,
       "budget_mb": for this process, or null}
Out:  {"event": "ready", "torch", "machine", "accelerator", "onnxruntime"} after the imports, once
      {"event": "patched", "files"}                         the parts that were made of patches; the parent takes them away
      {"event": "warning", "text"}                          for people
      {"event": "loading", "what", "done", "total"}         while it decodes images, or makes what later steps and rounds use again
      {"event": "planned", "prefix", "micro_batch", "reason", "needs_mb", "least", "features_in_memory"}
      {"event": "recomputes", "why"}                        views that are used again go through layers that they had passed
      {"event": "progress", "epoch", "epochs", "step", "steps", "loss"}
      {"event": "over", "peak_mb", "budget_mb"}             once, when its high-water mark passes the budget
      {"event": "done", "file", "images", "skipped", "steps", "losses", "seconds",
       "accelerator": {"peak_mb", "free_mb"}, or null}

Data sets and backbones import what they need (torchvision, timm) on first use; with a folder of images or digits nothing
beyond torch, numpy and Pillow is loaded.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lwfed import disk
from lwfed.child import Json, serve
from lwfed.config import RunConfig
from lwfed.data.images import Images
from lwfed.data.load import device_images
from lwfed.edge_agent import differences, trainer
from lwfed.edge_agent.events import READING, VIEWS
from lwfed.edge_agent.means import Found, find_means
from lwfed.edge_agent.previous import Previous, Turn, forget
from lwfed.edge_agent.resources import HIGH_WATER, MB, TMPFS, filesystem, own_share_bytes, resident_mb, status_mb
from lwfed.errors import StateError, Unfit
from lwfed.models.allocator import give_back, let_code_go, read_code_in_pages
from lwfed.models.features import Folder, Memory
from lwfed.models.local import StepReport
from lwfed.models.placement import AcceleratorMeter, accelerator, choose, move, move_images
from lwfed.models.prefix import runtime_version
from lwfed.models.reuse import FeatureCache
from lwfed.models.shapes import part_shapes, shapes
from lwfed.plan import part_of
from lwfed.wire import tensors as wire

SHOWN_EVERY = 50  # images
UPDATES = 2  # that a cache of features leaves room for on the disk

Say = Callable[[Json], None]
Written = TypeVar("Written")


class Worker:
    def __init__(self) -> None:
        self._images: tuple[object, Images] | None = None
        self._found: tuple[object, Found] | None = None
        self._memory: Memory | None = None  # for features, while `_found` holds

    def handle(self, data: Json, say: Say) -> None:
        started = time.monotonic()
        config = RunConfig.from_bytes(Path(data["config"]).read_bytes())
        torch.set_num_threads(config.train.threads)
        device = choose(config.worker.device)
        images = self._load(data, config, say)
        sources = _sources(config, data, say)
        parts, found = self._plan(data, config, device, images, sources)
        told = {"needs_mb": round(found.needs_mb, 1), "least": found.least, "features_in_memory": found.features_bytes > 0}
        say({"event": "planned", **found.fixed, "reason": found.reason, **told})

        ceiling = Ceiling(data["budget_mb"], say)

        def on_step(report: StepReport) -> None:
            meter.sample()
            ceiling.check()
            place = {"epoch": report.epoch, "epochs": report.epochs, "step": report.step, "steps": report.steps}
            say({"event": "progress", **place, "loss": report.loss})

        kept, turn = Path(data["kept"]), Turn(data["stage"], data["round"], data["participant"], data["after"])

        def warn(text: str) -> None:
            say({"event": "warning", "text": text})

        own = Previous("previous", kept, config, turn) if config.alignment.method == "moon" else None
        earlier = own.read(shapes(config, config.plan(turn.stage).uploaded), warn) if own else None
        before = None if earlier is None else move({name: torch.from_numpy(array) for name, array in earlier.items()}, device)
        cache, meter = self._cache(data, config, sources, found, say), AcceleratorMeter(device)
        del sources  # whose memory training may need

        def on_rows(done: int, total: int) -> None:
            say({"event": "loading", "what": VIEWS, "done": done, "total": total})

        update, summary = trainer.train(
            config,
            turn.stage,
            turn.round,
            turn.participant,
            parts,
            move_images(images.pixels, device),
            on_step,
            data["lr_scale"],
            before,
            found.means,
            cache,
            on_rows,
        )
        accelerated = meter.reading()
        give_back()
        let_code_go()
        if own:
            on_disk(data, lambda: own.keep(wire.encode(update)))
        else:
            forget("previous", kept)
        received = {name: parts[name].cpu().numpy() for name in update}
        on_disk(data, lambda: disk.write(Path(data["out"]), differences.encode(config, turn, update, received, kept, warn)))
        counts = {"images": summary.images, "skipped": images.skipped, "steps": summary.steps, "losses": summary.losses}
        ceiling.check()
        say({"event": "done", "file": data["out"], **counts, "seconds": round(time.monotonic() - started, 3), "accelerator": accelerated})

    def _plan(
        self, data: Json, config: RunConfig, device: torch.device, images: Images, sources: Mapping[str, trainer.Source]
    ) -> tuple[dict[str, Tensor], Found]:
        """The model, and how to compute; of layers that torch does not run it has shapes only."""
        stage, fixed = data["stage"], data["execution"]
        layers = config.plan(stage).frozen_layers
        key = config.digest, stage, len(images.pixels), data["graphs"], *(_name(data["parts"].get(part)) for part in layers)
        if self._found is not None and (self._found[0] != key or not _keeps(self._found[1], fixed)):
            self._found = self._memory = None  # let the old engine go before there is a new one
        known = self._found and self._found[1]
        parts = trainer.load_parts(config, stage, sources, layers if known and known.engine != "torch" else ())
        if known is None:
            known = self._find(data, config, move(parts, device), images)
            self._found = key, known
            give_back()
            let_code_go()
        if known.engine == "torch":
            return move(parts, device), known
        return parts | {name: tensor.to("meta") for name, tensor in parts.items() if part_of(name) in layers}, known

    def _find(self, data: Json, config: RunConfig, tensors: dict[str, Tensor], images: Images) -> Found:
        """As in an earlier round of the stage; in any way that has room where that one has none any more. Raises Unfit."""
        fixed, graphs = data["execution"], {engine: Path(file) for engine, file in data["graphs"].items()}

        def find(train: Json) -> Found:
            wanted = config.model_copy(update={"train": config.train.model_copy(update=train)})
            return find_means(wanted, data["stage"], tensors, images.pixels, data["budget_mb"], graphs)

        if fixed is None:
            return find({})
        try:
            return find(fixed)
        except Unfit as error:
            if config.train.micro_batch != "auto":
                raise
            found = find({**fixed, "prefix": config.train.prefix, "micro_batch": "auto"})
            return replace(found, reason=f"{found.reason}; not as before, for {error}")

    def _cache(self, data: Json, config: RunConfig, sources: Mapping[str, trainer.Source], found: Found, say: Say) -> FeatureCache | None:
        """For views that are used again; files that another run or stage left go if there are none, or memory keeps them."""
        frozen = config.plan(data["stage"]).frozen
        reused = config.train.views_per_round != "fresh" and frozen
        if not reused or found.features_bytes:
            Folder(features(data)).forget()
        if not reused:
            return None
        digests = tuple(hashlib.sha256(_read(sources[part])).hexdigest() for part in frozen)
        if found.features_bytes:
            self._memory = self._memory or Memory(found.features_bytes)
        update = sum(len(_read(sources[part])) for part in config.plan(data["stage"]).uploaded)
        room = min(config.train.features_mb * MB, _left_on(Path(data["kept"]), data["budget_mb"], found))
        more = "its files are memory: " + ("free some" if data["budget_mb"] is None else "raise --memory-budget")
        place = self._memory or Folder(features(data), room, UPDATES * update, more)
        return FeatureCache(place, digests, lambda why: say({"event": "recomputes", "why": why}))

    def _load(self, data: Json, config: RunConfig, say: Say) -> Images:
        """The device's images: read again only when another run or participant number asks."""
        key = (config.digest, data["participant"], data["data"])
        if self._images is None or self._images[0] != key:
            self._images = None  # let the old ones go before the new ones come

            def show(done: int, total: int) -> None:
                if done % SHOWN_EVERY == 0 or done == total:
                    say({"event": "loading", "what": READING, "done": done, "total": total})

            found = device_images(data["data"], config, data["participant"], Path(data["kept"]), show, shared=data["shared"])
            self._images = key, found
        return self._images[1]


def _sources(config: RunConfig, data: Json, say: Say) -> dict[str, trainer.Source]:
    """The parts of the model; those that only differences were sent of are made, and handed to the parent for the next round."""
    found: dict[str, trainer.Source] = {}
    files = []
    for part, told in data["parts"].items():
        if isinstance(told, str):
            found[part] = Path(told)
            continue
        base, patches = Path(told["base"]), [Path(file) for file in told["patches"]]
        found[part] = made = differences.patch(config, part, part_shapes(config, part), base, patches, told["id"])
        file = Path(data["out"]).with_name(f"{part}.patched")
        on_disk(data, partial(file.write_bytes, made))
        files.append(str(file))
    if files:
        say({"event": "patched", "files": files})
    return found


def _keeps(found: Found, fixed: Json | None) -> bool:
    """Whether it does all that is prescribed."""
    done = {**found.fixed, "features_in": "memory" if found.features_bytes else "file"}
    return fixed is None or fixed.items() <= done.items()


def _left_on(folder: Path, budget_mb: float | None, found: Found) -> float:
    """Bytes for files there: what training leaves of the budget, where files are memory."""
    if filesystem(folder) not in TMPFS:
        return math.inf
    allowed = resident_mb() * MB + own_share_bytes() if budget_mb is None else budget_mb * MB
    return max(0.0, allowed - found.needs_mb * MB)


def _name(told: str | Json | None) -> str | None:
    """Of a part's content: blobs are named by it, wherever they lie."""
    return told["id"] if isinstance(told, dict) else told and Path(told).name


def _read(source: trainer.Source) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else source


def features(data: Json) -> Path:
    """Where a cache of features lies."""
    return Path(data["kept"]) / "features"


def on_disk(data: Json, write: Callable[[], Written]) -> Written:
    """Do `write`; features, which are kept to save time, give way to it where the disk is full. Raises StateError."""
    try:
        try:
            return write()
        except OSError:
            Folder(features(data)).forget()
            return write()
    except OSError as error:
        place = str(Path(data["out"]).parent)
        raise StateError(f"model and update cannot be written to {place!r} ({error.strerror}): free some disk space") from None


class Ceiling:
    """Tells when this process has taken more than `budget_mb` since its task began, by the mark that its agent has set back then."""

    def __init__(self, budget_mb: float | None, say: Say) -> None:
        self._budget_mb, self._say = budget_mb, say

    def check(self) -> None:
        peak_mb = status_mb(Path("/proc/self"), HIGH_WATER)
        if self._budget_mb is not None and peak_mb is not None and peak_mb > self._budget_mb:
            self._say({"event": "over", "peak_mb": round(peak_mb, 1), "budget_mb": round(self._budget_mb, 1)})
            self._budget_mb = None


def main() -> None:
    torch.set_num_interop_threads(1)
    read_code_in_pages()
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions = {"torch": torch.__version__, "onnxruntime": runtime_version()}
    serve(Worker().handle, {"event": "ready", **versions, "machine": machine, "accelerator": accelerator()})


if __name__ == "__main__":
    main()
