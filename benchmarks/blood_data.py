"""Blood studies for the model that ships: files, licenses, labels brought to common types, and one vocabulary for all files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

import scfm
from scfm.vocab import strip_version

# Axes: B cells, G genes of a file.

TYPES = (
    "B", "plasma", "CD4 T", "CD8 T", "NK", "CD14 monocyte", "CD16 monocyte", "dendritic", "megakaryocyte", "progenitor",
)  # fmt: skip
COARSE = {"monocyte": ("CD14 monocyte", "CD16 monocyte")}  # labels of a study that do not distinguish these types
ZHENG = "Zheng et al. 2017, 10x Genomics: types sorted by antibodies from one donor"
# Batches that are left out: the donor of 10x_6K is that of PBMC 3k.
LEFT_OUT_BATCHES = ("10x_6K",)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of blood cells.

    Attributes
    ----------
    file
        Path within the folder `SCFM_DATA`.
    study
        Files of one experiment or of the same donors share it. It is left out as a whole.
    description, license
        What the cells are, and the license of the package that the file was taken from.
    labels_key, types
        Column with labels, and the common type of each label; labels that are not in `types` are not used. Without
        `labels_key` the file is used without labels.
    batch_key
        Column with batches or conditions within the file.
    """

    file: str
    study: str
    description: str
    license: str
    labels_key: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    batch_key: str | None = None


SOURCES = {
    "PBMC 3k": Source(
        file="pbmc3k_raw_counts_labels.h5ad", study="PBMC 3k", description="10x Genomics, 3k PBMC of a healthy donor",
        license="MIT", labels_key="cell_type_seurat",
        types={"Naive CD4 T": "CD4 T", "Memory CD4 T": "CD4 T", "CD8 T": "CD8 T", "NK": "NK", "B": "B", "DC": "dendritic",
               "CD14+ Mono": "CD14 monocyte", "FCGR3A+ Mono": "CD16 monocyte", "Platelet": "megakaryocyte"},
    ),
    "Kang": Source(
        file="kang_ifnb_2000.h5ad", study="Kang", license="GPL-3", batch_key="condition", labels_key="cell_type",
        description="Kang et al. 2018 (GSE96583): eight lupus patients, half of the cells stimulated with interferon beta",
        types={"CD4 T cells": "CD4 T", "CD8 T cells": "CD8 T", "NK cells": "NK", "B cells": "B", "Dendritic cells": "dendritic",
               "CD14+ Monocytes": "CD14 monocyte", "FCGR3A+ Monocytes": "CD16 monocyte", "Megakaryocytes": "megakaryocyte"},
    ),
    "ifnb": Source(
        file="ifnb1k_832.h5ad", study="Kang", description="other cells of Kang et al. 2018", license="MIT",
        batch_key="stim", labels_key="seurat_annotations",
        types={"CD4 Naive T": "CD4 T", "CD4 Memory T": "CD4 T", "CD8 T": "CD8 T", "B": "B", "CD14 Mono": "CD14 monocyte",
               "CD16 Mono": "CD16 monocyte"},
    ),
    "Zheng sorted": Source(
        file="corpus/human_pbmc_facs_zheng_3874x16791.h5ad", study="Zheng", description=ZHENG, license="BSD-2-Clause",
        labels_key="cell_type",
        types={"CD19+ B": "B", "CD34+": "progenitor", "CD56+ NK": "NK", "CD14+ Monocyte": "CD14 monocyte",
               "CD8+ Cytotoxic T": "CD8 T", "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T", "CD4+ T Helper2": "CD4 T",
               "CD4+/CD45RO+ Memory": "CD4 T", "CD4+/CD25 T Reg": "CD4 T", "CD4+/CD45RA+/CD25- Naive T": "CD4 T"},
    ),
    # Its "monocytes" are not used: most express CD1C, FCER1A or CLEC9A and neither CD14 nor S100A8, so they are dendritic cells.
    "Zheng purified": Source(
        file="corpus/human_pbmc_purified_ref_zheng_2007x8863.h5ad", study="Zheng", description=f"{ZHENG}, other cells",
        license="GPL-3", labels_key="cell_type",
        types={"bcells": "B", "nk": "NK", "cytotoxict": "CD8 T", "naivecytotoxic": "CD8 T", "memoryt": "CD4 T",
               "regulatoryt": "CD4 T", "thelper": "CD4 T", "naivet": "CD4 T"},
    ),
    # Not used: endothelial and smooth muscle cells, which are not in blood; ILC and macrophages, which no other study labels.
    "lymphoid": Source(
        file="corpus/human_lymphoid_cell2location_ref_330x9936.h5ad", study="lymphoid", license="GPL-3",
        description="Kleshchevnikov et al. 2022: lymph node, tonsil and spleen of several studies", labels_key="cell_type",
        types={"B": "B", "B_Plasma": "plasma", "DC": "dendritic", "NK": "NK", "T_CD4": "CD4 T", "T_CD8": "CD8 T",
               "Monocytes": "monocyte"},
    ),
    "PBMC of SoupX": Source(
        file="corpus/human_pbmc_10x_soupx_2170x18368.h5ad", study="PBMC of SoupX", license="GPL-2",
        description="10x Genomics, PBMC of a healthy donor",
    ),
    "PBMC of six studies": Source(
        file="corpus/human_pbmc_14batch_tidytx_2097x21802.h5ad", study="PBMC of six studies", license="CC BY-SA 4.0",
        description="GSE115189 (Freytag 2018), SCP424 (Ding 2020), SRR7244582, SRR11038995, 10x Genomics 8k",
        batch_key="sample",
    ),
    "ECCITE-seq control": Source(
        file="corpus/human_pbmc_control_citefuse_500x14919.h5ad", study="ECCITE-seq", license="GPL-3",
        description="Mimitou et al. 2019, control PBMC",
    ),
    "Zheng donor A": Source(
        file="corpus/human_pbmc_frozen_donorA_zheng_2896x13939.h5ad", study="Zheng", license="GPL-3",
        description="Zheng et al. 2017, frozen PBMC of donor A",
    ),
}  # fmt: skip
LABELED = tuple(name for name, source in SOURCES.items() if source.labels_key)
STUDIES = tuple(dict.fromkeys(SOURCES[name].study for name in LABELED))


def without(study: str | None, *, labeled: bool) -> list[str]:
    """Names of the files with or without labels that are not of a study."""
    return [name for name, source in SOURCES.items() if source.study != study and (name in LABELED) == labeled]


def prepare(name: str, folder: Path) -> Path:
    """Write the cells of a file with `obs["type"]` ("" for none) and `obs["batch"]`, unless they are there. Returns the path."""
    path = folder / f"{name}.h5ad"
    if path.exists():
        return path
    source = SOURCES[name]
    adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / source.file)
    batches = pd.Series(name, adata.obs_names)
    if source.batch_key:
        batches = name + " " + adata.obs[source.batch_key].astype(str)
    types = pd.Series("", adata.obs_names)
    if source.labels_key:
        types = adata.obs[source.labels_key].astype(object).map(source.types).fillna("")
    kept = ~batches.str.removeprefix(f"{name} ").isin(LEFT_OUT_BATCHES).to_numpy()
    obs = pd.DataFrame({"type": types.astype(str), "batch": batches.astype(str)})[kept]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    anndata.AnnData(adata.X[kept], obs=obs, var=pd.DataFrame(index=adata.var_names)).write_h5ad(unfinished)
    unfinished.rename(path)
    return path


@cache
def _gene_tables() -> tuple[dict[str, str], dict[str, str]]:
    """Symbol of each Ensembl id (GENCODE 44), and Ensembl id of each former name, in upper case (Geneformer's dictionary)."""
    folder = Path(os.environ["SCFM_DATA"]) / "vocab"
    table = pd.read_csv(
        folder / "celltypist_GENCODEv44_Gene_id2name.csv", header=None, names=["id", "symbol"], dtype=str
    )
    symbols = dict(zip(table["id"].map(strip_version), table["symbol"]))
    known = scfm.Vocabulary(list(symbols), id_type="ensembl")
    return symbols, scfm.encoding.read_aliases(folder / "geneformer_ensembl_mapping_dict_gc95M.pkl", known)


def current_symbol(name: str) -> str | None:
    """Symbol of a gene in GENCODE 44, from a current or former symbol; None for other names."""
    symbols, former = _gene_tables()
    return name if name in _current_symbols() else symbols.get(former.get(name.upper(), ""))


@cache
def _current_symbols() -> frozenset[str]:
    return frozenset(_gene_tables()[0].values())


def detected(paths: Iterable[Path]) -> pd.DataFrame:
    """Fraction of the cells of each file in which a gene is detected; one row per symbol, NaN where a file lacks the gene."""
    columns = {}
    for path in paths:
        adata = anndata.read_h5ad(path)
        fraction_G = np.asarray((adata.X > 0).mean(0)).ravel()
        columns[path.stem] = (
            pd.Series(fraction_G, [current_symbol(name) for name in adata.var_names]).groupby(level=0).max()
        )
    return pd.DataFrame(columns)


def make_vocabulary(genes: Iterable[str], paths: Iterable[Path]) -> scfm.Vocabulary:
    """Vocabulary of symbols; Ensembl ids and the former symbols that occur in files are aliases."""
    tokens = set(genes)
    aliases = {gene_id: symbol for gene_id, symbol in _gene_tables()[0].items() if symbol in tokens}
    for path in paths:
        for name in anndata.read_h5ad(path, backed="r").var_names:
            symbol = current_symbol(name)
            if symbol in tokens and name != symbol:
                aliases[name] = symbol
    roles = {"pad": "<pad>", "mask": "<mask>"}
    return scfm.Vocabulary([*roles.values(), *sorted(tokens)], special=roles, id_type="symbol", aliases=aliases)


def scores(truth: np.ndarray, predicted: np.ndarray, learned: Iterable[str]) -> dict[str, float]:
    """Accuracy and macro-F1 over the types that training had. For a coarse label, predictions are made coarse too."""
    truth, predicted, learned = truth.astype(object), predicted.astype(object), set(learned)
    for coarse, fine in COARSE.items():
        if (truth == coarse).any():
            predicted = np.where(np.isin(predicted, fine), coarse, predicted)
            learned.add(coarse)
    scored = np.isin(truth, list(learned))
    return scfm.baselines.scores(truth[scored].astype(str).tolist(), predicted[scored].astype(str).tolist())
