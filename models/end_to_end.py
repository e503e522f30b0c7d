"""What is compared with: the training step as published code does it, from timm, torchvision and torch.optim.

`python -m lwfed.models.end_to_end`, in a process of its own, reads one order on stdin and writes one answer:

In:   {"config": file, "stage", "steps"}
Out:  {"step_s": [...], "views_s": [...], "baseline_mb", "peak_mb", "loss"}

End to end all layers are trained; with a layer-wise configuration the layers below the stage are frozen, and both branches
run through them all the same. A whole batch goes forward and backward at once; the target branch is a whole copy;
views are made image by image.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwfed.config import RunConfig
from lwfed.config.schema import ViewsSection
from lwfed.data.torchvision_sets import import_torchvision


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
            for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
                mine.mul_(self.momentum).add_(theirs, alpha=1 - self.momentum)
            k1, k2 = self.target(x1), self.target(x2)
        return contrast(q1, k2, self.temperature) + contrast(q2, k1, self.temperature)


def run(config: RunConfig, stage: int, steps: int) -> dict[str, Any]:
    """Train `steps` batches of images of noise and say what it took."""
    from PIL import Image

    torch.set_num_threads(config.train.threads)
    size, channels = config.model.image_size, config.model.channels
    noise = torch.randint(0, 256, (config.train.batch_size, size, size, channels), dtype=torch.uint8).numpy()
    images = [Image.fromarray(one if channels == 3 else one[:, :, 0]) for one in noise]
    transforms = [transform(config.views, view, size) for view in (0, 1)]
    baseline = memory_mb("VmRSS")
    model = MoCo(config, stage)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=config.train.weight_decay)
    step_s, views_s, loss = [], [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        x1, x2 = (torch.stack([make(image) for image in images]) for make in transforms)
        middle = time.perf_counter()
        value = model(x1, x2)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        loss = value.item()
        views_s.append(middle - start)
        step_s.append(time.perf_counter() - start)
    return {"step_s": step_s, "views_s": views_s, "baseline_mb": baseline, "peak_mb": memory_mb("VmHWM"), "loss": loss}


def memory_mb(which: str) -> float:
    """VmRSS or VmHWM of this process, MB of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024 / 1e6


def main() -> None:
    order = json.load(sys.stdin)
    config = RunConfig.from_bytes(Path(order["config"]).read_bytes())
    sys.stdout.write(json.dumps(run(config, order["stage"], order["steps"])) + "\n")


if __name__ == "__main__":
    main()
