"""The ops in plain torch: what the compiled kernels are held against, and what runs where there is none."""
