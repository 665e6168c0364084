"""SimoModel: one encoder with one head per task. An expert has one head, a joint or merged model has several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.checkpoints import FORMAT, read_description
from simomerge.checkpoints.description import existing, head_file, model_folder
from simomerge.checkpoints.experts import own_task, source_name
from simomerge.checkpoints.reading import check_safetensors
from simomerge.core import images
from simomerge.core.classes import make, settings_of
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.datasets.tasks import Task, select_tasks
from simomerge.models.encoders import CustomEncoder, Encoder, Features, load_backbone, load_encoder, timm
from simomerge.models.encoders.loading import quiet
from simomerge.models.fingerprints import fingerprint_of
from simomerge.models.heads import build_head, head_kind

MAX_PATCHES = 4096
"""Images with more patches are downscaled for the encoder: attention needs memory quadratic in their number."""


class SimoModel(nn.Module):
    """One encoder and one head per task.

    Args:
        encoder: Images -> Features: an `Encoder`, or a custom module, see `ImageEncoder`.
        tasks: The tasks by name, in order.
        heads: One head per task, Features -> logits at the padded size; see `DenseHead` for custom heads.
        provenance: Where the weights come from, as plain data for simo.json.

    Raises:
        InputError: The names of heads and tasks differ.

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
            raise InputError(f"tasks {sorted(tasks)} and heads {sorted(heads)} must have the same names.")
        self.encoder = encoder if isinstance(encoder, Encoder) else CustomEncoder(encoder)
        self.tasks = dict(tasks)
        self.heads = nn.ModuleDict({name: heads[name] for name in tasks})
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.source = ""  # the folder or hub id from which it was loaded

    def encode(self, images: Tensor) -> Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> Features, which all heads share."""
        return self.encoder(images)

    def decode(self, features: Features, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Features -> logits (B, C, H, W) by task, at the size of the encoded images."""
        height, width = features.image_size
        return {
            name: self.heads[name](features)[..., :height, :width] for name in (self.tasks if tasks is None else tasks)
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float images (B, 3, H, W), RGB in [0, 1] -> logits by task."""
        return self.decode(self.encode(images))

    def predict(
        self,
        image: Any,
        max_patches: int = MAX_PATCHES,
        tasks: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Any:
        """Predict every task for one image, or for each image of a list.

        Args:
            image: A path, a PIL image, an array or a tensor of any size; see `simomerge.core.images.to_tensor`. Or a
                list of them, which are read one at a time.
            max_patches: An image with more patches is downscaled for the encoder, and the predictions are upscaled to
                its size.
            tasks: Some of the tasks; all by default.
            size: (height, width) in pixels to which an image is resized for the encoder.

        Returns:
            Task -> prediction at the image's size: int64 labels (H, W); float32 (H, W) for one-channel maps in the
            target's units; float32 (3, H, W) for normals and RGB. A list of them for a list.

        Raises:
            InputError: Not an image, or too large; or an unknown task.
        """
        if isinstance(image, (list, tuple)):
            return [self.predict(each, max_patches, tasks, size) for each in image]
        found = self.predict_batch(images.to_tensor(image), max_patches, tasks, size)
        return {name: value[0].cpu().numpy() for name, value in found.items()}

    @torch.no_grad()
    def predict_batch(
        self,
        batch: Tensor,
        max_patches: int = MAX_PATCHES,
        tasks: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Predict every task for a batch of images. Nothing leaves the model's device.

        Args:
            batch: Float images (B, 3, H, W), RGB in [0, 1], on any device.
            max_patches, tasks, size: As in `predict`.

        Returns:
            Task -> predictions at the size of the images, on the model's device: int64 (B, H, W), float32 (B, H, W), or
            float32 (B, 3, H, W).

        Raises:
            InputError: Not such a tensor, or an unknown task.

        Example:
            >>> model.predict_batch(torch.rand(4, 3, 480, 640, device="cuda"))["depth"].shape    # doctest: +SKIP
            torch.Size([4, 480, 640])
        """
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise InputError(f"batch of {tuple(batch.shape)} {batch.dtype}; give float images (B, 3, H, W) in [0, 1].")
        chosen = self.tasks if tasks is None else select_tasks(self.tasks, tasks)
        batch = batch.to(next(self.parameters()).device)
        training = self.training
        self.eval()
        try:
            given = self.fit(batch, max_patches) if size is None else images.resized(batch, size)
            logits = self.decode(self.encode(given), chosen)
        finally:
            self.train(training)
        maps = {name: chosen[name].activate(_upscaled(value.float(), batch)) for name, value in logits.items()}
        return {name: value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value for name, value in maps.items()}

    def fit(self, image: Tensor, max_patches: int = MAX_PATCHES) -> Tensor:
        """Images (B, 3, H, W), downscaled if they have more than ``max_patches`` patches."""
        height, width = image.shape[-2:]
        patches = height * width / self.encoder.multiple**2
        if patches <= max_patches:
            return image
        shrink = (max_patches / patches) ** 0.5
        return images.resized(image, (max(1, int(height * shrink)), max(1, int(width * shrink))))

    def encoder_fingerprint(self) -> str:
        """sha256 of the encoder's weights; it does not depend on their names, order or storage dtype."""
        return fingerprint_of(self.encoder.backbone)

    @property
    def place(self) -> str:
        """Where it was loaded from, for messages."""
        return self.source or "the given model"

    def origin(self) -> dict[str, str]:
        """What the provenance of other models records about this one: ``source`` and ``fingerprint``."""
        return {"source": source_name(self.source), "fingerprint": self.encoder_fingerprint()}

    def select(self, tasks: str | list[str]) -> SimoModel:
        """A model with some of the tasks. It shares the encoder and the heads with this one."""
        chosen = select_tasks(self.tasks, tasks)
        model = SimoModel(self.encoder, chosen, {name: self.heads[name] for name in chosen}, self.provenance)
        model.source = self.source
        return model

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model folder: simo.json, encoder/, heads/, adapters.safetensors, README.md.

        The folder is written under a temporary name and renamed, so a crash never leaves an incomplete model.

        Raises:
            InputError: The folder exists and ``overwrite`` is false, or the disk is full.
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
        """The content of simo.json."""
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
        """The entries ``encoder`` and ``adapters`` of simo.json."""
        adapters = self.encoder.adapters
        return {"encoder": self.encoder.describe(), "adapters": adapters.settings if adapters is not None else None}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SimoModel:
        """Read a model folder.

        Raises:
            InputError: A file is missing, truncated or belongs to another model; the message names it.
        """
        folder = Path(folder)
        description = read_description(folder)
        if not (folder / "encoder").is_dir():  # a relative path that does not exist looks like a hub id
            raise InputError(f"{folder / 'encoder'}: missing; take the model from its source again.")
        for file in (folder / "encoder").glob("*.safetensors"):
            check_safetensors(file)
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
        """The model that simo.json describes. The weights of heads and adapters are not loaded yet."""
        settings = description["encoder"]
        encoder: Encoder
        if "class" in settings:
            encoder = CustomEncoder(make(settings["class"], settings["settings"], nn.Module))
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
    """Load a model folder, or a foundation encoder without heads: a hub id, a transformers folder, or ``timm:NAME``.

    Raises:
        InputError: No such source, no network for a hub id, or a file that cannot be read.
    """
    folder = local_source(source)
    if str(source).startswith(timm.PREFIX):
        model = SimoModel(timm.TimmEncoder(str(source).removeprefix(timm.PREFIX), pretrained=True), {}, {})
    elif (Path(folder) / "simo.json").exists():
        model = SimoModel.from_pretrained(folder)
    else:
        model = SimoModel(load_encoder(folder), {}, {})
    model.source = str(source)
    return model


def as_model(given: Any) -> SimoModel:
    """A model as it is, or the model that a name stands for: a folder, a hub id or rooms-base.

    Raises:
        InputError: Neither a model nor a name, or the name cannot be loaded.
    """
    if isinstance(given, (str, Path)):
        return load(given)
    if not isinstance(given, SimoModel):
        raise InputError(f"{type(given).__name__} given where a model is needed: give sm.load(...), or its folder.")
    return given


def as_models(given: Any) -> dict[str, SimoModel]:
    """Models by task, each as `as_model` takes it. Raises InputError."""
    if not isinstance(given, Mapping):
        raise InputError(f"experts is a {type(given).__name__}: give them by task, such as {{'depth': 'runs/depth'}}.")
    return {str(task): as_model(model) for task, model in given.items()}


def as_expert(expert: SimoModel, task: str) -> SimoModel:
    """The expert with one task, which is called ``task``."""
    own = expert.tasks[own_task(expert.tasks, task)]
    result = SimoModel(
        expert.encoder, {task: replace(own, name=task)}, {task: expert.heads[own.name]}, expert.provenance
    )
    result.source = expert.source
    return result


def _save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write a transformers folder, or the tensors and the description of a custom encoder."""
    if isinstance(encoder, CustomEncoder):
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(_tensors(encoder.backbone), folder / "model.safetensors")
        file, content = folder / "config.json", encoder.describe()
    else:
        with quiet():
            encoder.backbone.save_pretrained(folder)
        file = folder / "preprocessor_config.json"
        mean, std = encoder.preprocessing["mean"], encoder.preprocessing["std"]
        content = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std}
        content |= {"do_resize": False, "do_center_crop": False}
    file.write_text(json.dumps(content, indent=2) + "\n")


def _upscaled(logits: Tensor, image: Tensor) -> Tensor:
    """Logits at the size of an image, which may have been downscaled for the encoder."""
    size = image.shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _load_tensors(module: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    check_safetensors(existing(path))
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        first_line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit simo.json ({first_line}).") from error
