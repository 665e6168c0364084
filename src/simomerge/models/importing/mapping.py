"""Weight files of any training code as experts: map their tensors to the encoder and to the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from simomerge.checkpoints import Checkpoint, canonical_name, canonicalise, fingerprint, open_checkpoint
from simomerge.checkpoints.experts import source_name
from simomerge.checkpoints.names import outer_prefix
from simomerge.checkpoints.quantised import check_not_quantised
from simomerge.core.classes import trusting
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.heads import HEADS, head_arguments, head_for, head_kind
from simomerge.models.heads.conv import ConvHead
from simomerge.models.importing.names import from_dinov2, split_gate
from simomerge.models.importing.options import ImportOptions, as_imported
from simomerge.models.model import SimoModel


def read_mapped(file: Path, task: str, options: ImportOptions) -> SimoModel:
    """The expert in a weight file; see `simomerge.import_expert`."""
    prefix = options.encoder_prefix
    if prefix == options.head_prefix and options.encoder and options.head:
        raise InputError(f"{file}: --encoder-prefix and --head-prefix are both {prefix!r}; they must differ.")
    weights = unwrapped(open_checkpoint(file), [prefix, options.head_prefix])
    check_not_one_layer(str(file), weights, options)
    expert = prepared(str(file), "weight file", task, options)
    head = expert.heads[task]
    modules = {options.head_prefix: head}
    if prefix:
        modules[prefix] = expert.encoder.backbone
        record_base(expert, options)
    fill(weights, modules, options.drop, optional_tensors(head, options))
    return expert


def prepared(source: str, what: str, task: str, options: ImportOptions) -> SimoModel:
    """An expert of the encoder and the head that the options name; the source's weights are still to be read.

    Args:
        source: The source, for messages and for the record.
        what: What it is, such as "weight file".
        task: The name of the task.
        options: The options of the import.

    Raises:
        InputError: No encoder or no head is named, or one of them cannot be made.
    """
    for name, value, form in (
        ("encoder", options.encoder, "the folder or hub id of its base"),
        ("head", options.head, "module:Class, or " + ", ".join(HEADS)),
    ):
        if not value:
            raise InputError(f"{source} is a {what}: give --{name} ({form}) to read it.")
    encoder = options.load_encoder()
    # A task with classes is a segmentation, unless its name or --kind says another kind.
    implied = "segmentation" if options.classes and task not in KINDS else ""
    described = Task(task, options.kind or implied, tuple(options.classes))
    with trusting():  # the caller names the class, not a file
        head = head_for(encoder, options.head, described.channels, **options.head_settings)
    return as_imported(encoder, described, head, source, "mapping" if what == "weight file" else what)


def record_base(expert: SimoModel, options: ImportOptions) -> None:
    """Record the encoder as the base, before the source's weights replace its own."""
    found = fingerprint(expert.encoder.backbone.state_dict())
    expert.provenance["base"] = {"source": source_name(str(options.encoder)), "fingerprint": found}


def unwrapped(weights: Checkpoint, prefixes: Sequence[str]) -> Checkpoint:
    """The weights without what a wrapper put before all names, such as DDP's ``module.`` and Lightning's ``model.``.

    It is left out only if names begin with one of the given prefixes without it, and none does with it.
    """
    wanted = tuple(filter(None, prefixes))
    outer = outer_prefix(weights.keys(), lambda name: name.startswith(wanted)) if wanted else ""
    return weights.renamed({name.removeprefix(outer): name for name in weights}) if outer else weights


def optional_tensors(head: nn.Module, options: ImportOptions) -> list[str]:
    """Prefixes of tensors that a file may leave out."""
    masks = [f"{options.encoder_prefix}embeddings.mask_token"] if options.encoder_prefix else []
    return masks + ([f"{options.head_prefix}bias"] if isinstance(head, ConvHead) else [])  # a fresh bias is zero


def check_not_one_layer(source: str, weights: Checkpoint, options: ImportOptions) -> None:
    """Raise InputError if the source's head is one layer, but the chosen head of simomerge has several."""
    prefix = options.head_prefix
    own = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)} if prefix else {}
    if options.head in HEADS and options.head != "conv" and own.keys() in ({"weight"}, {"weight", "bias"}):
        raise InputError(
            f"{source}: the head in it is one layer ({', '.join(own.values())}), but {options.head!r} has several. For"
            " a convolution of kernel 1 give --head conv."
        )


def fill(
    weights: Checkpoint,
    modules: Mapping[str, nn.Module],
    drop: Sequence[str] = (),
    optional: Sequence[str] = (),
    rename: Callable[[str], str] = str,
) -> None:
    """Copy the tensors of a checkpoint into modules. Every tensor of both sides must be used.

    Args:
        weights: The checkpoint.
        modules: Prefix of the tensors' names -> module. The longest prefix that fits counts.
        drop: Prefixes of tensors that are ignored.
        optional: Prefixes of tensors that the checkpoint may leave out.
        rename: A function of every name in the file; all prefixes are those of its results.

    Raises:
        InputError: Quantised weights, or tensors that no module takes, that are missing, or of another shape. Nothing
            is copied then.
    """
    check_not_quantised(weights, str(weights.path))
    stored: dict[str, dict[str, str]] = {prefix: {} for prefix in modules}
    unused: list[str] = []
    for original in weights:
        name = rename(original)
        if name.startswith(tuple(drop)):
            continue
        prefix = max((prefix for prefix in modules if name.startswith(prefix)), key=len, default=None)
        if prefix is None:
            unused.append(original)
        else:
            stored[prefix][name.removeprefix(prefix)] = original
    states, missing = {}, []
    for prefix, module in modules.items():
        states[prefix] = _state(weights, module, stored[prefix], unused)
        absent = [f"{prefix}{name}" for name in module.state_dict() if name not in states[prefix]]
        # No prediction depends on the number of batches that a batch norm has counted; some files leave it out.
        missing += [name for name in absent if not name.endswith("num_batches_tracked")]
    missing = [name for name in missing if not name.startswith(tuple(optional))]
    problems = [
        f"{len(names)} tensors {what} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        for what, names in (("are used by nothing", unused), ("are missing", missing))
        if names
    ]
    if problems:
        raise InputError(
            f"{weights.path}: {'; '.join(problems)}. Correct the prefixes, or drop what is not needed by --drop PREFIX."
        )
    for prefix, module in modules.items():
        module.load_state_dict(states[prefix], strict=False)


def _state(
    weights: Checkpoint, module: nn.Module, stored: Mapping[str, str], unused: list[str]
) -> dict[str, torch.Tensor]:
    """The state dict of a module from the file's tensors. Tensors that it does not take are added to ``unused``.

    Args:
        stored: Name without the prefix -> name in the file.
    """
    wanted = module.state_dict()
    targets = {canonical_name(name): name for name in wanted}
    dinov2 = not any(canonical_name(name) in targets for name in stored)
    pieces: dict[str, tuple[str, torch.Tensor]] = {}
    for name, original in stored.items():
        renamed = [part for new in (from_dinov2(name) if dinov2 else [name]) for part in split_gate(new, targets)]
        tensor = torch.from_numpy(weights[original].copy())
        tensors = tensor.chunk(len(renamed)) if len(renamed) > 1 else (tensor,)
        pieces |= {part: (original, piece) for part, piece in zip(renamed, tensors, strict=True)}
    state = {}
    for canonical, name in canonicalise(pieces).items():
        original, tensor = pieces[name]
        target = targets.get(canonical)
        if target is None:
            unused.append(original)
        elif tensor.shape != wanted[target].shape:
            raise InputError(
                f"{weights.path}: {original} is {tuple(tensor.shape)}, but {target} of {type(module).__name__} is"
                f" {tuple(wanted[target].shape)}: another architecture or another size.{_hint(module)}"
            )
        else:
            state[target] = tensor.to(wanted[target].dtype)
    return state


def _hint(module: nn.Module) -> str:
    """What the sizes of a head of simomerge depend on, as a sentence; empty for other modules."""
    kind = head_kind(module)
    if kind not in HEADS:
        return ""
    return f" Check --taps, --classes and the head's arguments (--head-arg): {', '.join(head_arguments(kind))}."
