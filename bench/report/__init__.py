"""`python -m bench.report`: a page from result files, or the difference of two runs."""
