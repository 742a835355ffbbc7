"""python -m tests.findings: see run.py."""

from tests.findings.run import main

if __name__ == "__main__":
    main()
