"""`python -m surefoot.cli`, the same as the `surefoot` command."""

from surefoot.cli import main

main()
