"""How the owner of a pickled model turns it into a file that can be loaded without trust."""

import shlex
from pathlib import Path

_LINES = """\
{name} can only be opened by running what is stored inside it, so it is never opened here.
Run this where the model was made (with its own code installed, and only if you trust the file):

    import torch
    from safetensors.torch import save_file

    net = torch.load({path!r}, map_location="cpu", weights_only=False)  # or joblib/pickle.load
    net = net.eval()

    # either: weights for an architecture that kdguard knows (kdguard teacher register --arch ...)
    weights = {{key: value.contiguous() for key, value in net.state_dict().items()}}
    save_file(weights, {safetensors!r})

    # or: the whole network as ONNX, which needs no architecture
    x = torch.zeros(2, C, H, W)  # the shape of your images; forward takes pixels in [0, 1]
    torch.onnx.export(net, (x,), {onnx!r}, opset_version=17,
                      input_names=["x"], output_names=["logits"],
                      dynamic_axes={{"x": {{0: "N"}}, "logits": {{0: "N"}}}},
                      dynamo=False)  # before torch 2.5: leave dynamo out

Then register the result:

    kdguard teacher register NAME --weights {argument}
"""


def conversion_advice(path: Path) -> str:
    """The lines to run in the owner's own environment, for a model that is a pickle."""
    return _LINES.format(
        name=path.name if path.name.isprintable() else repr(path.name),
        path=str(path),
        safetensors=str(path.with_suffix(".safetensors")),
        onnx=str(path.with_suffix(".onnx")),
        argument=shlex.quote(str(path.with_suffix(".onnx"))),
    )


def remedy(where: str) -> str:
    """The same in one line, for an error message."""
    return (
        f"Convert it where it is trusted: `kdguard teacher import {shlex.quote(where)}` prints the "
        "lines (torch.load(..., weights_only=False) there, then save_file(net.state_dict(), "
        "'weights.safetensors') or torch.onnx.export)."
    )
