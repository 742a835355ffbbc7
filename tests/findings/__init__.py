"""The DFN paper's findings in small: docs/FINDINGS.md has what came out."""
