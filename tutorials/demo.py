"""The whole job on real data: fit, embed, annotate, perturb, and compare with simple baselines.

Run `make demo`, or `python tutorials/demo.py OUTPUT_FOLDER`. Takes a few minutes on two CPU cores.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import scanpy as sc

import scfm

STATES = ("CD19+ B", "CD14+ Monocyte", "CD56+ NK")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    # 700 blood cells with ten labels; raw counts in X.
    adata = scfm.datasets.pbmc()

    # One line: encode, pretrain on masked genes, fine-tune on labels, score on held-out cells.
    model = scfm.fit(adata, labels_key="bulk_labels")
    model.save(folder / "model")
    report = model.report()
    report.to_csv(folder / "report.csv")

    # Labels for every cell, with confidence.
    scfm.tl.annotate(adata, model)

    # scanpy takes it from here. The figures show only cells that took no part in training.
    sc.pp.neighbors(adata, use_rep="X_scfm")
    sc.tl.umap(adata)
    held_out = adata[adata.obs["scfm_split"] == "test"].copy()
    scfm.pl.embedding(held_out, color=["bulk_labels", "scfm_label"], save=folder / "embedding.png", show=False)
    scfm.pl.confusion(held_out, truth="bulk_labels", save=folder / "confusion.png", show=False)

    # Which genes hold a cell in its state? Delete each, and see whether the model still gives the cell its label.
    figure, axes = plt.subplots(1, len(STATES), figsize=(5 * len(STATES), 3.6), layout="constrained")
    for ax, state in zip(axes, STATES):
        cells = held_out[held_out.obs["bulk_labels"] == state].copy()
        effects = scfm.tl.screen(cells, model, measure="label", groupby="bulk_labels")
        effects.to_csv(folder / f"genes_of_{state.split()[-1]}.csv")
        scfm.pl.perturbation(effects, n_genes=10, ax=ax, show=False)
        ax.set_title(f"{state}, {cells.n_obs} held-out cells", pad=24)
    figure.savefig(folder / "genes_of_states.png", dpi=150)

    adata.write_h5ad(folder / "pbmc.h5ad")
    print(report.round(3).to_string())
    if better := report.index[report["above_scfm"]].tolist():
        print(f"\nOn these cells {' and '.join(better)} scored a higher macro-F1 than the model.")
    else:
        print("\nOn these cells no baseline scored a higher macro-F1 than the model.")
    print(f"\nWritten to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
