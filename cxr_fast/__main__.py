"""`python -m cxr_fast` is the command `cxrfast`."""

from .cli.main import main

if __name__ == "__main__":
    main(prog_name="cxrfast")
