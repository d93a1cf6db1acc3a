"""What makes a GPU wait, CUDA graphs, compiled graphs, and ONNX."""

import contextlib
import io

import pytest
import torch

from conftest import trained

from .conftest import assert_close, assert_close_gradients, gradients, on, wave


@contextlib.contextmanager
def no_synchronization(device):
    """Make waiting for the GPU an error."""
    mode = torch.cuda.set_sync_debug_mode if device.type == 'cuda' else lambda _: None
    mode('error')
    try:
        yield
    finally:
        mode('default')


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('with_cp', [False, True])
def test_nothing_waits_for_the_gpu(device, build, images, with_cp, dtype):
    backbone = build(with_cp=with_cp, drop_path_rate=0.1).train().to(device)
    images = images.to(device)
    gradients(backbone, images)  # what is only made once
    with no_synchronization(device):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is not None):
            outs = backbone(images)
        sum(out.float().mean() for out in outs).backward()
    with no_synchronization(device), torch.no_grad():
        backbone.eval()(images)


@pytest.mark.parametrize('deploy', [False, True])
def test_graph_of_inference(device, build, images, deploy):
    backbone = build().to(device)
    if deploy:
        backbone.switch_to_deploy()
    images = images.to(device)
    with torch.no_grad():
        expected = backbone(images)
        placeholder = torch.zeros_like(images)
        run = capture(lambda: backbone(placeholder), device)
        placeholder.copy_(images)
        assert_close(run(), expected, 1e-5)


def capture(function, device):
    """A CUDA graph of what a function does; on a CPU the function."""
    if device.type == 'cpu':
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay():
        graph.replay()
        return out

    return replay


def test_graph_of_training(device, build, images):
    """PyTorch's own function for parts of a training."""
    images = images.to(device)
    backbone = build().to(device)
    expected = gradients(on(device, backbone), images)  # in evaluation: capturing counts batches
    if device.type == 'cuda':
        backbone = torch.cuda.make_graphed_callables(backbone, (images.clone(),))
    assert_close_gradients(gradients(backbone, images), expected, 5e-3)


@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_compiled(device, images, mode):
    """A small one: to compile a whole one takes a minute."""
    how = dict(mode=mode) if device.type == 'cuda' else dict(backend='aot_eager')
    images = images.to(device)
    with torch.no_grad():
        backbone = trained().to(device)
        expected = backbone(images)
        run = torch.compile(backbone, fullgraph=True, **how)
        for _ in range(3):  # the third is the one that is replayed
            found = [out.clone() for out in run(images)]
        assert_close(found, expected, 1e-4)

    backbone = trained().train().to(device)
    expected = gradients(on(device, backbone), images)
    run = torch.compile(on(device, backbone), fullgraph=True, dynamic=False, **how)
    for _ in range(3):
        run.zero_grad()
        sum((out * wave(out)).mean() for out in run(images)).backward()
    found = {name.removeprefix('_orig_mod.'): p.grad.cpu() for name, p in run.named_parameters()}
    assert_close_gradients(found, expected, 5e-3)


def test_onnx(device, build, images):
    pytest.importorskip('onnx')
    from torch.onnx.utils import export

    backbone, file = build().to(device), io.BytesIO()
    backbone.switch_to_deploy()
    export(backbone, (images.to(device),), file, opset_version=17)
    assert file.tell() > 4 * sum(p.numel() for p in backbone.parameters())
