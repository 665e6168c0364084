"""The families of vision encoders in transformers that are tested here. No framework is imported."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from simomerge.core.errors import InputError


@dataclass(frozen=True)
class Family:
    """A family of encoders.

    Attributes:
        title: Its usual name.
        model_types: The values of ``model_type`` in config.json.
        example: A hub id.
        taps: "blocks" of a plain transformer, whose maps all have one stride, or "stages" of a pyramid.
        loads_as: The class of transformers to load, if AutoModel would load more than the vision encoder or would not
            encode the whole image.
    """

    title: str
    model_types: tuple[str, ...]
    example: str
    taps: str = "blocks"
    loads_as: str = ""


FAMILIES = (
    Family("DINOv2", ("dinov2",), "facebook/dinov2-base"),
    Family("DINOv2 with registers", ("dinov2_with_registers",), "facebook/dinov2-with-registers-base"),
    Family("DINOv3 ViT", ("dinov3_vit",), "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    Family("DINOv3 ConvNeXt", ("dinov3_convnext",), "facebook/dinov3-convnext-tiny-pretrain-lvd1689m", "stages"),
    Family("ViT", ("vit",), "google/vit-base-patch16-224-in21k"),
    Family("ViT from MAE weights", ("vit_mae",), "facebook/vit-mae-base", loads_as="ViTModel"),
    Family("CLIP", ("clip", "clip_vision_model"), "openai/clip-vit-base-patch16", loads_as="CLIPVisionModel"),
    Family("SigLIP", ("siglip", "siglip_vision_model"), "google/siglip-base-patch16-224", loads_as="SiglipVisionModel"),
    Family("BEiT", ("beit",), "microsoft/beit-base-patch16-224-pt22k"),
    Family("DeiT", ("deit",), "facebook/deit-base-distilled-patch16-224"),
    Family("Swin", ("swin",), "microsoft/swin-tiny-patch4-window7-224", "stages"),
    Family("Swin v2", ("swinv2",), "microsoft/swinv2-tiny-patch4-window8-256", "stages"),
    Family("ConvNeXt", ("convnext",), "facebook/convnext-tiny-224", "stages"),
    Family("ConvNeXt v2", ("convnextv2",), "facebook/convnextv2-tiny-22k-224", "stages"),
    Family("ResNet", ("resnet",), "microsoft/resnet-50", "stages"),
    Family("PVT v2", ("pvt_v2",), "OpenGVLab/pvt_v2_b0", "stages"),
)
"""What `simomerge encoders` lists. Other vision transformers work too if their blocks are found."""


def family_of(model_type: str) -> Family | None:
    """The family of a config's ``model_type``.

    Example:
        >>> family_of("siglip_vision_model").title
        'SigLIP'
    """
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def unknown_encoder(source: str, model_type: str) -> InputError:
    """The error for a model outside these families; it names the model types with similar names."""
    types = [name for family in FAMILIES for name in family.model_types]
    near = difflib.get_close_matches(model_type, types, 3, 0.5)
    hint = f" Similar names: {', '.join(near)}." if near else ""
    return InputError(
        f"{source}: model type {model_type!r} is no vision encoder that can be read here.{hint}"
        " `simomerge encoders` lists all."
    )
