"""Helpers of the tests: the numerical rule, comparisons with the reference, allocations, other processes."""
