"""One convention for tensor names: the one on disk.

transformers 5 renamed the modules of several encoders but kept the names in files. The same tensor is called
``encoder.layer.0.attention.q_proj.weight`` in ``model.state_dict()`` and
``encoder.layer.0.attention.attention.query.weight`` in ``model.safetensors``. Wrappers also add prefixes. The rules
below bring all names to one convention before anything is compared.

Checked with transformers 5.23, for all families of `simomerge encoders`. Renaming cannot express one difference: the
gate and up projections of a SwiGLU DINOv2 (giant) are two tensors in memory and one on disk; see `parts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

from simomerge.core.errors import InputError

# Prefixes that wrappers add: data parallel, torch.compile, a model around a backbone or an encoder.
_PREFIX = re.compile(
    r"^(?:(?:module|_orig_mod|backbone|dinov2|dinov2_with_registers|dinov3_vit|dinov3_convnext|vit|beit|deit|swin|swinv2"
    r"|convnext|convnextv2|resnet|pvt_v2|vision_model)\.)+"
)
_RULES = [
    (re.compile(pattern), target)
    for pattern, target in (
        # DINOv3: only blocks and stages have a new prefix.
        (r"^model\.((?:layer|stages)\.\d+\.)", r"\1"),
        # ViT, DeiT and BEiT: `layers` at the top is `encoder.layer`, and the parts of its MLP have other names.
        (r"^layers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
        (r"^layers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
        (r"^layers\.(\d+)\.(attention\.|layernorm_before\.|layernorm_after\.|lambda_[12]$)", r"encoder.layer.\1.\2"),
        (r"^layers\.(\d+)\.(relative_position_bias\.)", r"encoder.layer.\1.attention.attention.\2"),
        (r"^shared_position_bias\.", r"encoder.relative_position_bias."),
        # ViT and DINOv2: the attention.
        (r"^(encoder\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
        (r"^(encoder\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
        (r"^(encoder\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
        (r"^(encoder\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
        # Swin.
        (r"^(encoder\.layers\.\d+\.blocks\.\d+\.attention)\.q_proj\.", r"\1.self.query."),
        (r"^(encoder\.layers\.\d+\.blocks\.\d+\.attention)\.k_proj\.", r"\1.self.key."),
        (r"^(encoder\.layers\.\d+\.blocks\.\d+\.attention)\.v_proj\.", r"\1.self.value."),
        (r"^(encoder\.layers\.\d+\.blocks\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
        (
            r"^(encoder\.layers\.\d+\.blocks\.\d+\.attention)\.relative_position_bias\.relative_position_bias_table$",
            r"\1.self.relative_position_bias_table",
        ),
        (r"^(encoder\.layers\.\d+\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"^(encoder\.layers\.\d+\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
        # SwiGLU DINOv2.
        (r"^(encoder\.layer\.\d+\.mlp)\.down_proj\.", r"\1.weights_out."),
    )
]


@lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """The on-disk name of an encoder tensor, given its name on disk or in memory, wrapped or not.

    A name that no rule matches is its own canonical name.

    Example:
        >>> canonical_name("backbone.encoder.layer.3.attention.q_proj.bias")
        'encoder.layer.3.attention.attention.query.bias'
        >>> canonical_name("encoder.layer.3.attention.attention.query.bias")
        'encoder.layer.3.attention.attention.query.bias'
    """
    name = _PREFIX.sub("", name)
    for pattern, target in _RULES:
        name = pattern.sub(target, name)
    return name


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is the running mean or variance of a batch norm.

    These are measured, not trained. A merge averages them over the experts, because extrapolation can make a variance
    negative, and distances between models leave them out.

    Example:
        >>> is_running_statistic("embedder.normalization.running_var"), is_running_statistic("layernorm.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def outer_prefix(names: Collection[str], fits: Callable[[str], bool]) -> str:
    """The prefix that a wrapper gave to all names and without which they fit, such as the ``model.`` of Lightning.

    Args:
        names: The names in a file.
        fits: Whether a name is one of those that are looked for.

    Returns:
        The prefix; "" if a name fits as it is, if not all names share a prefix, or if none fits without it.

    Example:
        >>> outer_prefix(["model.norm.weight", "model.norm.bias"], lambda name: name.startswith("norm."))
        'model.'
    """
    first, prefix = next(iter(names), ""), ""
    while not any(fits(name.removeprefix(prefix)) for name in names):
        part, dot, _ = first.removeprefix(prefix).partition(".")
        prefix += part + dot
        if not dot or not all(name.startswith(prefix) for name in names):
            return ""
    return prefix


def canonicalise(names: Iterable[str]) -> dict[str, str]:
    """A dictionary from canonical names to the given names, in the given order.

    Raises:
        InputError: two of the names mean the same tensor.

    Example:
        >>> canonicalise(["dinov2.layernorm.weight"])
        {'layernorm.weight': 'dinov2.layernorm.weight'}
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical in found:
            raise InputError(
                f"'{found[canonical]}' and '{name}' are the same tensor ('{canonical}') under two names: "
                "keep one of the two."
            )
        found[canonical] = name
    return found
