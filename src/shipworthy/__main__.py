"""`python -m shipworthy` is the command `shipworthy`."""

from shipworthy.cli import main

main()
