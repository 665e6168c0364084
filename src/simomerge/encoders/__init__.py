"""Foundation encoders behind one interface: images -> Features."""

from simomerge.encoders.adapters import Adapters
from simomerge.encoders.encoder import Encoder, default_taps
from simomerge.encoders.families import FAMILIES
from simomerge.encoders.features import Features
from simomerge.encoders.loading import load_backbone, load_encoder
from simomerge.encoders.own import ImageEncoder, OwnEncoder

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
