"""Attention kernels of another size, and 2-D ones made 1-D.

The depth-wise convolutions of a gate are together one dense kernel for each
channel, of which their weights are the factors (see `lska_mm.models.lska`).
Sizes with the same dilation have the same local part, so that zeros at both
ends of the far part make of one size a larger one that is the same function.
What cannot be the same is fitted by least squares.
"""

from .pretrained import ResizedPretrained
from .resize import resize_kernels, summarize_errors
from .separate import separate_kernels

__all__ = ['ResizedPretrained', 'resize_kernels', 'separate_kernels', 'summarize_errors']
