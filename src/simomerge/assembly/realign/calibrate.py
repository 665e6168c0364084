"""Calibrate: corrects the linear layers of the merged encoder in closed form, from unlabelled images.

Layers are calibrated in the order in which they run. Let x be what a layer of the merged encoder receives after the
layers before it are calibrated, x_t what the same layer of expert t receives, and W_t, b_t that expert's weights::

    y_t = W_t (mix x_t + (1 - mix) x) + b_t
    argmin_{W, b}  mean_t sum_n || y_t[n] - W x[n] - b ||^2 + ridge || W - W_0 ||^2

W_0 are the merged weights. All experts see the same images, so the mean over tasks is one regression of the mean
target, and with a mix of 0 the solution without a ridge is the mean of the experts' layers. FeatCal has one set of
images per task, places the centre of the ridge on the line through base and merged weights, and calibrates layer norms
too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.assembly.realign.method import Inputs, Realignment, register, rounded
from simomerge.core.registry import parameter

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel


@register("calibrate", "FeatCal (2026), adapted", "https://arxiv.org/abs/2605.13030")
@dataclass(frozen=True)
class Calibrate(Realignment):
    """Calibrate the linear layers inside the encoder to the mean of the experts' layers, in closed form.

    The heads stay as they are, so a fold may follow. The inputs of one block are in memory for all images at once.
    """

    teacher: ClassVar[str] = "experts"
    default_count: ClassVar[int] = 256
    changes_heads: ClassVar[bool] = False

    mix: float = parameter(
        1.0, low=0, high=1, help="Share of the expert's own input in what its layer is shown; the rest is merged."
    )
    ridge: float | str = parameter(
        "auto",
        kind=float,
        low=0,
        words=("auto", "none"),
        help="Shrinkage towards the merged weights, in units of the mean variance; auto chooses it for each layer.",
    )
    images_at_once: int = parameter(32, low=1, resource=True, help="Images per batch.")

    @property
    def phrase(self) -> str:
        return "calibrating the layers of its encoder"

    @property
    def encoder_change(self) -> str:
        return "calibration"

    def check_encoder(self, encoder: Encoder) -> None:
        from simomerge.assembly.realign.layers import check_layers

        check_layers(encoder)

    def change(self, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        from simomerge.assembly.realign.layers import Calibration
        from simomerge.assembly.realign.training import check_no_adapters

        check_no_adapters(model)
        calibration = Calibration(model, inputs.experts, self.mix, math.inf if self.ridge == "none" else self.ridge)
        images = inputs.images.readable()
        fits = calibration.run(images, self.images_at_once)
        return {
            "unlabelled_images": len(images),
            "layers_changed": sum(math.isfinite(fit.ridge) for fit in fits.values()),
            "error_before": _mean([fit.before for fit in fits.values()]),
            "error": _mean([fit.after for fit in fits.values()]),
        }


def _mean(values: list[float]) -> float | None:
    """The mean, or None without images that are held out."""
    return rounded(sum(values) / len(values)) if values else None
