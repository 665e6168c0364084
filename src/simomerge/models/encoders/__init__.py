"""Foundation encoders behind one interface: images -> Features."""

from simomerge.models.encoders.adapters import Adapters
from simomerge.models.encoders.custom import CustomEncoder, ImageEncoder
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.families import FAMILIES
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.loading import load_backbone, load_encoder

__all__ = [
    "FAMILIES",
    "Adapters",
    "CustomEncoder",
    "Encoder",
    "Features",
    "ImageEncoder",
    "load_backbone",
    "load_encoder",
]
