"""Tools: functions that apply models, and write results to AnnData or return tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scfm._lazy import at_first_use

if TYPE_CHECKING:
    from scfm.tl._annotate import annotate
    from scfm.tl._annotate_files import annotate_files
    from scfm.tl._attention import attention
    from scfm.tl._denoise import denoise, evaluate_denoising
    from scfm.tl._embed import embed
    from scfm.tl._embed_files import embed_files
    from scfm.tl._evaluate import evaluate_annotation, summarize_scores
    from scfm.tl._evaluate_perturbation import evaluate_perturbation
    from scfm.tl._fit import fit
    from scfm.tl._gene_embeddings import gene_embeddings
    from scfm.tl._gene_network import gene_network
    from scfm.tl._genes import classify_genes, similar_genes
    from scfm.tl._integrate import integrate
    from scfm.tl._map_reference import map_reference
    from scfm.tl._map_reference_files import map_reference_files
    from scfm.tl._perturb import perturb
    from scfm.tl._predict_perturbation import predict_perturbation
    from scfm.tl._score_perturbation_prediction import score_perturbation_prediction
    from scfm.tl._screen import screen

__all__ = [
    "annotate",
    "annotate_files",
    "attention",
    "classify_genes",
    "denoise",
    "embed",
    "embed_files",
    "evaluate_annotation",
    "evaluate_denoising",
    "evaluate_perturbation",
    "fit",
    "gene_embeddings",
    "gene_network",
    "integrate",
    "map_reference",
    "map_reference_files",
    "perturb",
    "predict_perturbation",
    "score_perturbation_prediction",
    "screen",
    "similar_genes",
    "summarize_scores",
]

# Each file is imported when one of its functions is first used, because some need scikit-learn, which takes a second.
_FILES = {
    "annotate": "_annotate",
    "annotate_files": "_annotate_files",
    "attention": "_attention",
    "classify_genes": "_genes",
    "denoise": "_denoise",
    "embed": "_embed",
    "embed_files": "_embed_files",
    "evaluate_annotation": "_evaluate",
    "evaluate_denoising": "_denoise",
    "evaluate_perturbation": "_evaluate_perturbation",
    "fit": "_fit",
    "gene_embeddings": "_gene_embeddings",
    "gene_network": "_gene_network",
    "integrate": "_integrate",
    "map_reference": "_map_reference",
    "map_reference_files": "_map_reference_files",
    "perturb": "_perturb",
    "predict_perturbation": "_predict_perturbation",
    "score_perturbation_prediction": "_score_perturbation_prediction",
    "screen": "_screen",
    "similar_genes": "_genes",
    "summarize_scores": "_evaluate",
}


__getattr__ = at_first_use(globals(), {name: f"scfm.tl.{file}" for name, file in _FILES.items()})


def __dir__() -> list[str]:
    return sorted(__all__)
