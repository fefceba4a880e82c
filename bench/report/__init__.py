"""`python -m bench.report`: a page from result files."""
