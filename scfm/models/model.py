"""`Model`: a network with its encoding, labels, calibration and scores."""

# Axes: B cells, T packed tokens, D model width, C classes.

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm.data.batch import CellBatch
from scfm.errors import ModelTaskError
from scfm.models.device import resolved_device
from scfm.models.inference import TOKENS_PER_BATCH, cell_bar, runs_of_tokens
from scfm.models.io.hub import fetched, push, save_pretrained
from scfm.models.io.load import load_saved
from scfm.models.io.save import save
from scfm.models.network import CellTransformer
from scfm.models.precision import in_bfloat16
from scfm.models.state import Calibration, ModelState, Precision, require_precision

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix


class Model(ModelState):
    """A trained network with its encoding, its labels and its scores, as the functions of `scfm.tl` and `scfm.pl` need it.

    Attributes
    ----------
    network
        The transformer, a `torch.nn.Module`.
    encoding
        The encoding: settings, vocabulary, medians.
    labels
        Names of the classes that the network predicts; empty if it was not trained to classify.
    calibration
        Temperatures for calibrated probabilities, and the threshold of the novelty score; None if the model was not
        calibrated.
    scores
        Rows of `report`; None if the model was fitted without labels.
    objective
        Name of the objective that the network was pretrained with, in `scfm.objectives`; None if it was not pretrained.
    checkpoint
        The published checkpoint that the model was read from, if any.
    history
        Record of the settings and losses of each training stage. It does not affect predictions.
    id
        Twelve hexadecimal digits, which are the same for models with the same weights, settings, vocabulary, medians, labels
        and calibration.
    device, n_parameters
        Device and number of parameters of the network.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> short = scfm.FitConfig(n_steps=2)
    >>> model = scfm.fit(
    ...     adata, labels_key="bulk_labels", config=short, pretrain_config=short, progress=False
    ... )
    >>> len(model.labels), model.encoding.config.kind
    (10, 'rank')
    >>> [stage["name"] for stage in model.history["stages"]]
    ['pretraining', 'fine-tuning']
    >>> model.embed(scfm.pp.encode(adata[:3], model)).shape
    (3, 128)
    """

    def to(self, device: torch.device | str) -> Model:
        """Move the network to a device, in place, and return the model."""
        self.network.to(resolved_device(device))
        return self

    def save(self, path: str | Path, *, precision: Precision = "fp32") -> None:
        """Write a directory of JSON and safetensors files; no pickle is written.

        The files are `config.json`, `vocabulary.json`, `weights.safetensors`, and, if the encoding has medians,
        `encoding.safetensors`.

        The directory is written under a temporary name and renamed at the end, so an interrupted call changes nothing.

        Parameters
        ----------
        path
            The directory. An existing saved model is replaced; other files and directories are never replaced.
        precision
            "bf16" writes all matrices in bfloat16, which halves the size of the file and keeps about three decimal digits. A
            model that is loaded from it computes in float32 as before, and has another `id`.

        Raises
        ------
        ModelFileError
            If `path` exists and is not a saved model, or if a weight is not finite.
        ValueError
            If `precision` is unknown.
        OSError
            If the directory cannot be written.

        Examples
        --------
        >>> import scfm
        >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
        >>> model.save("my_model")
        >>> scfm.load("my_model").id == model.id
        True
        """
        save(self, Path(path), precision=precision)

    def save_pretrained(
        self, path: str | Path, *, name: str | None = None, data: str | None = None, license: str | None = None
    ) -> None:
        """Save the model with a model card (`README.md`) that states training, scores, intended use and limits.

        Parameters
        ----------
        path
            Directory; `scfm.load` and `Model.from_pretrained` open it.
        name
            Title of the card; None for the directory's name.
        data, license
            For the card: a description of the training cells, and the license of the weights ("bsd-3-clause"). If they are
            None, the card says that they are not stated.

        Examples
        --------
        >>> import scfm
        >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
        >>> model.save_pretrained("my_blood_model", data="700 PBMC of 10x Genomics", license="bsd-3-clause")
        >>> scfm.Model.from_pretrained("my_blood_model").id == model.id
        True
        """
        save_pretrained(self, Path(path), name=name or Path(path).name, data=data, license=license)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
    ) -> Model:
        """Load a model in scfm's format from a directory or a repository on the Hugging Face Hub. No code in it is executed.

        `scfm.load` also loads published checkpoints of other packages.

        Parameters
        ----------
        path
            Directory, or "owner/name" of a repository, whose JSON, safetensors and TSV files are downloaded.
        revision, token
            Branch, tag or commit of the repository, and the token that gives access to a private one.
        subfolder
            Folder of the model within `path`.

        Raises
        ------
        ModelFileError
            If there is no such directory or repository, or it does not hold a saved model.
        ImportError
            If `path` is a repository and huggingface_hub is not installed (extra `hub`).

        Examples
        --------
        >>> import scfm
        >>> model = scfm.Model.from_pretrained("owner/name", revision="v1")  # doctest: +SKIP
        """
        return cls(**vars(load_saved(fetched(path, revision=revision, token=token, subfolder=subfolder))))

    def push_to_hub(
        self,
        repository: str,
        *,
        data: str | None = None,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model with its card to a repository on the model hub, which is created if it does not exist.

        Parameters
        ----------
        repository
            "owner/name".
        data, license
            Description of the training data, and license of the model, for the model card.
        private
            Whether a new repository is private.
        revision
            Branch. None for the main branch.
        token
            Access token. None for the token that `hf auth login` has stored.

        Returns
        -------
        Address of the commit.

        Examples
        --------
        >>> model.push_to_hub("owner/name", license="bsd-3-clause", private=True)  # doctest: +SKIP
        """
        return push(self, repository, data=data, license=license, private=private, revision=revision, token=token)

    def report(self) -> pd.DataFrame:
        """Return the scores of the model and of the baselines on the same test cells.

        Returns
        -------
        One row per method (index `method`). The first, "scfm", is the ensemble that `scfm.tl.annotate` uses. Columns:

        - `setting`: "inductive" if nothing was fitted on test cells, "transductive" if they were used without their labels
        - `accuracy`, `macro_f1` (mean of the F1 scores of the classes), `balanced_accuracy` (mean of their recalls)
        - `ece`: expected calibration error of the probabilities
        - `above_scfm`: True if the method has a higher macro-F1 than the row "scfm"

        Raises
        ------
        ModelTaskError
            If the model was fitted without labels.

        Examples
        --------
        >>> import scfm
        >>> adata = scfm.datasets.pbmc()
        >>> short = scfm.FitConfig(n_steps=2)
        >>> model = scfm.fit(
        ...     adata, labels_key="bulk_labels", config=short, pretrain_config=short, progress=False
        ... )
        >>> table = model.report()
        >>> table.index[0], "logistic regression" in table.index
        ('scfm', True)
        """
        import pandas as pd

        if self.scores is None:
            raise ModelTaskError(
                "This model has no report: it was fitted without labels. Call `scfm.fit(adata, labels_key=...)`."
            )
        table = pd.DataFrame(self.scores).set_index("method")
        table["above_scfm"] = table["macro_f1"] > table["macro_f1"].iloc[0]
        return table

    @torch.no_grad()
    def embed(
        self,
        cells: CellBatch,
        *,
        hidden_layer: int | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        precision: Precision = "fp32",
        progress: bool | tqdm = False,
    ) -> NDArray[np.float32]:
        """Return the embedding of each encoded cell, shape (B, D), float32. It does not depend on the other cells.

        The arguments are those of `scfm.tl.embed`; a progress bar that is given as `progress` is advanced.
        """
        network, config = self.network_in(precision), self.network.config
        parts = [
            network.embed_cells(batch, hidden_layer=hidden_layer, pooling=pooling).float().cpu()
            for batch in self.batches(cells, title="embedding", progress=progress)
        ]
        if not parts:
            return np.empty((0, config.width_of(pooling or config.pooling.how)), np.float32)
        embedding_BD = torch.cat(parts).numpy()
        return (
            unit_length(embedding_BD)
            if (config.pooling.normalize if normalize is None else normalize)
            else embedding_BD
        )

    def embedding_of_features(self, features_BX: NDArray[np.float32], cells: CellBatch) -> NDArray[np.float32]:
        """Return the result of `embed`. If the class head reads the embedding, it is taken from `features_BX`, not computed."""
        if not self.network.class_head_reads_embedding:
            return self.embed(cells)
        return unit_length(features_BX) if self.network.config.pooling.normalize else features_BX

    @torch.no_grad()
    def class_features(
        self, cells: CellBatch, *, precision: Precision = "fp32", progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the input of the class head for each encoded cell, shape (B, X), float32."""
        network = self.network_in(precision)
        batches = self.batches(cells, title="class features", progress=progress)
        parts = [network.class_features(batch).float().cpu() for batch in batches]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def logits_of_features(self, features_BX: NDArray[np.float32], cells: CellBatch) -> torch.Tensor:
        """Return logits of the transformer, shape (B, C), from class features, or from `cells` if the head needs all tokens."""
        self.require_labels()
        if self.network.config.classes.kind == "panel":
            return torch.cat([self.network.class_logits(batch).float().cpu() for batch in self.batches(cells)])
        self.network.eval()
        with torch.inference_mode():
            return self.network.class_head(torch.from_numpy(features_BX).to(self.device)).float().cpu()

    @torch.no_grad()
    def predict_proba(
        self,
        cells: CellBatch,
        expression_BV: csr_matrix | None = None,
        *,
        calibrated: bool = True,
        progress: bool | tqdm = False,
    ) -> NDArray[np.float32]:
        """Return the probability of each class for each encoded cell, shape (B, C), float32, in the order of `labels`.

        Parameters
        ----------
        cells
            Cells encoded with the encoding of the model.
        expression_BV
            log1p counts per 10,000 by token id (`scfm.pp.log_expression`) of the same cells, shape (B, V). With it, models
            that were fitted with labels return the probabilities of the ensemble. None for the transformer alone.
        calibrated
            Whether to divide logits by the temperature that was fitted on the calibration cells.
        progress
            Whether to show a progress bar, or a bar of cells that is advanced.
        """
        self.require_labels()
        batches = self.batches(cells, title="annotating", progress=progress)
        parts = [self.network.class_logits(batch).float().cpu() for batch in batches]
        logits_BC = torch.cat(parts) if parts else torch.empty(0, len(self.labels))
        return self.proba_of_logits(logits_BC, expression_BV, calibrated=calibrated)

    def proba_of_logits(
        self, logits_BC: torch.Tensor, expression_BV: csr_matrix | None = None, *, calibrated: bool = True
    ) -> NDArray[np.float32]:
        """Return the same as `predict_proba` for given logits of the transformer, shape (B, C)."""
        fitted, classifier = self.calibration or Calibration(n_cells=0), self.network.gene_classifier
        temperature = fitted.transformer_temperature
        if expression_BV is not None and classifier is not None:
            logits_BC = classifier.joined_with(logits_BC, expression_BV)
            temperature = fitted.ensemble_temperature
        if calibrated:
            logits_BC = logits_BC / temperature
        return torch.softmax(logits_BC, -1).numpy()

    def network_in(self, precision: Precision) -> CellTransformer:
        """Return the network for inference: the network itself ("fp32"), or one with blocks in bfloat16 ("bf16")."""
        require_precision(precision)
        return self.network if precision == "fp32" else in_bfloat16(self.network)

    def require_labels(self) -> None:
        """Raise `ModelTaskError` unless the model predicts classes of cells."""
        if self.labels and self.network.config.classes.kind == "token":
            raise ModelTaskError(
                "This model predicts classes of genes, not of cells. `model.network.class_logits(cells)` returns its logits, "
                "one row per token."
            )
        if not self.labels:
            raise ModelTaskError(
                "This model was not trained to annotate. Fit one with labels: `scfm.fit(adata, labels_key=...)`."
            )

    def batches(
        self, cells: CellBatch, *, title: str | None = None, progress: bool | tqdm = False
    ) -> Iterator[CellBatch]:
        """Yield batches of at most `TOKENS_PER_BATCH` tokens on the device of the network, which is set to inference.

        A progress bar with the title appears if the work takes more than a second; or a bar that is given is advanced.

        Gradients are not turned off here, because they would stay off if an error left this generator suspended. The caller
        turns them off.
        """
        self.network.eval()
        with cell_bar(len(cells), title, progress=progress) as bar:
            for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH):
                yield cells.select(torch.arange(rows.start, rows.stop)).to(self.device)
                bar.update(rows.stop - rows.start)

    def _repr_html_(self) -> str:
        rows = [("model", repr(self))]
        rows += [("labels", ", ".join(self.labels))] if self.labels else []
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
        report = self.report().to_html(float_format="{:.3f}".format) if self.scores is not None else ""
        return f"<table>{cells}</table>{report}"


def unit_length(embedding_BD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide each row by its Euclidean norm."""
    return embedding_BD / np.maximum(np.linalg.norm(embedding_BD, axis=1, keepdims=True), 1e-12)
