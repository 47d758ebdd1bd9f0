"""Files of models: saving, loading, the model hub, model cards, and the tensors and gene tables of checkpoints."""
