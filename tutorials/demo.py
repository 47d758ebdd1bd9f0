"""The whole job on real data: fit, embed, annotate, perturb, and compare with simple baselines.

Run `make demo`, or `python tutorials/demo.py OUTPUT_FOLDER`. Takes a few minutes on two CPU cores.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import scanpy as sc

import scfm


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

    # scanpy takes it from here.
    sc.pp.neighbors(adata, use_rep="X_scfm")
    sc.tl.umap(adata)
    scfm.pl.embedding(adata, color=["bulk_labels", "scfm_label"], save=folder / "embedding.png", show=False)
    held_out = adata[adata.obs["scfm_split"] == "test"]
    scfm.pl.confusion(held_out, truth="bulk_labels", save=folder / "confusion.png", show=False)

    # Which genes matter most to the state of a B cell? Delete each in turn and see how far the cell moves.
    b_cells = adata[adata.obs["bulk_labels"] == "CD19+ B"][:25]
    effects = scfm.tl.perturb(b_cells, model, kind="delete")
    effects.to_csv(folder / "perturbation.csv")
    scfm.pl.perturbation(effects, save=folder / "perturbation.png", show=False)

    adata.write_h5ad(folder / "pbmc.h5ad")
    print(report.round(3).to_string())
    if better := report.index[report["above_scfm"]].tolist():
        print(f"\nOn these cells {' and '.join(better)} scored a higher macro-F1 than the model.")
    else:
        print("\nOn these cells no baseline scored a higher macro-F1 than the model.")
    print(f"\nWritten to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
