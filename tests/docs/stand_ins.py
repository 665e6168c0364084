"""Writes small random models of the architectures of docs/tutorials/hub-models.md into the current folder."""

from pathlib import Path

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, Dinov2Model

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70, "mlp_ratio": 2}
NAMES = ("wall", "floor", "cat")

torch.manual_seed(0)
base = Dinov2Model(Dinov2Config(**SIZE, patch_size=14))
base.save_pretrained("dinov2")
config = DepthAnythingConfig(
    backbone_config=Dinov2Config(**SIZE, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False),
    reassemble_hidden_size=32,
    patch_size=14,
    head_hidden_size=8,
    neck_hidden_sizes=[8, 12, 16, 24],
    fusion_hidden_size=16,
)
model = DepthAnythingForDepthEstimation(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.head.conv3.bias.fill_(1)  # so that its depths are not all zero
    start = dict(base.named_parameters())
    for name, value in model.backbone.named_parameters():
        value.copy_(start[name] + 0.01 * torch.randn_like(value))
model.save_pretrained("anything")
head = {"bn.weight": torch.ones(128), "bn.bias": torch.zeros(128), "bn.running_mean": torch.zeros(128)}
head |= {"bn.running_var": torch.ones(128), "bn.num_batches_tracked": torch.tensor(1)}
head |= {"conv_seg.weight": torch.randn(3, 128, 1, 1), "conv_seg.bias": torch.zeros(3)}
state = {f"decode_head.{name}": value for name, value in head.items()}
torch.save({"state_dict": state}, "dinov2_vits14_ade20k_ms_head.pth")
Path("ade20k.txt").write_text(",".join(NAMES), encoding="utf-8")
