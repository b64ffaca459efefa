"""`python -m batchnorm.cli`: the command where no script is installed."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
