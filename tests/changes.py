"""What people do to a module of a built network: most double what it returns.

Each changes the module, or returns another one for its place, which `apply` puts there.
"""

import warnings

from torch import nn
from torch.nn.utils import parametrize, prune


def apply(change, model, name):
    path, _, last = name.rpartition('.')
    new = change(model.get_submodule(name))
    if new is not None:
        setattr(model.get_submodule(path), last, new)


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_before(module):
    module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replaced_forward(module):
    module.forward = lambda x: 2 * type(module).forward(module, x)


def of_a_subclass(module):
    kind = type(module)
    doubled = dict(forward=lambda self, x: 2 * kind.forward(self, x))
    module.__class__ = type('Subclass', (kind,), doubled)


class Adapter(nn.Module):
    """Takes the place of a module, as LoRA's layers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def pruned(conv):
    prune.l1_unstructured(conv, 'weight', 0.4)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(conv):
    parametrize.register_parametrization(conv, 'weight', Twice())


def weight_normed(conv):
    """By hooks, as in older code."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nn.utils.weight_norm(conv)
    conv.weight_g.data.mul_(2)


def without_bias(conv):
    conv.bias = None
