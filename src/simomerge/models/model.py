"""SimoModel: one encoder with one head per task. An expert has one head, a joint or merged model has several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.checkpoints import read_description
from simomerge.checkpoints.card import PICTURE, licence_of
from simomerge.checkpoints.description import FILE, format_of, head_file, model_folder
from simomerge.checkpoints.experts import of_group, origin_of, own_task, source_name
from simomerge.checkpoints.reading import check_safetensors
from simomerge.core import images, text
from simomerge.core.classes import make, settings_of, trusting, warn_of_main
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.core.modes import evaluating
from simomerge.core.pixels import resize_to
from simomerge.datasets.tasks import Task, select_tasks
from simomerge.models.encoders import CustomEncoder, Encoder, Features, TreeEncoder, load_backbone, load_encoder, timm
from simomerge.models.fingerprints import fingerprint_of
from simomerge.models.heads import TaskHeads, build_head, head_kind
from simomerge.models.predictions import Predictions, predicted
from simomerge.models.storage import check_settings, load_tree, save_encoder, stored_tensors, with_tensors

Names = str | Iterable[str] | None
"""Some tasks by name, as `select_tasks` takes them; None stands for all."""
Size = tuple[int, int] | str | None
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
        branches = self.encoder.tasks if isinstance(self.encoder, TreeEncoder) else list(tasks)
        if missing := [task for task in tasks if task not in branches]:
            raise InputError(f"the encoder has no branch for task {missing[0]!r}; it has {', '.join(branches)}.")
        self.tasks = dict(tasks)
        self.heads = TaskHeads({name: heads[name] for name in tasks})
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.source = ""  # the folder or hub id from which it was loaded
        self.licence = ""  # that of its folder, if its model card declares one
        self.evaluation: dict[str, Any] = {}  # figures that were measured, see simomerge.training.evaluate

    def encode(self, images: Tensor, tasks: Names = None) -> Features:
        """Float images (B, 3, H, W), RGB in [0, 1] -> Features for the heads of some tasks; of all tasks by default.

        Raises InputError for an unknown task, as `decode` and `forward` do.
        """
        return self.encoder(images, list(self._chosen(tasks)))

    def decode(self, features: Features, tasks: Names = None) -> dict[str, Tensor]:
        """Features -> logits (B, C, H, W) by task, at the size of the encoded images."""
        height, width = features.image_size
        return {name: self.heads[name](features.of(name))[..., :height, :width] for name in self._chosen(tasks)}

    def forward(self, images: Tensor, tasks: Names = None) -> dict[str, Tensor]:
        """Float images (B, 3, H, W), RGB in [0, 1] -> logits by task, for all tasks or some."""
        chosen = self._chosen(tasks)
        return self.decode(self.encode(images, chosen), chosen)

    def _chosen(self, tasks: Names) -> Mapping[str, Task]:
        """The named tasks. Raises InputError for an unknown one."""
        return self.tasks if tasks is None else select_tasks(self.tasks, tasks)

    def predict(self, image: Any, max_patches: int = MAX_PATCHES, tasks: Names = None, size: Size = None) -> Any:
        """Predict every task for one image, or for each image of a list.

        Args:
            image: A path, PIL image, array or tensor, see `simomerge.core.images.to_tensor`; or a list of them.
            max_patches: An image with more patches is downscaled for the encoder, and the predictions are upscaled.
            tasks: Some of the tasks; all by default. A tree encodes only what these tasks need.
            size: (height, width) or "HEIGHTxWIDTH" in pixels to which an image is resized for the encoder, or "own" for
                its own size; ``max_patches`` then has no effect.

        Returns:
            `Predictions`: a dictionary, task -> prediction at the image's size: int64 labels (H, W), or float32 (H, W)
            or (C, H, W) in the target's units. Notebooks show it as pictures. A list of them for a list.

        Raises:
            InputError: Not an image, or too large; or an unknown task, a ``size`` that is none, or no patches allowed.
        """
        chosen = self._chosen(tasks)
        if isinstance(image, (list, tuple)):
            return [self.predict(each, max_patches, chosen, size) for each in image]
        found = self.predict_batch(images.to_tensor(image), max_patches, chosen, size)
        return Predictions(self.tasks, {name: value[0].cpu().numpy() for name, value in found.items()})

    @torch.no_grad()
    def predict_batch(
        self, batch: Tensor, max_patches: int = MAX_PATCHES, tasks: Names = None, size: Size = None
    ) -> dict[str, Tensor]:
        """Predict every task for a batch of images. Nothing leaves the model's device.

        Args:
            batch: Float images (B, 3, H, W), RGB in [0, 1], on any device.
            max_patches, tasks, size: As in `predict`.

        Returns:
            Task -> int64 (B, H, W), float32 (B, H, W) or (B, C, H, W), at the images' size; flow is in its pixels.

        Raises:
            InputError: Not such a tensor; otherwise as `predict`.
        """
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise InputError(f"batch of {tuple(batch.shape)} {batch.dtype}; give float images (B, 3, H, W) in [0, 1].")
        chosen = self._chosen(tasks)
        batch = batch.to(next(self.parameters()).device)
        given = self.fit(batch, max_patches) if size is None else images.resized(batch, resize_to(size))
        with evaluating(self):
            logits = self(given, chosen)
        maps = {name: predicted(chosen[name], value, batch.shape[-2:]) for name, value in logits.items()}
        return {name: value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value for name, value in maps.items()}

    def fit(self, image: Tensor, max_patches: int = MAX_PATCHES) -> Tensor:
        """Images (B, 3, H, W), downscaled if they have more than ``max_patches`` patches.

        Raises:
            InputError: ``max_patches`` is below 1.
        """
        if not max_patches >= 1:
            raise InputError(f"max_patches is {max_patches}; give 1 or more.")
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

    def origin(self) -> dict[str, Any]:
        """What the provenance of other models records about this one, see `simomerge.checkpoints.experts.origin_of`."""
        return origin_of(source_name(self.source), self.encoder_fingerprint(), self.licence, self.provenance)

    def select(self, tasks: str | list[str]) -> SimoModel:
        """A model with some of the tasks, whose tensors are those of this one.

        Branches of a tree that none of these tasks needs are left out, and are not saved with it.
        """
        chosen = select_tasks(self.tasks, tasks)
        encoder, provenance = self.encoder.for_tasks(chosen), self.provenance
        if isinstance(self.encoder, TreeEncoder) and not isinstance(encoder, TreeEncoder):
            provenance = of_group(provenance, self.encoder.tree.group_of(next(iter(chosen))))
        model = SimoModel(encoder, chosen, {name: self.heads[name] for name in chosen}, provenance)
        model.source, model.licence = self.source, self.licence
        return model

    def save_pretrained(self, folder: str | Path, overwrite: bool = False, dtype: Any = None) -> Path:
        """Write the model folder: simo.json, encoder/, heads/, README.md, and adapters or branches if it has some.

        The folder is written under a temporary name and renamed, so a crash never leaves an incomplete model.

        Args:
            folder: Where to write it.
            overwrite: Replace the folder if it exists.
            dtype: Storage of the encoder's floats, such as "float16" or torch.bfloat16; as they are by default.

        Raises:
            InputError: The folder exists and ``overwrite`` is false, ``dtype`` is unknown, a weight is too large for
                it, or the disk is full.

        Warns:
            UserWarning: The class of the encoder or of a head is defined in a notebook or script, so that no other
                program can load the folder, or its ``settings`` do not create its module again.
        """
        from safetensors.torch import save_file

        description = self.description()
        warn_of_main({name: description[name] for name in ("encoder", "heads")})
        check_settings(self.encoder, self.heads.values())
        with model_folder(folder, description, overwrite) as target:
            save_encoder(self.encoder, target, dtype)
            for name, head in self.heads.items():
                save_file(stored_tensors(head), head_file(target, name))
            if self.encoder.adapters is not None:
                save_file(stored_tensors(self.encoder.adapters), target / "adapters.safetensors")
        return Path(folder)

    def push_to_hub(
        self, repository: str, private: bool = True, license: str = "", message: str = "", picture: Any = None
    ) -> str:
        """Publish the model on the Hugging Face hub with a model card, in one commit.

        Args:
            repository: OWNER/NAME; it is created if it does not exist.
            private: Whether only its owner can see a new repository.
            license: As the hub names it, such as "apache-2.0"; by default the one that all parents of the model have.
            message: Of the commit.
            picture: An image; the model card shows what the model predicts for it.

        Returns:
            The address of its page.

        Raises:
            InputError: No token or one that may not write, a repository that holds something else, or no connection.
                No file was sent, but a new repository may have been created.

        Example:
            >>> model.push_to_hub("me/scene", picture="photo.jpg")                              # doctest: +SKIP
            'https://huggingface.co/me/scene'
        """
        from simomerge.checkpoints.publishing import check_repository, push_folder
        from simomerge.models.strip import save_strip

        check_repository(repository)
        with TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "model")
            if picture is not None:
                save_strip(self, picture, folder / PICTURE)
            return push_folder(folder, repository, private=private, licence=license, message=message).url

    def description(self) -> dict[str, Any]:
        """The content of simo.json."""
        return {
            "format": format_of(self.encoder.describe()),
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "heads": {
                name: {"kind": head_kind(head), "settings": settings_of(head)} for name, head in self.heads.items()
            },
            **self.encoder_description(),
            "provenance": self.provenance,
            **({"evaluation": self.evaluation} if self._is_measured() else {}),
        }

    def _is_measured(self) -> bool:
        """Whether the figures in ``evaluation`` are those of the present weights."""
        return bool(self.evaluation) and self.evaluation.get("weights") == fingerprint_of(self)

    def encoder_description(self) -> dict[str, Any]:
        """The entries ``encoder`` and ``adapters`` of simo.json."""
        adapters = self.encoder.adapters
        return {"encoder": self.encoder.describe(), "adapters": adapters.settings if adapters is not None else None}

    @classmethod
    def from_pretrained(cls, folder: str | Path, trust_code: bool = False) -> SimoModel:
        """Read a model folder.

        Args:
            folder: The folder.
            trust_code: Import and run custom classes that it names and that are not registered; see `load`.

        Raises:
            InputError: A file is missing, truncated or belongs to another model; the message names it.
        """
        folder = Path(folder) if Path(folder).name else Path(folder).resolve()  # errors of its files begin with it
        description = read_description(folder)
        if not (folder / "encoder").is_dir():  # a relative path that does not exist looks like a hub id
            raise InputError(f"{folder / 'encoder'}: missing; take the model from its source again.")
        for file in (folder / "encoder").glob("*.safetensors"):
            check_safetensors(file)
        try:
            with trusting(trust_code):
                model = cls._from_description(description, folder)
        except InputError as error:
            names_a_file = str(error).startswith(f"{folder}{os.sep}")
            raise error if names_a_file else InputError(f"{folder / FILE}: {error}") from error
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"does not describe a model ({type(error).__name__}: {error}); take the model from its source again."
            raise InputError(f"{folder / FILE}: {what}") from error
        return model.eval()

    @classmethod
    def _from_description(cls, description: dict[str, Any], folder: Path) -> SimoModel:
        """The model that simo.json in a folder describes, with its weights."""
        settings, weights = description["encoder"], folder / "encoder"
        encoder: Encoder
        if "class" in settings:
            create = partial(make, settings["class"], settings["settings"], nn.Module)
            encoder = CustomEncoder(with_tensors(create, weights / "model.safetensors"))
        else:
            how = (settings[name] for name in ("taps", "mean", "std", "apply_layernorm"))
            encoder = Encoder(load_backbone(weights), *how)
        if settings.get("tree"):
            encoder = load_tree(settings, encoder, folder)
        if description["adapters"]:
            create = partial(encoder.add_adapters, **description["adapters"])
            with_tensors(create, folder / "adapters.safetensors")
        tasks = {name: Task.from_dict(data) for name, data in description["tasks"].items()}
        heads = {}
        for name, task in tasks.items():
            spec = description["heads"][name]
            create = partial(build_head, spec["kind"], encoder.channels, task.channels, spec["settings"])
            heads[name] = with_tensors(create, head_file(folder, name))
        model = cls(encoder, tasks, heads, description["provenance"])
        model.evaluation = dict(description.get("evaluation", {}))
        return model


def load(source: str | Path, trust_code: bool = False) -> SimoModel:
    """Load a model folder, or a foundation encoder without heads: a hub id, a transformers folder, or ``timm:NAME``.

    Loading runs no code of the folder. An encoder or a head of a class outside simomerge is created only if the class
    is registered (`register_encoder`, `register_head`), or with ``trust_code``.

    Args:
        source: The folder or name.
        trust_code: Import the modules of classes that the folder names, and run their code. Only for folders whose
            origin you trust.

    Raises:
        InputError: No such source, no network for a hub id, a file that cannot be read, or a class that is neither
            registered nor trusted.
    """
    folder = local_source(source)
    if str(source).startswith(timm.PREFIX):
        model = SimoModel(timm.TimmEncoder.fetched(str(source).removeprefix(timm.PREFIX)), {}, {})
    elif (Path(folder) / "simo.json").exists():
        model = SimoModel.from_pretrained(folder, trust_code)
    else:
        model = SimoModel(load_encoder(folder), {}, {})
    model.source, model.licence = text.without_secrets(str(source)), licence_of(Path(folder))
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
    result.source, result.licence = expert.source, expert.licence
    return result
