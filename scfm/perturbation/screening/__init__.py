"""Every gene of every cell at once: displacements estimated from a few backward passes, the best verified."""
