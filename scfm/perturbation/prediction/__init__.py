"""Expression after a perturbation that was not measured, and how well simple methods do."""
