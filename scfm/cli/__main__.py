"""`python -m scfm.cli`, for environments whose scripts are not on the path."""

from scfm.cli import main

main()
