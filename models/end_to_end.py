"""What is compared with: the training step as published code does it, from timm, torchvision and torch.optim.

``python -m lwfed.models.end_to_end``, a process of its own (`lwfed.child`):

In:   {"config": file, "stage", "steps", "micro_batch": images, or null for whole batches, "compile": true for torch.compile,
       "kernels": true for the matrix products of `lwfed.models.kernels` in place of torch's}
Out:  {"event": "ready", "torch"} after the imports, once
      {"event": "progress", "step", "steps", "loss", "views_s"}
      {"event": "done"}

End to end all layers are trained; with a layer-wise configuration the layers below the stage are frozen, and both branches
run through them all the same. The target branch is a whole copy; views are made image by image. A batch goes forward and backward
at once. With a micro-batch it is what is commonly done instead, accumulation of gradients: each micro-batch has its own
statistics and negatives, which is another loss than that of the batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwfed.child import Json, serve
from lwfed.config import RunConfig
from lwfed.config.schema import ViewsSection
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.models.kernels import Linear
from lwfed.seeds import derive


def encoder(config: RunConfig, layers: int) -> nn.Module:
    """timm's Vision Transformer, [B, C, H, W] -> [B, width]."""
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = config.model
    token = model.pooling == "token"
    made: nn.Module = VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=model.channels,
        embed_dim=model.width,
        depth=layers,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        class_token=token,
        global_pool="token" if token else "avg",
        num_classes=0,
    )
    return made


def with_our_products(model: nn.Module) -> None:
    """Replace torch's linear layers by those of this package, with their weights."""
    for module in list(model.modules()):
        for name, one in list(module.named_children()):
            if type(one) is nn.Linear:
                ours = Linear(one.in_features, one.out_features, one.bias is not None, device="meta")
                ours.weight, ours.bias = one.weight, one.bias
                setattr(module, name, ours)


def head(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inward, outward) in enumerate(pairwise(widths)):
        last = index == len(widths) - 2
        layers += [nn.Linear(inward, outward, bias=False), nn.BatchNorm1d(outward, affine=not last), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)


def transform(views: ViewsSection, view: int, size: int) -> Any:
    """PIL image -> float32 [C, size, size]."""
    import_torchvision()
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    kernel = max(3, 2 * (size // 20) + 1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=views.crop_scale, antialias=True),
            v2.RandomHorizontalFlip(views.flip),
            v2.RandomApply([jitter], p=views.jitter),
            v2.RandomGrayscale(views.grayscale),
            v2.RandomApply([v2.GaussianBlur(kernel, views.blur_sigma)], p=views.blur[view]),
            v2.RandomSolarize(128, p=views.solarise[view]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )


def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


class MoCo(nn.Module):
    """Online and target branch of MoCo v3."""

    def __init__(self, config: RunConfig, stage: int) -> None:
        super().__init__()
        plan, ssl = config.plan(stage), config.ssl
        width, hidden, out = config.model.width, ssl.hidden_dim, ssl.output_dim
        backbone = encoder(config, plan.layers)
        if plan.frozen:
            backbone.requires_grad_(False)
            for number in range(plan.layers):
                if f"layer.{number + 1}" in plan.trained:
                    backbone.get_submodule(f"blocks.{number}").requires_grad_(True)
            backbone.get_submodule("fc_norm" if config.model.pooling == "mean" else "norm").requires_grad_(True)
        self.online = nn.Sequential(backbone, head([width, hidden, hidden, out]))
        self.predictor = head([out, hidden, out])
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.temperature, self.momentum = ssl.temperature, ssl.momentum

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, q2 = self.predictor(self.online(x1)), self.predictor(self.online(x2))
        with torch.no_grad():
            k1, k2 = self.target(x1), self.target(x2)
        return contrast(q1, k2, self.temperature) + contrast(q2, k1, self.temperature)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.mul_(self.momentum).add_(theirs, alpha=1 - self.momentum)


def train(
    config: RunConfig, stage: int, steps: int, micro_batch: int | None, compiled: bool, kernels: bool, say: Callable[[Json], None]
) -> None:
    """Train `steps` batches of images of noise."""
    from PIL import Image

    torch.set_num_threads(config.train.threads)
    torch.manual_seed(derive(config.run.seed, "sample"))
    size, channels, batch = config.model.image_size, config.model.channels, config.train.batch_size
    noise = torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8).numpy()
    images = [Image.fromarray(one if channels == 3 else one[:, :, 0]) for one in noise]
    transforms = [transform(config.views, view, size) for view in (0, 1)]
    model = MoCo(config, stage)
    if kernels:
        with_our_products(model)
    forward: Any = torch.compile(model) if compiled else model
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=config.train.weight_decay)
    pieces = -(-batch // (micro_batch or batch))
    for step in range(1, steps + 1):
        start = time.perf_counter()
        x1, x2 = (torch.stack([make(image) for image in images]) for make in transforms)
        views_s = time.perf_counter() - start
        optimiser.zero_grad()
        model.follow()
        loss = 0.0
        for one, two in zip(x1.chunk(pieces), x2.chunk(pieces), strict=True):
            value = forward(one, two) * len(one) / batch
            value.backward()
            loss += value.item()
        optimiser.step()
        say({"event": "progress", "step": step, "steps": steps, "loss": loss, "views_s": views_s})


def handle(data: Json, say: Callable[[Json], None]) -> None:
    config = RunConfig.from_bytes(Path(data["config"]).read_bytes())
    train(config, data["stage"], data["steps"], data["micro_batch"], data["compile"], data["kernels"], say)
    say({"event": "done"})


def main() -> None:
    import_torchvision()
    import timm.models.vision_transformer  # noqa: F401 - before what is counted as the baseline of the libraries
    import torchvision.transforms.v2  # noqa: F401

    torch.set_num_interop_threads(1)
    serve(handle, {"event": "ready", "torch": torch.__version__})


if __name__ == "__main__":
    main()
