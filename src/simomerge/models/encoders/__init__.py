"""Foundation encoders behind one interface: images -> Features."""

from simomerge.models.encoders.adapters import Adapters
from simomerge.models.encoders.encoder import Encoder, default_taps
from simomerge.models.encoders.families import FAMILIES
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.loading import load_backbone, load_encoder
from simomerge.models.encoders.own import ImageEncoder, OwnEncoder

__all__ = [
    "FAMILIES",
    "Adapters",
    "Encoder",
    "Features",
    "ImageEncoder",
    "OwnEncoder",
    "default_taps",
    "load_backbone",
    "load_encoder",
]
