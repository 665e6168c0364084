"""Foundation encoders behind one interface: images -> Features."""

from simomerge.encoders.adapters import Adapters
from simomerge.encoders.base import Encoder, default_taps, load_backbone, load_encoder
from simomerge.encoders.features import Features

__all__ = ["Adapters", "Encoder", "Features", "default_taps", "load_backbone", "load_encoder"]
