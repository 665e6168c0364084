"""Pretrain the embedded base encoder (src/simomerge/core/assets/rooms-base) on rooms, from scratch.

    torchrun --nproc-per-node 2 benchmarks/pretrain_base.py --output src/simomerge/core/assets/rooms-base

The encoder is a small transformer with DINOv2's architecture. Its images are rooms of the split "pool", which no task
uses for training or testing, with 40 % of the patches masked. From the last block, one linear layer predicts three
things for each patch: the RGB values (the loss counts masked patches only), the magnitude of the luminance gradient,
and the inverse depth, standardised per image. The last two overlap the tasks 'texture' and 'depth'. No semantic label
and no normal is used.

Use one process per core with one thread each: at this size it is nearly twice as fast as one process with two threads.
The state is saved every 500 steps, and a run that was killed resumes from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from simomerge.core.machine import mixed_precision
from simomerge.core.progress import Console, show_progress
from simomerge.datasets.rooms import load_rooms
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

PATCH = 8
CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    "image_size": 80,  # the position grid is square: 10 x 10, interpolated to 8 x 10
    "layerscale_value": 1.0,
    "hidden_act": "relu",  # GELU would cost a sixth of the training time on a CPU
}


class Pretrainer(nn.Module):
    """The encoder and its linear decoder of pixels; ``forward`` is the loss of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Dinov2Model(Dinov2Config(**CONFIG, attn_implementation="eager"))
        self.decoder = nn.Linear(CONFIG["hidden_size"], PATCH * PATCH * 5)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor, texture: Tensor, depth: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Losses. Images (B, 3, H, W); texture and depth (B, 1, H, W); mask (B, tokens), True for hidden patches."""
        pixels = (images - self.mean) / self.std
        tokens = self.encoder(pixel_values=pixels, bool_masked_pos=mask).last_hidden_state[:, 1:]
        predicted = self.decoder(tokens).float()
        inverse = 1 / depth
        inverse = (inverse - inverse.mean((1, 2, 3), keepdim=True)) / inverse.std((1, 2, 3), keepdim=True)
        target = F.pixel_unshuffle(torch.cat([pixels, texture * 3, inverse], 1), PATCH).flatten(2).transpose(1, 2)
        error = (predicted - target).abs().unflatten(2, (5, PATCH * PATCH)).mean(3)
        hidden = mask.float()
        return {
            "rgb": (error[..., :3].mean(2) * hidden).sum() / hidden.sum(),
            "gradient": error[..., 3].mean(),
            "depth": error[..., 4].mean(),
        }


def batches(rooms: dict[str, np.ndarray], size: int, generator: np.random.Generator):
    """Endless random batches, half of them mirrored, as float tensors."""
    count = len(rooms["image"])
    while True:
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            chosen = np.sort(order[start : start + size])
            image = torch.from_numpy(rooms["image"][chosen]).permute(0, 3, 1, 2).float() / 255
            texture = torch.from_numpy(rooms["texture"][chosen])[:, None].float() / 255
            depth = torch.from_numpy(rooms["depth"][chosen].astype(np.float32))[:, None]
            batch = torch.cat([image, texture, depth], 1)
            yield batch.flip(3) if generator.random() < 0.5 else batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/simomerge/core/assets/rooms-base"))
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=64, help="images per process and step")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("runs/pretrain"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision())
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise SystemExit(f"accelerate sees {accelerator.num_processes} process(es), but torchrun started more.")
    set_seed(args.seed)
    with accelerator.main_process_first(), show_progress(Console()):
        rooms = load_rooms("pool", args.images)
    model = Pretrainer()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    done = 0
    if (args.state / "progress.json").exists():
        accelerator.load_state(str(args.state / "state"))
        done = json.loads((args.state / "progress.json").read_text())["steps"]
        for _ in range(done):
            schedule.step()
    generator = np.random.default_rng([args.seed, accelerator.process_index, done])
    stream = batches(rooms, args.batch, generator)
    grid = (rooms["image"].shape[1] // PATCH) * (rooms["image"].shape[2] // PATCH)
    began, processed = time.time(), 0
    for step in range(done, args.steps):
        batch = next(stream).to(accelerator.device)
        mask = torch.from_numpy(generator.random((args.batch, grid)) < 0.4).to(accelerator.device)
        with accelerator.autocast():
            losses = model(batch[:, :3], batch[:, 3:4], batch[:, 4:5], mask)
        accelerator.backward(losses["rgb"] + 0.5 * losses["gradient"] + 0.5 * losses["depth"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        processed += args.batch * accelerator.num_processes
        if (step + 1) % 50 == 0 and accelerator.is_main_process:
            shown = "  ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {step + 1}/{args.steps}  {shown}  {processed / (time.time() - began):.0f} img/s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            accelerator.save_state(str(args.state / "state"))
            if accelerator.is_main_process:
                (args.state / "progress.json").write_text(json.dumps({"steps": step + 1}))
                save(accelerator.unwrap_model(model).encoder, args.output)
            accelerator.wait_for_everyone()


def save(encoder: Dinov2Model, folder: Path) -> None:
    """Write a transformers folder in float16, including the preprocessing of its images."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(encoder).half().save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "do_resize": False,
        "do_center_crop": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


if __name__ == "__main__":
    main()
