"""`python -m bench.prefill`: LLaVA-1.5 against LLaVA-STF, from pixel values to the first token, stage by stage.

__main__    options                                presets     sizes, what is measured, whether it fits into memory
models      the rows and what each of them runs    modes       eager, captured, compiled
stages      boundaries of the stages               run         warm-up, agreement, interleaved rounds
floors      operations and bytes of each stage     speedup     ratios, and the refusal of them
terminal    the table
"""
