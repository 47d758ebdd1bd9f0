"""The operators in plain torch: the tests compare the compiled kernels with them, and they run where there are no kernels."""
