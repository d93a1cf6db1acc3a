"""Outputs and gradients of a GPU against those of a CPU."""

import pytest
import torch

from conftest import published, reference_error, reference_image
from lska_mm import LSKA
from lska_mm.models.lska import ATTENTIONS

from .conftest import assert_close, assert_close_gradients, gradients, on


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(('arch', 'k'), [('tiny', 7), ('tiny', 23), ('small', 35)])
def test_published_outputs(device, arch, k, deploy):
    backbone = published(arch, k).to(device)
    if deploy:
        backbone.switch_to_deploy()
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            stages = backbone(reference_image().to(device, memory_format=layout))
        assert reference_error([stage.cpu() for stage in stages], arch, k) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ('rows', 'columns', 'dilation'),
    [(1, 5, 1), (7, 1, 3), (3, 3, 1), (1, 17, 3), (21, 1, 3), (1, 31, 1)],
)
def test_kernels(rows, columns, dilation, dtype):
    """Without a GPU Triton's interpreter runs them: tests/test_fast/test_kernels.py."""
    from lska_mm.fast import kernels

    torch.manual_seed(0)
    shape, channels = (3, 160, 37, 41), 160
    x, grad = (torch.randn(shape, device='cuda').to(dtype, memory_format=torch.channels_last)
               for _ in range(2))  # fmt: skip
    weight, bias = (torch.randn(size, device='cuda')
                    for size in ((channels, 1, rows, columns), (channels,)))  # fmt: skip
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    padding = dilation * (rows // 2), dilation * (columns // 2)
    expected = torch.nn.functional.conv2d(*exact, 1, padding, dilation, channels)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for convolve in (kernels.convolve, torch.compile(kernels.convolve_in_graph)):
        found = convolve(*inputs, dilation)
        pairs = [(found, expected), *zip(torch.autograd.grad(found, inputs, grad), wanted)]
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        print(f'{dtype}, {rows} x {columns}: {" ".join(f"{error:.1e}" for error in errors)}')
        assert max(errors) <= max(1e-5, torch.finfo(dtype).eps)
    assert kernels.works(0)


@pytest.mark.gpu
def test_kernels_beyond_32_bits():
    from lska_mm.fast import kernels

    x = torch.zeros(1, 1500, 1500, 1024, device='cuda', dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x[:, :, -40:] = torch.rand(40, 1500, device='cuda', dtype=torch.bfloat16)
    weight, bias = torch.rand(1024, 1, 7, 1, device='cuda'), torch.rand(1024, device='cuda')
    with torch.no_grad():
        found = kernels.convolve(x, weight, bias, 3)[:, :, -30:]
        expected = kernels.convolve(x[:, :, -40:], weight, bias, 3)[:, :, -30:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize('deploy', [False, True])
def test_mixed_precision(device, deploy):
    """Of inference, and of the gradients that a loss scale would be applied to."""
    backbone = published().to(device)
    images = reference_image().to(device, memory_format=torch.channels_last)
    if deploy:
        backbone.switch_to_deploy()
    with torch.no_grad():
        expected = backbone(images)
    # torch 2.1 has no float16 on a CPU
    for dtype in [torch.bfloat16] + [torch.float16] * (device.type == 'cuda'):
        with torch.no_grad(), torch.autocast(device.type, dtype):
            assert_close(backbone(images), expected, 2e-2)
    if not deploy:
        for gradient in gradients(backbone.train(), images, dtype=torch.bfloat16).values():
            assert gradient.isfinite().all()


@pytest.mark.parametrize('k', [7, 23, 53, 65])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_gates(device, build, images, attention, k):
    backbone = build(attention=attention, kernel_size=k)
    with torch.no_grad():
        expected = backbone(images)
        found = on(device, backbone)(images.to(device))
        assert_close(found, expected, 1e-4)
        deployed = on(device, backbone)
        deployed.switch_to_deploy()
        assert_close(deployed(images.to(device)), expected, 1e-4)


def test_gradients(device, build, images):
    backbone = build().train()
    expected = gradients(backbone, images)
    assert_close_gradients(gradients(on(device, backbone), images.to(device)), expected, 5e-3)


def test_recomputing(device, build, images):
    """With paths and values that are dropped: the same ones are drawn again."""
    rates = dict(drop_path_rate=0.5, drop_rate=0.1, kernel_size=11)
    once, again = build(**rates), build(**rates, with_cp=True)
    again.load_state_dict(once.state_dict())
    images = images.to(device)
    expected, found = (gradients(on(device, model.train()), images) for model in (once, again))
    assert_close_gradients(found, expected, 5e-3)
    other = gradients(on(device, once), images, seed=1)
    assert any(not torch.equal(other[name], expected[name]) for name in other)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_batch_of_nothing(device, attention):
    """As in a RoI head without a positive region; all of the backbone in evaluation, too."""
    gate = LSKA(8, attention=attention).to(device)
    x = torch.empty(0, 8, 7, 7, device=device, requires_grad=True)
    gate(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.abs().sum() == 0 for p in gate.parameters())


def test_backbone_of_nothing(device, build):
    backbone = build().to(device)
    images = torch.empty(0, 3, 64, 64, device=device)
    outs = backbone(images)
    assert [len(out) for out in outs] == [0] * len(outs)
    sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize('side', [(33, 47), (64, 100), (1, 1)])
def test_odd_sizes(device, build, side):
    backbone = build()
    images = torch.rand(2, 3, *side)
    with torch.no_grad():
        expected = backbone(images)
        assert_close(on(device, backbone)(images.to(device)), expected, 1e-4)


@pytest.mark.parametrize('train', [False, True])
def test_layouts(device, build, images, train):
    """The outputs are the same in NCHW and channels_last, and in the layout of the images."""
    backbone = build().train(train).to(device)
    last = images.to(device)
    plain = last.contiguous()
    expected, found = backbone(plain), on(device, backbone)(last)
    assert_close(found, expected, 1e-4)
    assert all(out.is_contiguous() for out in expected)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in found)
    if train:
        wanted, given = (gradients(on(device, backbone), x) for x in (plain, last))
        assert_close_gradients(given, wanted, 5e-3)
