"""Count the launches and copies of training steps, or of embedding, on a pretended GPU; prints one line of JSON for each.

    LD_PRELOAD=device.so PYTHONPATH=.:tests/pretended:tests/ops python tests/pretended/step.py '[["masked", "bf16-mixed", 8, 64]]'

A job is a case, a precision, a number of cells and the tokens of the longest. The library is compiled from `device.cpp`; it must
be there before torch asks, once, whether there is a GPU.
"""

import contextlib
import json
import sys

import device
import numpy as np
import stand_ins
import torch

import scfm
from scfm import objectives
from scfm.encoding import EncodingConfig
from scfm.encoding.build import ENCODINGS
from scfm.families import choose_preset
from scfm.ops import engines, torch_kernels
from scfm.ops.reference import attention as reference
from scfm.train import FitConfig
from scfm.train.module import TrainingModule
from scfm.train.steps import pinned

N_GENES = 300
# Preset, encoding and objective; the rows of docs/limits.md.
CASES = {
    "masked": ("large", "rank", None),
    "bin": ("large", "bin", None),
    "generative": ("large", "bin", "generative"),
    "scgpt-human": ("scgpt-human", None, None),
    "scbert": ("scbert", None, None),
    "inference": ("large", "rank", None),
}
SMALL = {"d_model": 32, "n_heads": 2, "d_ff": 32}


def make(case, n_cells, length):
    """Network, objective and cells of one case: its layers, small."""
    name, kind, objective = CASES[case]
    preset = choose_preset(name, encoding=kind, objective=objective)
    config = EncodingConfig(**preset.encoding)
    special = ["pad", "mask", *(role for role in ("cls", "eos") if getattr(config, f"add_{role}"))]
    vocabulary = scfm.Vocabulary.from_genes([f"G{number}" for number in range(N_GENES)], special=special)
    medians = np.full(len(vocabulary), np.nan)
    medians[vocabulary.gene_ids] = 1.0
    encoding = ENCODINGS[config.kind](config, vocabulary, **({"medians": medians} if config.kind == "rank" else {}))
    torch.manual_seed(0)
    settings = preset.model_config(n_tokens=len(vocabulary), pad_id=vocabulary.pad_id, **SMALL)
    network = scfm.models.CellTransformer.for_vocabulary(settings, vocabulary)
    rng = np.random.default_rng(0)
    lengths = np.maximum(3, length - np.arange(n_cells) % 5)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([rng.choice(vocabulary.gene_ids, n, replace=False) for n in lengths]).astype(np.int32)
    if config.add_cls:
        ids[bounds[:-1]] = vocabulary.special_id("cls")
    values = rng.integers(1, 5, len(ids)).astype(np.float32)
    cells = scfm.CellBatch(
        gene_ids_T=torch.from_numpy(ids),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        values_T=None if config.kind == "rank" else torch.from_numpy(values),
        cell_index_B=torch.arange(n_cells),
    )
    return network, objectives.make_objective(preset.objective, network, encoding), cells


def operators():
    """The operators of scfm that are Python, by name."""
    options = torch_kernels.KernelOptions

    def forward(q, k, v, *rest):
        return torch_kernels.forward(q, k, v, options(*rest))

    def backward(grad_out, grad_lse, q, k, v, out, lse, *rest):
        return torch_kernels.backward(grad_out, grad_lse, q, k, v, out, lse, options(*rest))

    return {
        "kernel_attention_forward": forward,
        "kernel_attention_backward": backward,
        "torch_attention_forward": reference.forward,
        "torch_attention_backward": reference.backward,
    }


def summary(count):
    return {
        "launches": sum(count.kernels.values()),
        "blocking": dict(count.blocking),
        "sent": sum(count.sent.values()),
        "mixes": dict(count.mixes),
        "kernels": dict(count.kernels.most_common()),
    }


def measure(case, precision, n_cells, length):
    network, objective, cells = make(case, n_cells, length)
    batch = pinned(objective.corrupt(cells, torch.Generator().manual_seed(0)))
    module = TrainingModule(network, objective, FitConfig())
    device.moved(network).train(case != "inference")
    autocast = torch.autocast("cuda", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    count, found = device.Count(operators()), {}
    with count:
        if case == "inference":
            with torch.no_grad(), autocast:
                network.embed_cells(cells.to("cuda"))
            return {"forward": summary(count)}
        inputs, targets = module.transfer_batch_to_device(batch, device.CUDA, 0)
        with autocast:
            loss = objectives.total(objective.loss(network, inputs, targets))
        found["forward"] = summary(count)
        count.clear()
        loss.backward()
        found["backward"] = summary(count)
    return found


def main(jobs):
    torch.set_num_threads(1)
    device.believe()
    aten = stand_ins.from_definition()
    for name, function in vars(aten).items():
        if callable(function):
            setattr(aten, name, device.on_host(function))
    engines.ATEN = aten
    torch_kernels.is_trusted = lambda *_: True
    for job in json.loads(jobs):
        sys.stdout.write(json.dumps(measure(*job)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
