"""`python -m bench.prefill`: LLaVA-1.5 against LLaVA-STF, from pixel values to the first token, stage by stage."""
