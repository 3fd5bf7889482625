"""Run the command line: `python -m services.cli` does what the command `expertmesh` does."""

from services.cli.main import main

if __name__ == "__main__":
    main()
