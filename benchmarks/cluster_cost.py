"""What training and alignment on many GPUs would cost: computed from a model, not measured.

    python benchmarks/cluster_cost.py
    python benchmarks/cluster_cost.py --encoder g --images 1e8 --network 25 --disk 5

For every number of GPUs, the time of each resource is computed as if it were the only limit (a roofline). The largest
of them is the time of the work, and the resource that needs it saturates first.

- **products**: floating-point operations / (GPUs x peak x utilisation). A forward pass takes 2 operations per weight
  and token, plus 4 N^2 C per block for attention over N tokens of C channels; a backward pass takes twice that.
- **network**: bytes that each GPU sends per step / bandwidth. DistributedDataParallel sends 2 (G - 1) / G times the
  gradients. FSDP2 collects the weights in the forward and the backward pass and reduces the gradients: 3 (G - 1) / G
  times. Up to eight GPUs are one machine with the faster link.
- **disk**: bytes of the images / bandwidth of the shared storage, which does not grow with the GPUs.
- **decoding**: seconds of one core per image / cores, of which each GPU has some.

All assumptions are options, and their defaults are printed above the table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

ENCODERS = {"B": (768, 12), "L": (1024, 24), "g": (1536, 40)}
"""Channels and blocks of ViT-B, ViT-L and ViT-g."""
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Cluster:
    """What one GPU has, and what all share.

    Args:
        peak: TFLOP/s of dense products in bfloat16.
        utilisation: Part of the peak that a ViT reaches.
        link: GB/s that a GPU sends inside its machine.
        network: GB/s that a GPU sends to other machines.
        disk: GB/s that all GPUs read together.
        cores: Cores per GPU.
    """

    peak: float
    utilisation: float
    link: float
    network: float
    disk: float
    cores: float


@dataclass(frozen=True)
class Encoder:
    """A plain vision transformer.

    Args:
        channels, blocks: Its size.
        tokens: Tokens per image.
    """

    channels: int
    blocks: int
    tokens: int

    @property
    def weights(self) -> float:
        return 12.0 * self.channels**2 * self.blocks

    @property
    def forward(self) -> float:
        """Operations of a forward pass of one image."""
        attention = 4.0 * self.tokens**2 * self.channels * self.blocks
        return 2.0 * self.weights * self.tokens + attention


def sent(work: str, encoder: Encoder, gpus: int, images: float, given: argparse.Namespace) -> float:
    """Bytes that each GPU sends for all images: gradients twice per step, and with ``--shard`` weights too."""
    steps = images / (given.batch * gpus)
    return steps * {"train": 2.0, "train --shard": 3.0}.get(work, 0.0) * 4 * encoder.weights * (gpus - 1) / gpus


def seconds(
    work: str, encoder: Encoder, cluster: Cluster, gpus: int, images: float, given: argparse.Namespace
) -> dict[str, float]:
    """Resource -> seconds that it alone would need for all images."""
    passes = {"fold": 1.0 + given.experts, "evaluate": 1.0, "train": 3.0, "train --shard": 3.0}[work]
    link = cluster.link if gpus <= 8 else cluster.network
    return {
        "products": images * passes * encoder.forward / (gpus * cluster.peak * 1e12 * cluster.utilisation),
        "network": sent(work, encoder, gpus, images, given) / (link * 1e9),
        "disk": images * given.image_kb * 1e3 / (cluster.disk * 1e9),
        "decoding": images * given.decode_ms / 1e3 / (gpus * cluster.cores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=list(ENCODERS), default="L")
    parser.add_argument("--images", type=float, default=1e8)
    parser.add_argument("--tokens", type=int, default=257, help="224 x 224 pixels, patches of 14, and CLS")
    parser.add_argument("--batch", type=int, default=32, help="images per GPU and step")
    parser.add_argument("--experts", type=int, default=3, help="experts whose features the fold needs")
    parser.add_argument("--image-kb", type=float, default=110.0, help="mean size of a stored image")
    parser.add_argument("--decode-ms", type=float, default=8.0, help="one core's time to decode and resize an image")
    parser.add_argument("--peak", type=float, default=990.0, help="TFLOP/s of an H100 in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--link", type=float, default=450.0, help="GB/s inside a machine (NVLink)")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s per GPU between machines (400 Gbit/s)")
    parser.add_argument("--disk", type=float, default=20.0, help="GB/s of the shared storage")
    parser.add_argument("--cores", type=float, default=12.0, help="cores per GPU")
    given = parser.parse_args()
    encoder = Encoder(*ENCODERS[given.encoder], given.tokens)
    cluster = Cluster(given.peak, given.utilisation, given.link, given.network, given.disk, given.cores)
    print(f"Computed, not measured: ViT-{given.encoder}, {given.images:.0e} images, {vars(given)}\n")
    print(f"Read from the storage: {given.images * given.image_kb / 1e9:.0f} TB.\n")
    print("| work | GPUs | hours | saturates first | products | network | disk | decoding | TB sent per GPU |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for work in ("fold", "evaluate", "train", "train --shard"):
        for gpus in GPUS:
            found = seconds(work, encoder, cluster, gpus, given.images, given)
            first = max(found, key=lambda name: found[name])
            hours = " | ".join(f"{value / 3600:.2f}" for value in found.values())
            moved = sent(work, encoder, gpus, given.images, given) / 1e12
            print(f"| {work} | {gpus} | {found[first] / 3600:.2f} | {first} | {hours} | {moved:.0f} |")


if __name__ == "__main__":
    main()
