"""Foundation encoders behind one interface: images -> Features."""

from simomerge.models.encoders.custom import CustomEncoder, ImageEncoder
from simomerge.models.encoders.encoder import Encoder
from simomerge.models.encoders.features import Features
from simomerge.models.encoders.loading import load_backbone, load_encoder
from simomerge.models.encoders.tree import TreeEncoder

__all__ = ["CustomEncoder", "Encoder", "Features", "ImageEncoder", "TreeEncoder", "load_backbone", "load_encoder"]
