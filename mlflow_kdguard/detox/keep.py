"""Finished steps on disk, as tensors only."""

from collections.abc import Mapping

from torch import Tensor, nn

from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.files import write_bytes


def keep(state: State, work: Work, name: str, modules: Mapping[str, nn.Module], what: str) -> None:
    """Write the modules' tensors to `NN-name.what.safetensors` in the folder, whole or not at all.

    Raises UsageError where the folder cannot be written. Does nothing without a folder.
    """
    if work.folder is None:
        return
    from safetensors.torch import save

    tensors = {
        f"{module}.{key}" if module else key: _plain(value)
        for module, each in modules.items()
        for key, value in each.state_dict().items()
    }
    write_bytes(work.folder / f"{state.place:02d}-{name}.{what}.safetensors", save(tensors))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
