"""Fine-tuning the shape of Geneformer V2-104M with low-rank updates: scfm next to transformers + peft.

    SCFM_DATA=FOLDER python benchmarks/finetune.py --steps 4

Both have random weights of 12 layers, width 768, 12 heads and a context of 4,096 tokens, updates of rank 8 on every linear layer of
every block, a head for the cell types of PBMC 3k, AdamW and bfloat16 autocast. They take the same steps over the same cells, whole, with
cells of one length together. Each runs in a process of its own, which gives its peak memory; the steps alternate, so that both meet
the same load of the machine. `pip install peft` first.
"""

import argparse
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

import scfm

RANK = 8
RATE = 5e-4
PRESET = "geneformer-v2-104m"
LINEAR_LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
CONTENDERS = ("scfm", "transformers + peft")


def read_cells(n_cells: int) -> tuple[scfm.encoding.Encoding, scfm.CellBatch, int]:
    """Encode labeled cells of PBMC 3k as Geneformer V2 does, by its published dictionaries."""
    folder = Path(os.environ["SCFM_DATA"])
    stem = folder / "vocab" / "geneformer_{}_gc95M.pkl"
    vocabulary = scfm.encoding.read_vocabulary(
        str(stem).format("token_dictionary"), aliases=str(stem).format("gene_name_id_dict")
    )
    medians = scfm.encoding.read_medians(str(stem).format("gene_median_dictionary"), vocabulary)
    settings = scfm.EncodingConfig(**scfm.families.preset(PRESET).encoding)
    encoding = scfm.encoding.make_encoding(settings, vocabulary=vocabulary, medians=medians)
    adata = anndata.read_h5ad(folder / "pbmc3k_raw_counts_labels.h5ad")
    adata = adata[adata.obs["cell_type_seurat"].notna().to_numpy()]
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:n_cells]].copy()
    codes = pd.Categorical(adata.obs["cell_type_seurat"].astype(str)).codes.astype(np.int64)
    cells = scfm.pp.encode(adata, encoding).replace(labels_B=torch.from_numpy(codes))
    return encoding, cells, int(codes.max()) + 1


def batches_of(cells: scfm.CellBatch, n_cells: int) -> Iterator[scfm.CellBatch]:
    """Batches of neighbors in length, in a random order of batches, for ever."""
    order = torch.argsort(cells.lengths_B).split(n_cells)
    rng = np.random.default_rng(0)
    while True:
        for number in rng.permutation(len(order)).tolist():
            yield cells.select(order[number])


def build_scfm(encoding: scfm.encoding.Encoding, n_classes: int) -> Callable[[scfm.CellBatch], torch.Tensor]:
    config = scfm.families.preset(PRESET).model_config(pad_id=encoding.vocabulary.pad_id)
    network = scfm.models.CellTransformer.for_vocabulary(config, encoding.vocabulary)
    network.add_class_head(n_classes)
    scfm.train.set_trainable(network, f"lora:{RANK}")
    objective = scfm.objectives.Classification()
    network.train()

    def loss_of(cells: scfm.CellBatch) -> torch.Tensor:
        inputs, targets = objective.corrupt(cells, torch.Generator())
        return scfm.objectives.total(objective.loss(network, inputs, targets))

    loss_of.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
    return loss_of


def build_transformers(encoding: scfm.encoding.Encoding, n_classes: int) -> Callable[[scfm.CellBatch], torch.Tensor]:
    import peft
    import transformers

    shape = scfm.families.preset(PRESET).model_config()
    config = transformers.BertConfig(
        vocab_size=len(encoding.vocabulary),
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        intermediate_size=shape.d_ff,
        max_position_embeddings=shape.context_length,
        hidden_act="relu",
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        pad_token_id=encoding.vocabulary.pad_id,
        num_labels=n_classes,
    )
    bert = peft.get_peft_model(
        transformers.BertForSequenceClassification(config),
        peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR_LAYERS),
    ).train()

    def loss_of(cells: scfm.CellBatch) -> torch.Tensor:
        lengths = cells.lengths_B.tolist()
        ids_BL = torch.nn.utils.rnn.pad_sequence(cells.gene_ids_T.long().split(lengths), batch_first=True)
        mask_BL = torch.arange(ids_BL.shape[1])[None] < cells.lengths_B[:, None]
        return bert(input_ids=ids_BL, attention_mask=mask_BL.long(), labels=cells.labels_B).loss

    loss_of.parameters = [parameter for parameter in bert.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
    return loss_of


BUILDERS = dict(zip(CONTENDERS, (build_scfm, build_transformers)))


def work(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Take one step for each message, and answer with its seconds, cells and loss; at the end with the peak memory."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoding, cells, n_classes = read_cells(options.cells)
    loss_of = BUILDERS[name](encoding, n_classes)
    optimizer = torch.optim.AdamW(loss_of.parameters, lr=RATE)  # type: ignore[attr-defined]
    batches = batches_of(cells, options.batch)
    pipe.send("ready")
    while pipe.recv() == "step":
        batch = next(batches)
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pipe.send((time.perf_counter() - started, len(batch), batch.n_tokens, float(loss)))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="cells per step")
    parser.add_argument("--steps", type=int, default=0, help="of each; 0 for one epoch")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=CONTENDERS)
    options = parser.parse_args()
    names = [options.only] if options.only else list(CONTENDERS)
    context = multiprocessing.get_context("spawn")
    pipes, steps = {}, {name: [] for name in names}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, options, theirs), daemon=True).start()
        theirs.close()  # else a process that dies would be waited for
        pipes[name].recv()
    for number in range((options.steps or -(-options.cells // options.batch)) + 1):
        for name in names:
            pipes[name].send("step")
            step = pipes[name].recv()
            if number:  # the first one warms up
                steps[name].append(step)
    rates = {}
    for name in names:
        pipes[name].send("stop")
        seconds, cells, tokens, losses = np.array(steps[name]).T
        rates[name] = cells.sum() / seconds.sum()
        print(
            f"{name}, {options.precision}: {rates[name]:.3f} cells/s ({tokens.sum() / seconds.sum():.0f} tokens/s) over {len(seconds)} "
            f"steps of {options.batch} cells, peak memory {pipes[name].recv():.2f} GB, last loss {losses[-1]:.3f}"
        )
    if len(names) == 2:
        print(f"scfm takes {rates[names[0]] / rates[names[1]]:.2f} times as many cells per second")


if __name__ == "__main__":
    main()
