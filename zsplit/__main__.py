"""`python -m zsplit`: the command line, for starters that take a module, such as torchrun."""

from zsplit.cli import main

if __name__ == "__main__":
    main()
