"""SimoModel: one encoder with all the heads; an expert has one head, a joint or merged model has many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.checkpoints import FORMAT, read_description
from simomerge.checkpoints.description import existing, head_file, model_folder
from simomerge.checkpoints.experts import own_task, source_name
from simomerge.core import images
from simomerge.core.assets import resolve_source
from simomerge.core.classes import make, settings_of
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task, select_tasks
from simomerge.models.encoders import Encoder, Features, OwnEncoder, load_backbone, load_encoder, timm
from simomerge.models.fingerprints import fingerprint_of
from simomerge.models.heads import build_head, head_kind

MAX_PATCHES = 4096
"""Images of more patches are made smaller for the encoder: attention takes memory with the square of the patches."""


class SimoModel(nn.Module):
    """One encoder and one head per task.

    Args:
        encoder: images -> Features; an `Encoder`, or a module of your own, see `ImageEncoder`.
        tasks: the tasks by name, in order.
        heads: one head per task, Features -> logits at the padded size; see `DenseHead` for one of your own.
        provenance: where the weights come from; plain data that goes into simo.json.

    Raises:
        InputError: heads and tasks do not pair up.

    Example:
        >>> model = SimoModel.from_pretrained("runs/scene")        # doctest: +SKIP
        >>> model.predict("photo.jpg")["depth"].shape              # doctest: +SKIP
        (480, 640)
    """

    def __init__(
        self,
        encoder: Encoder | nn.Module,
        tasks: Mapping[str, Task],
        heads: Mapping[str, nn.Module],
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if set(tasks) != set(heads):
            raise InputError(f"tasks {sorted(tasks)} and heads {sorted(heads)} do not pair up.")
        self.encoder = encoder if isinstance(encoder, Encoder) else OwnEncoder(encoder)
        self.tasks = dict(tasks)
        self.heads = nn.ModuleDict({name: heads[name] for name in tasks})
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.source = ""  # the folder or hub id it was loaded from

    def encode(self, images: Tensor) -> Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> Features. Once for all heads."""
        return self.encoder(images)

    def decode(self, features: Features, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Features -> logits by task, each (B, C, H, W) at the size of the images that were encoded."""
        height, width = features.image_size
        return {
            name: self.heads[name](features)[..., :height, :width] for name in (self.tasks if tasks is None else tasks)
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float images (B, 3, H, W), RGB in [0, 1] -> logits by task."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def predict(self, image: Any, max_patches: int = MAX_PATCHES) -> dict[str, np.ndarray]:
        """Predict every task for one image.

        Args:
            image: a path, a PIL image, an array or a tensor of any size; see `simomerge.core.images.to_tensor`.
            max_patches: an image of more patches is made smaller for the encoder, and the predictions are
                brought back to its size: attention takes memory with the square of the patches.

        Returns:
            By task, at the image's size: int64 labels (H, W); float32 (H, W) for one-channel maps in the
            target's units; float32 (3, H, W) for normals and RGB.

        Raises:
            InputError: not an image, or far too large.
        """
        tensor = images.to_tensor(image).to(next(self.parameters()).device)
        training = self.training
        self.eval()
        try:
            logits = self(self.fit(tensor, max_patches))
        finally:
            self.train(training)
        size = tensor.shape[-2:]
        maps = {name: self.tasks[name].activate(_resized(value, size))[0] for name, value in logits.items()}
        return {name: (m[0] if m.ndim == 3 and m.shape[0] == 1 else m).cpu().numpy() for name, m in maps.items()}

    def fit(self, image: Tensor, max_patches: int = MAX_PATCHES) -> Tensor:
        """The images (B, 3, H, W), smaller where they have more patches than allowed."""
        height, width = image.shape[-2:]
        patches = height * width / self.encoder.multiple**2
        if patches <= max_patches:
            return image
        shrink = (max_patches / patches) ** 0.5
        size = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        return images.resized(image, size)

    def encoder_fingerprint(self) -> str:
        """sha256 of the encoder's weights, whatever their names, layout and storage width."""
        return fingerprint_of(self.encoder.backbone)

    def origin(self) -> dict[str, str]:
        """What the provenance of other models records about this one: ``source`` and ``fingerprint``."""
        return {"source": source_name(self.source), "fingerprint": self.encoder_fingerprint()}

    def select(self, tasks: str | list[str]) -> SimoModel:
        """A model with some of the tasks; it shares the encoder and the heads with this one."""
        chosen = select_tasks(self.tasks, tasks)
        model = SimoModel(self.encoder, chosen, {name: self.heads[name] for name in chosen}, self.provenance)
        model.source = self.source
        return model

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model folder: simo.json, encoder/, heads/, adapters.safetensors, README.md.

        It is written to a temporary sibling and renamed, so a crash never leaves half a model.

        Raises:
            InputError: the folder exists (and not ``overwrite``), or the disk is full.
        """
        from safetensors.torch import save_file

        with model_folder(folder, self.description(), overwrite) as target:
            _save_encoder(self.encoder, target / "encoder")
            for name, head in self.heads.items():
                save_file(_tensors(head), head_file(target, name))
            if self.encoder.adapters is not None:
                save_file(_tensors(self.encoder.adapters), target / "adapters.safetensors")
        return Path(folder)

    def description(self) -> dict[str, Any]:
        """What simo.json says of this model."""
        return {
            "format": FORMAT,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "heads": {
                name: {"kind": head_kind(head), "settings": settings_of(head)} for name, head in self.heads.items()
            },
            **self.encoder_description(),
            "provenance": self.provenance,
        }

    def encoder_description(self) -> dict[str, Any]:
        """What simo.json says of the encoder: ``encoder`` and ``adapters``."""
        adapters = self.encoder.adapters
        return {
            "encoder": self.encoder.describe(),
            "adapters": adapters.settings if adapters is not None else None,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SimoModel:
        """Read a model folder.

        Raises:
            InputError: a file is missing, truncated or of another model; the message names it.
        """
        folder = Path(folder)
        description = read_description(folder)
        if not (folder / "encoder").is_dir():  # a relative path that is no folder would be taken for a hub id
            raise InputError(f"{folder / 'encoder'}: missing; take the model from its source again.")
        try:
            model = cls._from_description(description, folder / "encoder")
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / 'simo.json'}: does not describe a model ({type(error).__name__}: {error});"
                " take the model from its source again."
            ) from error
        for name, head in model.heads.items():
            _load_tensors(head, head_file(folder, name))
        if model.encoder.adapters is not None:
            _load_tensors(model.encoder.adapters, folder / "adapters.safetensors")
        return model.eval()

    @classmethod
    def _from_description(cls, description: dict[str, Any], weights: Path) -> SimoModel:
        """The model that simo.json describes, its heads and adapters not loaded yet."""
        settings = description["encoder"]
        encoder: Encoder
        if "class" in settings:
            encoder = OwnEncoder(make(settings["class"], settings["settings"], nn.Module))
            _load_tensors(encoder.backbone, weights / "model.safetensors")
        else:
            how = (settings[name] for name in ("taps", "mean", "std", "apply_layernorm"))
            encoder = Encoder(load_backbone(weights), *how)
        if description["adapters"]:
            encoder.add_adapters(**description["adapters"])
        tasks = {name: Task.from_dict(data) for name, data in description["tasks"].items()}
        heads = {}
        for name, task in tasks.items():
            spec = description["heads"][name]
            heads[name] = build_head(spec["kind"], encoder.channels, task.channels, spec["settings"])
        return cls(encoder, tasks, heads, description["provenance"])


def load(source: str | Path) -> SimoModel:
    """A model folder, or a foundation encoder without heads: a hub id, a transformers folder, or ``timm:NAME``.

    Raises:
        InputError: nothing there, no network for a hub id, or a file that cannot be read.
    """
    if str(source).startswith(timm.PREFIX):
        model = SimoModel(timm.TimmEncoder(str(source).removeprefix(timm.PREFIX), pretrained=True), {}, {})
        model.source = str(source)
        return model
    folder = resolve_source(source)
    if (Path(folder) / "simo.json").exists():
        model = SimoModel.from_pretrained(folder)
    else:
        model = SimoModel(load_encoder(folder), {}, {})
    model.source = str(source)
    return model


def as_expert(expert: SimoModel, task: str) -> SimoModel:
    """The expert with one task, which is called ``task``."""
    own = expert.tasks[own_task(expert.tasks, task)]
    result = SimoModel(
        expert.encoder, {task: replace(own, name=task)}, {task: expert.heads[own.name]}, expert.provenance
    )
    result.source = expert.source
    return result


def _save_encoder(encoder: Encoder, folder: Path) -> None:
    from transformers.utils import logging

    if isinstance(encoder, OwnEncoder):
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(_tensors(encoder.backbone), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(encoder.describe(), indent=2) + "\n")
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        encoder.backbone.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    preprocessing = encoder.preprocessing
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "image_mean": preprocessing["mean"],
                "image_std": preprocessing["std"],
                "do_resize": False,
                "do_center_crop": False,
            },
            indent=2,
        )
        + "\n"
    )


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _load_tensors(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(existing(path)))
    except (SafetensorError, RuntimeError, OSError) as error:
        first_line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit simo.json or is damaged ({first_line}).") from error
