"""FSDP: parameters, gradients and optimizer state are divided among devices, for models too large for one device."""

from __future__ import annotations

import copy
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, distributed
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scfm.models.network import CellTransformer
from scfm.train.checkpoints import META
from scfm.train.config import FitConfig
from scfm.train.precision import training_device
from scfm.train.ranks import backend_for, rank_and_world_size


def make_strategy(config: FitConfig, *, resumes_shards: bool = False) -> Strategy | str:
    """Return Lightning's strategy for the settings. A run with sharded checkpoints is resumed with sharding."""
    world_size = rank_and_world_size(config)[1]
    if config.strategy == "fsdp" or resumes_shards:
        return ShardedStrategy(world_size, backend_for(training_device(config)))
    return "ddp" if world_size > 1 else "auto"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes. Checkpoints are directories of shards, written while training continues.

    A checkpoint is written under a temporary name and renamed when all processes have written their shards. So a checkpoint
    with its final name is complete.
    """

    def __init__(self, world_size: int, backend: str) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, process_group_backend=backend)
        self._writing: Future | None = None
        self._writers: Any = None  # a separate process group, because two threads cannot share a gloo group

    def setup_environment(self) -> None:
        super().setup_environment()
        self._writers = distributed.new_group(backend="gloo")

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any = None
    ) -> None:
        self.finish_writing()
        path = Path(self.broadcast(str(filepath)))
        temporary_path = path.with_name(f".{path.name}.partial")
        state = {"state_dict": checkpoint.pop("state_dict")}
        optimizers = checkpoint.pop("optimizer_states", [])
        state |= {f"optimizer_{number}": optimizer for number, optimizer in enumerate(optimizers)}
        if self.is_global_zero:
            shutil.rmtree(temporary_path, ignore_errors=True)
            temporary_path.mkdir(parents=True)
            torch.save(checkpoint, temporary_path / META)
        self.barrier()
        writing: Any = distributed_checkpoint.async_save(
            state, checkpoint_id=temporary_path, process_group=self._writers
        )
        # The first process writes the list of all shards after all processes have written theirs.
        self._writing = _then_renamed(writing, temporary_path, path) if self.is_global_zero else writing

    def finish_writing(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def teardown(self) -> None:
        self.finish_writing()
        super().teardown()


def _then_renamed(writing: Future, temporary_path: Path, path: Path) -> Future:
    """Return a future that is done when the checkpoint is written and renamed."""
    renamed: Future = Future()

    def rename(written: Future) -> None:
        try:
            written.result()
            shutil.rmtree(path, ignore_errors=True)
            temporary_path.rename(path)
        except BaseException as error:
            renamed.set_exception(error)
        else:
            renamed.set_result(None)

    writing.add_done_callback(rename)
    return renamed


def is_sharded(strategy: Strategy | str) -> bool:
    return isinstance(strategy, ShardedStrategy)


def shard(module: lightning.LightningModule, network: CellTransformer) -> None:
    """Shard each block, and the rest of the module, over the devices of its strategy."""
    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


class GatherShards(lightning.Callback):
    """Train a copy of the network, because FSDP shards permanently, and copy the weights to the original at the end."""

    def __init__(self, network: CellTransformer) -> None:
        self.original, self.copy = network, copy.deepcopy(network)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.original.load_state_dict({name: _gathered(each).cpu() for name, each in self.copy.state_dict().items()})


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_shards(path: Path) -> bool:
    """Whether a checkpoint is a directory of shards."""
    return path.is_dir() and (path / META).is_file()


def joined_weights(path: Path, scratch: Path) -> dict[str, Tensor]:
    """Weights from a directory of shards, by their names in the training module. All processes must call this."""
    if distributed.is_initialized():
        distributed.barrier()  # wait until the first process has renamed the directory
    joined = scratch / "joined.pt"
    dcp_to_torch_save(path, joined)
    content = torch.load(joined, map_location="cpu", weights_only=True)
    joined.unlink()
    return content["state_dict"]
