"""A device that uses views again, for the tests of that."""

import numpy as np

from lwfed.models.features import Folder
from lwfed.models.initial import init_parts
from lwfed.models.local import device_task, train_local
from lwfed.models.prefix import TorchPrefix
from lwfed.models.reuse import FeatureCache, reuse
from lwfed.models.step import Means, prepare
from lwfed.plan import part_of

RECORD = 2 * (4 * 16 * 2 + 4)  # bytes: views, tokens, width, float16, CRC-32
EVERYWHERE = 1e9


class Counting(TorchPrefix):
    """Adds up how many images went through how many layers."""

    def __init__(self, *given):
        super().__init__(*given)
        self.count = 0

    def __call__(self, x, skip):
        self.count += len(x) * (self._layers - len(skip))
        return super().__call__(x, skip)


class Device:
    """Has `images` and trains rounds of stages from the same first weights; what it keeps is below `folder`."""

    def __init__(self, config, images, folder):
        self.config, self.images, self.folder = config, images, folder
        stages = range(1, self.config.stage_count + 1)
        self.tensors = {part: init_parts(self.config, [part]) for stage in stages for part in self.config.plan(stage).present}

    def train(self, stage, round=1, room=EVERYWHERE, marks="abcdef", cached=True, on_rows=None, before=None, place=None, micro_batch=4):
        """The update; what the prefix did is in `work`. `marks` are the digests of the frozen parts."""
        plan = self.config.plan(stage)
        tensors = {name: tensor for part in plan.present for name, tensor in self.tensors[part].items()}
        model = prepare(self.config, tensors, plan.trained).online
        prefix = Counting(model, len(plan.frozen) - 1)
        parts, self.told = tuple(marks[: len(plan.frozen)]), []
        cache = FeatureCache(place or Folder(self.folder, room, raises_room="allow more"), parts, self.told.append) if cached else None
        task = device_task(self.config, plan, 10 * stage + round, self.config.place(stage, round), reuse(self.config, plan, 0, round))
        count = iter(range(10**6))

        def on_step(report):
            if before and next(count) == 0:
                before()

        trained, _ = train_local(
            self.config, task, tensors, self.images, on_step, means=Means(prefix, micro_batch), cache=cache, on_rows=on_rows
        )
        self.work = prefix.count
        return {name: tensor.numpy().tobytes() for name, tensor in trained.items()}

    def weights(self, update):
        """What the tensors of `update` were before."""
        return np.concatenate([self.tensors[part_of(name)][name].numpy().ravel() for name in update])

    @property
    def files(self):
        return sorted(self.folder.iterdir())
