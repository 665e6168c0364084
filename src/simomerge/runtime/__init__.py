"""Run exported models without torch: ``Scene("scene.onnx").predict(frame)``."""

from simomerge.runtime.golden import MEASURES, check, compare, difference, golden_file
from simomerge.runtime.scene import FORMAT, Maps, Scene, checksum, read_picture, resized, video_frames

__all__ = [
    "FORMAT",
    "MEASURES",
    "Maps",
    "Scene",
    "check",
    "checksum",
    "compare",
    "difference",
    "golden_file",
    "read_picture",
    "resized",
    "video_frames",
]
