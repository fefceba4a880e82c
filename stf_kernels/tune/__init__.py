"""The offline search, for who has a GPU: `python -m stf_kernels.tune` measures it and writes its table.

problems.py    the products of LLaVA-STF at the sizes of LLaVA-1.5-7B
candidates.py  which configurations of a product are worth measuring
measure.py     their times, by ops/first_use.py
search.py      the table, entry by entry
"""
