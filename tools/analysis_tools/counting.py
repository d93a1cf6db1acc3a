"""Count the operations and the memory of a model, without measuring."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lska_mm import LSKAVAN

CLASSES = 1000


def multiply_adds(model: nn.Module, image: torch.Tensor) -> int:
    """Count those of convolutions and matrix products, in inference, without computing."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model).to('meta')(image.to('meta'))
    return counter.get_total_flops() // 2


def saved_bytes(model: nn.Module, image: torch.Tensor) -> int:
    """Count the bytes kept for the backward pass, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: unique addresses
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = model(image)
    del outs
    return sum(size for size, _ in kept.values())


class Classifier(nn.Module):
    """The backbone with a linear head."""

    def __init__(self, arch: str, kernel_size: int, attention: str):
        super().__init__()
        self.backbone = LSKAVAN(arch, kernel_size, attention)
        self.head = nn.Linear(self.backbone.arch['embed_dims'][-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((2, 3)))


def count_costs(model: Classifier, size: tuple[int, int]) -> dict[str, int]:
    """Count parameters, and multiply-adds for an image."""
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds(model.eval(), torch.empty(1, 3, *size)),
    )
