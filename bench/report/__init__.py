"""`python -m bench.report`: a page from result files, or the difference of two runs.

__main__   options      page     what stands on the page (page.html.j2 is how it looks)
compare    two runs     charts   its charts
"""
